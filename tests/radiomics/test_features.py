import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from covidmtl_core.ct import read_ct, resample
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.phantom import Phantom, draw_patient, make_phantom
from covidmtl_core.radiomics import names
from covidmtl_core.radiomics.features import (
    extract_features,
    masked_lungs,
    overwritten_features,
    sub_bands,
)
from covidmtl_core.radiomics.names import FEATURE_NAMES
from covidmtl_core.segmentation import segment_lungs

needs_pyradiomics = pytest.mark.usefixtures("pyradiomics")


@pytest.fixture(scope="module")
def pyradiomics() -> None:
    pytest.importorskip("radiomics", reason="pyradiomics is not installed")


def as_released(image: sitk.Image, mask: sitk.Image) -> pd.Series:
    """The plain reference; imported late, since it needs pyradiomics."""
    from covidmtl_core.benchmarks.plain_features import as_released

    return as_released(image, mask)


@pytest.fixture(scope="module")
def scan() -> Phantom:
    return make_phantom(draw_patient(6, 0.1), (68, 78, 78), 5.0)


def scan_of(
    voxels: NDArray[np.integer], inside: NDArray[np.bool_]
) -> tuple[sitk.Image, sitk.Image]:
    """An image of HU and its mask, from HU + 1024."""
    image = sitk.GetImageFromArray(voxels.astype(np.int16) - np.int16(1024))
    return image, sitk.GetImageFromArray(inside.astype(np.uint8))


def assert_same(found: pd.Series, expected: pd.Series) -> None:
    assert tuple(found.index) == FEATURE_NAMES
    np.testing.assert_allclose(found, expected[found.index], rtol=1e-8, atol=1e-13)


@needs_pyradiomics
def test_fast_equals_pyradiomics_as_the_authors_ran_it(scan: Phantom) -> None:
    expected = as_released(scan.image, scan.lungs)
    assert_same(extract_features(scan.image, scan.lungs), expected)
    assert_same(extract_features(scan.image, scan.lungs, "pyradiomics"), expected)


