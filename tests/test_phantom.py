from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from covidmtl_core import baselines, cohort, ct, dicom, evaluation, phantom_cohort
from covidmtl_core.errors import ParameterError
from covidmtl_core.phantom import Phantom, _fill, draw_patient, make_phantom

SIZE, SPACING = (85, 98, 98), 4.0


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


@pytest.fixture(scope="module")
def sick() -> Phantom:
    return make_phantom(draw_patient(3, burden=0.2), SIZE, SPACING)


def test_a_seed_is_a_patient(sick: Phantom) -> None:
    again = make_phantom(draw_patient(3, burden=0.2), SIZE, SPACING)
    other = make_phantom(draw_patient(4, burden=0.2), SIZE, SPACING)
    for name in ("image", "lungs", "lesions"):
        assert np.array_equal(array(getattr(sick, name)), array(getattr(again, name)))
        assert not np.array_equal(array(getattr(sick, name)), array(getattr(other, name)))


def test_body_and_lesions_are_the_same_on_another_grid(sick: Phantom) -> None:
    fine = make_phantom(draw_patient(3, burden=0.2), (180, 190, 201), 2.0)
    for name, least in (("lungs", 0.96), ("lesions", 0.88)):
        coarse = getattr(sick, name)
        again = sitk.Resample(
            getattr(fine, name), coarse, sitk.Transform(), sitk.sitkNearestNeighbor
        )
        assert evaluation.overlap_metrics(array(again) > 0, array(coarse) > 0)["dice"] > least


def test_capsules_fill_what_lies_within_their_radius() -> None:
    rng, voxel, size = np.random.default_rng(0), 2.0, (12, 14, 16)
    axes = [np.arange(n, dtype=np.float32) * np.float32(voxel) for n in size]
    (start, end), radius = rng.uniform(2, 20, (2, 5, 3)), rng.uniform(1, 4, 5)
    filled, low = np.zeros(size, np.float32), np.zeros((5, 3), int)
    _fill(filled, *axes, start, end, radius, low, low + size, voxel)
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    plain = np.zeros(filled.shape)
    for a, b, r in zip(start, end, radius, strict=True):
        t = np.clip((places - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
        far = np.linalg.norm(places - a - t[..., None] * (b - a), axis=-1)
        share = np.clip((r - far) / voxel + 0.5, 0, 1) * min(1, (2 * r / voxel) ** 2)
        plain = np.maximum(plain, share)
    np.testing.assert_allclose(filled, plain, atol=1e-5)
    assert 0.02 < filled.mean() < 0.9


def test_truth_is_anatomy(sick: Phantom) -> None:
    lungs, lesions, hu = array(sick.lungs), array(sick.lesions), array(sick.image)
    assert set(np.unique(lungs)) == {0, 1, 2} and not lesions[lungs == 0].any()
    columns = [np.nonzero(lungs == side)[2].mean() for side in (1, 2)]
    assert columns[0] + 20 < columns[1], "the right lung lies at small x in LPS"
    volume = (lungs > 0).sum() * SPACING**3 / 1000
    assert 1500 < volume < 7500, "ml"
    healthy, glass, solid = (hu[(lungs > 0) & (lesions == k)].mean() for k in (0, 1, 2))
    assert healthy < -700 < glass < -350 < solid < 60
    assert -1005 < hu[:, 0].mean() < -960, "air in front of the body"


@pytest.mark.parametrize("burden", [0.0, 0.05, 0.2, 0.5])
def test_burden_is_the_share_that_is_infected(burden: float) -> None:
    made = make_phantom(draw_patient(5, burden, bands=0), SIZE, SPACING)
    share = (array(made.lesions) > 0).sum() / (array(made.lungs) > 0).sum()
    assert share == pytest.approx(burden, abs=0.03)


def test_patients_differ_and_lesions_lie_low_and_at_the_rim() -> None:
    volumes, low, rim = [], [], []
    for seed in range(6):
        made = make_phantom(draw_patient(seed, 0.1), SIZE, SPACING)
        lungs, lesions = array(made.lungs) > 0, array(made.lesions) > 0
        volumes.append(lungs.sum())
        low.append(np.nonzero(lungs)[0].mean() - np.nonzero(lesions)[0].mean())
        depth = sitk.GetArrayFromImage(
            sitk.SignedMaurerDistanceMap(made.lungs > 0, insideIsPositive=True)
        )
        rim.append(depth[lungs].mean() - depth[lesions].mean())
    assert np.std(volumes) > 0.05 * np.mean(volumes)
    assert np.mean(low) > 3 and np.mean(rim) > 0.3


def test_through_dicom_and_back(sick: Phantom, tmp_path: Path) -> None:
    dicom.write_series(sick.image, tmp_path / "series")
    image = ct.read_ct(tmp_path / "series")
    assert np.array_equal(array(image), array(sick.image))
    for get in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(image, get)() == pytest.approx(getattr(sick.image, get)(), abs=1e-6)


def test_field_of_view_and_padding() -> None:
    made = make_phantom(draw_patient(3, padding=-3024, field_of_view=300.0), SIZE, SPACING)
    hu = array(made.image)
    assert (hu[:, 0, 0] == -3024).all() and (hu == -3024).mean() > 0.4
    assert hu[:, 49, 49].min() >= -1024


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: draw_patient(1, burden=1.5), "burden is 1.5"),
        (lambda: make_phantom(draw_patient(1), (4, 98, 98), 4.0), "at least 8"),
        (lambda: make_phantom(draw_patient(1), SIZE, 0.0), "above 0"),
    ],
)
def test_wrong_values_are_named(call, named: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ParameterError, match=named):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_anatomy_on_a_gpu(sick: Phantom) -> None:
    made = make_phantom(draw_patient(3, burden=0.2), SIZE, SPACING, device="cuda")
    assert evaluation.overlap_metrics(array(made.lungs), array(sick.lungs))["dice"] > 0.9999


