"""A reader's scan: with a mask of their own, feature models, a network, and the command for it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from covidmtl_core import cohort, own_scan
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.phantom import Phantom, draw_patient, make_phantom
from covidmtl_core.preprocessing import Preprocessed, preprocess_scan
from covidmtl_core.recipe import TrainConfig
from covidmtl_core.store import Patients
from covidmtl_core.training import fit

MM = 6.0


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(draw_patient(3, burden=0.2), (57, 65, 65), MM)


@pytest.fixture(scope="module")
def files(phantom: Phantom, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("own")
    paths = folder / "scan.nii.gz", folder / "lungs.nii.gz"
    for path, image in zip(paths, (phantom.image, phantom.lungs), strict=True):
        sitk.WriteImage(image, str(path))
    return paths


@pytest.fixture(scope="module")
def ready(files: tuple[Path, Path]) -> Preprocessed:
    return preprocess_scan(files[0], MM, own_scan.given_lungs(files[1]))


def test_a_given_mask_is_taken_as_it_is(ready: Preprocessed, phantom: Phantom) -> None:
    given = np.count_nonzero(sitk.GetArrayViewFromImage(phantom.lungs))
    assert np.count_nonzero(sitk.GetArrayViewFromImage(ready.lungs)) == given
    assert set(np.unique(sitk.GetArrayViewFromImage(ready.lungs))) == {0, 1, 2}


def test_a_mask_in_a_finer_grid_covers_the_same_place(
    phantom: Phantom, tmp_path: Path, ready: Preprocessed
) -> None:
    fine = sitk.Expand(phantom.lungs, [2, 2, 2], sitk.sitkNearestNeighbor)
    sitk.WriteImage(sitk.Cast(fine > 0, sitk.sitkUInt8), str(tmp_path / "fine.nrrd"))
    again = own_scan.given_lungs(tmp_path / "fine.nrrd")(phantom.image)
    one, other = (sitk.GetArrayViewFromImage(i) > 0 for i in (again, phantom.lungs))
    assert (one != other).mean() < 0.01


def test_a_mask_elsewhere_or_missing_is_refused(phantom: Phantom, tmp_path: Path) -> None:
    moved = sitk.Image(phantom.lungs)
    moved.SetOrigin([5000.0, 0.0, 0.0])
    sitk.WriteImage(moved, str(tmp_path / "moved.nii.gz"))
    with pytest.raises(DataError, match=r"moved\.nii\.gz has 0 of its \d+ ml where the scan is"):
        own_scan.given_lungs(tmp_path / "moved.nii.gz")(phantom.image)
    with pytest.raises(DataError, match="does not exist"):
        own_scan.given_lungs(tmp_path / "no.nii.gz")


def test_feature_models_tell_a_training_patient_by_heart() -> None:
    patients, table = cohort.load_cohort("phantom"), cohort.load_features("phantom")
    train, _ = cohort.split(patients)
    said = own_scan.feature_models(table.loc[train[0]], "phantom", n_trees=30)
    assert list(said.index.unique("task")) == list(cohort.TASKS)
    assert np.allclose(said.sum(axis=1), 1)
    for task, row in said.loc["RF"].iterrows():
        assert row.idxmax() == patients.loc[train[0], task]


def test_a_feature_that_is_not_a_number_is_named() -> None:
    features = cohort.load_features("phantom").iloc[0].copy()
    features["Imc1"] = np.nan
    with pytest.raises(DataError, match=r"1 features of the scan are not defined.*Imc1"):
        own_scan.feature_models(features, "phantom")


@pytest.fixture(scope="module")
def checkpoint(ready: Preprocessed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    voxels = sitk.GetArrayFromImage(ready.volume)
    labels = pd.DataFrame({"ct": [0, 1], "nat": [0, 1], "severity": [0, 2]}, index=["a", "b"])
    features = pd.DataFrame([ready.features, ready.features * 2], index=labels.index)
    config = TrainConfig(epochs=1, batch_size=2, crop=(48, 48, 48), use_features=True)
    patients = Patients(labels, features, {"a": voxels, "b": voxels})
    trained = fit(config, patients, tmp_path_factory.mktemp("runs"), progress=False, device="cpu")
    return trained.folder / "last.pt"


def test_a_network_of_the_readers_speaks(ready: Preprocessed, checkpoint: Path) -> None:
    said = own_scan.network(ready, checkpoint, "cpu")
    assert list(said.index) == [("network", task) for task in cohort.TASKS]
    assert np.allclose(said.sum(axis=1), 1)


def test_report_holds_all_of_it_and_warns(
    files: tuple[Path, Path], checkpoint: Path, tmp_path: Path
) -> None:
    lines = list(
        own_scan.write_report(
            files[0], tmp_path / "out", files[1], checkpoint, MM, tier="phantom", device="cpu"
        )
    )
    assert lines[-1] == own_scan.WARNING and "not a medical device" in lines[-1]
    features = pd.read_csv(tmp_path / "out" / "features.csv", index_col="feature")
    assert len(features) == 375 and features["flag"].str.contains("measured at 6 mm").all()
    said = pd.read_csv(tmp_path / "out" / "predictions.csv", index_col=["model", "task"])
    assert set(said.index.unique("model")) == {"RF", "LGBM", "network"}
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_report_refuses_what_it_cannot_use(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="tier is 'volumes'"):
        list(own_scan.write_report(files[0], tmp_path, tier="volumes"))
    with pytest.raises(ParameterError, match="spacing is 0"):
        list(own_scan.write_report(files[0], tmp_path, spacing_mm=0, tier="phantom"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="taken cannot be made a folder"):
        list(own_scan.write_report(files[0], tmp_path / "taken", spacing_mm=MM, tier="phantom"))