@needs_pyradiomics
@pytest.mark.parametrize("shape", [(9, 14, 11), (12, 13, 10), (2, 9, 8), (7, 1, 30)])
@pytest.mark.parametrize("place", ["everywhere", "near", "far", "both ends", "inside"])
def test_no_border_changes_a_value(shape: tuple[int, int, int], place: str) -> None:
    rng = np.random.default_rng(5)
    voxels, inside = rng.integers(1, 900, shape), rng.random(shape) < 0.7
    third = [(n + 1) // 3 for n in shape]
    kept = {
        "everywhere": [slice(None)] * 3,
        "near": [slice(n - t) for n, t in zip(shape, third, strict=True)],
        "far": [slice(t if n > 1 else 0, None) for n, t in zip(shape, third, strict=True)],
        "both ends": [slice(None)] * 3,
        "inside": [slice(t // 2, n - t // 2) for n, t in zip(shape, third, strict=True)],
    }[place]
    outside = np.ones(shape, bool)
    outside[tuple(kept)] = False
    inside &= ~outside
    if place == "both ends":
        inside[third[0] : -third[0]] = False
    image, mask = scan_of(voxels, inside)
    assert_same(extract_features(image, mask), as_released(image, mask))


@needs_pyradiomics
@pytest.mark.parametrize(
    "case",
    [
        "one level",
        "constant to the border",
        "two levels",
        "checkerboard",
        "apart",
        "on lines",
        "metal",
        "rank one",
    ],
)
def test_extreme_textures_come_out_alike(case: str) -> None:
    shape = (11, 12, 13)
    voxels, inside = np.full(shape, 300), np.zeros(shape, bool)
    inside[2:9, 3:10, 2:11] = True
    match case:
        case "constant to the border":
            inside[:] = True
            inside[0, 0, 0] = False
        case "two levels":
            voxels[:, :, 6:] = 725
        case "checkerboard":
            voxels[np.indices(shape).sum(axis=0) % 2 == 0] = 25
        case "apart":
            inside[:] = False
            inside[1, 1, 1] = inside[5, 8, 2] = inside[9, 3, 11] = True
        case "on lines":
            inside[:] = False
            inside[1, 1, 1] = inside[1, 1, 9] = inside[7, 8, 5] = True
        case "rank one":
            voxels[3:5, 3:5, 3:5] = 800
        case "metal":
            voxels = np.random.default_rng(1).integers(1, 400, shape)
            voxels[4, 5:7, 6] = 31_000
    image, mask = scan_of(voxels, inside)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        expected = extract_features(image, mask, "pyradiomics")
        found = extract_features(image, mask)
    assert_same(found, expected)
    assert found.isna().any() == (case in {"apart", "on lines"})


def test_the_name_that_two_families_share_is_that_of_the_zones() -> None:
    voxels, inside = np.full((6, 7, 8), 300), np.zeros((6, 7, 8), bool)
    inside[:5, :6, :7] = True
    voxels[:3, :3, :3] = 20
    found = extract_features(*scan_of(voxels, inside))
    assert found["GrayLevelNonUniformity"] == 1, "two zones, each alone at its level"
    assert found["LargeAreaEmphasis"] == (27**2 + (5 * 6 * 7 - 27) ** 2) / 2


@needs_pyradiomics
def test_the_overwritten_values_are_those_of_the_runs(scan: Phantom) -> None:
    from radiomics.glrlm import RadiomicsGLRLM

    volume = sitk.GetImageFromArray(masked_lungs(scan.image, scan.lungs))
    runs = RadiomicsGLRLM(volume, sitk.Cast(volume > 0, sitk.sitkUInt8), binWidth=25)
    found = overwritten_features(scan.image, scan.lungs)
    for name in found.index:
        runs.enableFeatureByName(name)
    expected = {name: float(value) for name, value in runs.execute().items()}
    assert len(expected) == 3
    assert dict(found) == pytest.approx(expected, rel=1e-10)


def test_sub_bands_of_a_constant_hold_it_in_the_low_pass_alone() -> None:
    inside = np.zeros((20, 22, 24), bool)
    inside[1:-1, 1:-1, 1:-1] = True
    bands = sub_bands(*scan_of(np.full(inside.shape, 500), inside))
    assert sorted(bands) == sorted(names.SUB_BANDS)
    for name, values in bands.items():
        middle = values[6:-6, 6:-6, 6:-6]
        np.testing.assert_allclose(middle, 500 * 2**1.5 if name == "LLL" else 0, atol=1e-4)


def test_threads_and_labels_change_nothing(scan: Phantom) -> None:
    found = extract_features(scan.image, scan.lungs)
    assert found.equals(extract_features(scan.image, scan.lungs, n_jobs=1))
    assert found.equals(extract_features(scan.image, scan.lungs > 0, n_jobs=3))


@needs_pyradiomics
@pytest.mark.parametrize(
    "name", ["covid-ct-md-P002-dicom", "covid-ct-md-normal001.nii.gz", "ibsi1-ct-phantom"]
)
def test_real_scans_and_the_ibsi_phantom_come_out_alike(name: str, ct_folder: Path) -> None:
    if name == "ibsi1-ct-phantom":
        files = (ct_folder / name).rglob("*.nii.gz")
        image, mask = sorted(files, key=lambda path: "mask" in path.name)
        scan, lungs = sitk.ReadImage(image), sitk.ReadImage(mask)
    else:
        scan = resample(read_ct(ct_folder / name), 4.0)
        lungs = segment_lungs(scan)
    assert_same(extract_features(scan, lungs), as_released(scan, lungs))


def test_what_cannot_be_measured_is_named(scan: Phantom) -> None:
    with pytest.raises(DataError, match="no lung voxel"):
        extract_features(scan.image, scan.lungs * 0)
    with pytest.raises(DataError, match="voxels"):
        extract_features(scan.image, scan.lungs[1:])
    for image, mask in (
        (scan.image[:, :, 3], scan.lungs[:, :, 3]),
        (sitk.Compose(scan.image, scan.image), scan.lungs),
        (scan.image, sitk.Cast(scan.lungs, sitk.sitkLabelUInt8)),
        (scan.image, sitk.GetArrayFromImage(scan.lungs)),
    ):
        with pytest.raises(ParameterError, match=r"dimensions of type|not a SimpleITK image"):
            extract_features(image, mask)
    with pytest.raises(ParameterError, match="n_jobs is 0"):
        extract_features(scan.image, scan.lungs, n_jobs=0)
    with pytest.raises(ParameterError, match=r"'slow'.*fast, pyradiomics"):
        extract_features(scan.image, scan.lungs, "slow")
    with pytest.raises(DataError, match="fills the whole image"):
        extract_features(*scan_of(np.full((9, 9, 9), 100), np.ones((9, 9, 9), bool)))
    line = sitk.GetArrayFromImage(scan.lungs) * 0
    line[20, 30, 10:40] = 1
    mask = sitk.GetImageFromArray(line)
    mask.CopyInformation(scan.lungs)
    with pytest.raises(DataError, match="one line"):
        extract_features(scan.image, mask)
    damaged = sitk.GetArrayFromImage(scan.image).astype(np.float32)
    damaged[sitk.GetArrayFromImage(scan.lungs) == 0] = np.inf
    image = sitk.GetImageFromArray(damaged)
    image.CopyInformation(scan.image)
    assert extract_features(image, scan.lungs).equals(extract_features(scan.image, scan.lungs))
    damaged[sitk.GetArrayFromImage(scan.lungs) > 0] = np.nan
    image = sitk.GetImageFromArray(damaged)
    image.CopyInformation(scan.image)
    with pytest.raises(DataError, match="not numbers"):
        extract_features(image, scan.lungs)
