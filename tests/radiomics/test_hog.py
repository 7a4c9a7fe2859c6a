import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.radiomics.hog import extract_hog, reduce_hog


def scan_of(plane: NDArray[np.float64], spacing: float = 2.0) -> tuple[sitk.Image, sitk.Image]:
    """Three slices; the plane, HU + 1024, is the one with the largest lung."""
    voxels = np.zeros((3, *plane.shape), np.int16)
    voxels[1] = plane
    voxels[2, 50:60, 50:60] = 900
    image = sitk.GetImageFromArray(voxels - np.int16(1024))
    mask = sitk.GetImageFromArray((voxels > 0).astype(np.uint8))
    for made in (image, mask):
        made.SetSpacing((spacing, spacing, 5.0))
    return image, mask


def ramp(rows: bool, size: int = 160) -> NDArray[np.float64]:
    plane = np.zeros((size, size))
    line = np.linspace(100, 900, size - 40)
    plane[20:-20, 20:-20] = line[:, None] if rows else line
    return plane


def test_one_gradient_fills_one_orientation() -> None:
    for rows in (True, False):
        found = extract_hog(*scan_of(ramp(rows))).reshape(9, 11, 2, 2, 32)
        middle = found[4, 5].sum(axis=(0, 1))
        assert middle.argmax() == (16 if rows else 0) and middle.max() > 0.9 * middle.sum()


def test_neither_place_nor_field_of_view_matters() -> None:
    image, mask = scan_of(ramp(True))
    wider = [sitk.ConstantPad(i, (16, 3, 0), (40, 60, 1), 0) for i in (image, mask)]
    assert_allclose(extract_hog(*wider), extract_hog(image, mask))
    fine = extract_hog(*scan_of(np.kron(ramp(True), np.ones((2, 2))), 1.0))
    assert fine.shape == extract_hog(image, mask).shape == (12_672,)


def test_lungs_larger_than_the_frame_are_cut() -> None:
    assert np.isfinite(extract_hog(*scan_of(ramp(True, 300)))).all()


def test_unusable_scans_are_named() -> None:
    image, mask = scan_of(ramp(True))
    holed = sitk.Cast(image, sitk.sitkFloat32)
    holed[0, 0, 1] = np.nan
    assert_allclose(extract_hog(holed, mask), extract_hog(image, mask))
    holed[80, 80, 1] = np.nan
    with pytest.raises(DataError, match="not numbers"):
        extract_hog(holed, mask)
    with pytest.raises(DataError, match="empty"):
        extract_hog(image, mask * 0)


def test_components_come_from_the_training_patients_alone() -> None:
    rng = np.random.default_rng(2)
    train, test = rng.normal(size=(12, 40)), rng.normal(size=(5, 40))
    reduced, other = reduce_hog(train, test)
    assert reduced.shape == (12, 12) and other.shape == (5, 12)
    again, _ = reduce_hog(train, 100 * test)
    assert_allclose(reduced, again)
    distances = [np.linalg.norm(t[:, None] - t, axis=2) for t in (train, reduced)]
    assert_allclose(*distances, atol=1e-9)
    many = reduce_hog(rng.normal(size=(400, 500)))[0]
    assert many.shape == (400, 375)
    with pytest.raises(ParameterError, match="two at least"):
        reduce_hog(train[:1])