# --- the cohort ---


def test_labels_are_structured_like_the_released_ones() -> None:
    table = phantom_cohort.source_table()
    assert (table["severity"] == table["morbidity"].map(cohort.SEVERITY_OF_MORBIDITY)).all()
    assert ((table["severity"] == 0) == (table["nat"] == 0)).all()
    positive, negative = table[table["ct"] == 1], table[table["ct"] == 0]
    infected = table[table["nat"] == 1]
    assert table["ct"].mean() == pytest.approx(0.75, abs=0.01)
    assert (positive["nat"] == 0).mean() == pytest.approx(0.26, abs=0.01)
    assert (negative["nat"] == 1).mean() == pytest.approx(0.07, abs=0.01)
    assert (infected["severity"] == 2).mean() == pytest.approx(0.26, abs=0.01)
    assert (negative["burden"] == 0).all() and (positive["burden"] > 0).all()
    milder, severe = (infected.loc[infected["severity"] == s, "burden"] for s in (1, 2))
    assert milder.max() <= severe.min()


def test_tables_belong_together() -> None:
    patients, features = cohort.load_cohort("phantom"), cohort.load_features("phantom")
    assert features.index.equals(patients.index) and np.isfinite(features.to_numpy()).all()
    assert cohort.load_geometry("phantom").index.equals(patients.index)
    assert cohort.load_source_cohort("phantom").index.is_unique


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, -1])
def test_stored_features_are_those_of_the_scans(which: int) -> None:
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")
    features = cohort.load_features("phantom")
    patient_id = int(features.index[which])
    measured = phantom_cohort.measure(patient_id)
    pd.testing.assert_series_equal(
        measured[list(features)], features.loc[patient_id], rtol=1e-6, check_names=False
    )


@pytest.mark.parametrize("task", list(cohort.TASKS))
def test_features_tell_something_but_not_all(task: str) -> None:
    patients, features = cohort.load_cohort("phantom"), cohort.load_features("phantom")
    train, test = cohort.split(patients)
    result = baselines.fit_predict("RF", features, patients[task], train, test, n_trees=50)
    areas = evaluation.one_vs_rest_aucs(patients.loc[test, task], result.probabilities)
    assert 0.6 < areas.mean() < 0.995
