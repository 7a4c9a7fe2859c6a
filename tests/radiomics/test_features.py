import numpy as np
import pytest
import SimpleITK as sitk

from covidmtl_core.errors import DataError
from covidmtl_core.phantom import draw_patient, make_phantom
from covidmtl_core.radiomics.features import extract_features
from covidmtl_core.radiomics.names import FEATURE_NAMES

pytest.importorskip("radiomics", reason="pyradiomics is not installed")


@pytest.fixture(scope="module")
def scan():  # type: ignore[no-untyped-def]
    return make_phantom(draw_patient(6, 0.1), (44, 50, 50), 8.0)


def test_names_order_and_the_collision(scan) -> None:  # type: ignore[no-untyped-def]
    from radiomics.glszm import RadiomicsGLSZM

    found = extract_features(scan.image, scan.lungs)
    assert tuple(found.index) == FEATURE_NAMES and np.isfinite(found).all()
    values = (sitk.GetArrayFromImage(scan.image) + 1024) * (sitk.GetArrayFromImage(scan.lungs) > 0)
    volume = sitk.GetImageFromArray(values.astype(np.int16))
    zones = RadiomicsGLSZM(volume, sitk.Cast(volume > 0, sitk.sitkUInt8), binWidth=25)
    zones.enableFeatureByName("GrayLevelVariance")
    expected = float(zones.execute()["GrayLevelVariance"])
    assert found["GrayLevelVariance"] == pytest.approx(expected, rel=1e-12)


def test_cropping_changes_no_value(scan) -> None:  # type: ignore[no-untyped-def]
    grid = scan.image.GetSize()
    wider = [sitk.ConstantPad(i, (24, 10, 6), (10, 24, 32), 0) for i in (scan.image, scan.lungs)]
    assert wider[0].GetSize() != grid
    wide, narrow = extract_features(*wider), extract_features(scan.image, scan.lungs)
    np.testing.assert_allclose(wide, narrow, rtol=1e-12)


def test_empty_and_misplaced_masks_are_named(scan) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="no lung voxel"):
        extract_features(scan.image, scan.lungs * 0)
    with pytest.raises(DataError, match="voxels"):
        extract_features(scan.image, scan.lungs[1:])
