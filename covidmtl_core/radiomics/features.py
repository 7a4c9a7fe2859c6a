"""The 375 lung features of section 4.1, by pyradiomics."""

import logging

import numpy as np
import pandas as pd
import SimpleITK as sitk

from covidmtl_core.ct import same_grid
from covidmtl_core.errors import DataError, MissingDependencyError
from covidmtl_core.radiomics.names import FEATURE_NAMES, WAVELET_GLCM

BIN_WIDTH = 25
WAVELET = "coif1"

_MARGIN = 8


def extract_features(image: sitk.Image, mask: sitk.Image) -> pd.Series:
    """Features of one pair of lungs, as the authors extracted them (section 4.1).

    They gave pyradiomics the array of HU + 1024 with 0 outside the lungs, without its spacing, and
    took every voxel above 0. Here the array is cropped to the lungs with a margin, which changes
    no value.

    Args:
        image: HU; the paper's voxels are 1 mm.
        mask: The lungs, above 0, in the image's grid.

    Returns:
        float64, indexed by `radiomics.names.FEATURE_NAMES`.

    Raises:
        DataError: The mask is empty or in another grid.
        MissingDependencyError: pyradiomics is not installed.
    """
    try:
        from radiomics.featureextractor import RadiomicsFeatureExtractor
    except ImportError as error:
        raise MissingDependencyError(
            "Extracting features needs pyradiomics: pip install --no-build-isolation "
            "pyradiomics==3.0.1 (with numpy and setuptools installed)."
        ) from error
    if not same_grid(mask, image):
        raise DataError(
            f"The mask, of {mask.GetSize()} voxels, is not in the grid of the image, of "
            f"{image.GetSize()} voxels: resample it first."
        )
    inside = sitk.GetArrayViewFromImage(mask) > 0
    whole = np.rint(sitk.GetArrayViewFromImage(image)).astype(np.int32)
    lungs = np.clip(whole + 1024, 0, 32_767) * inside
    if not lungs.any():
        raise DataError("The mask holds no lung voxel above -1024 HU.")
    volume = sitk.GetImageFromArray(_cropped(lungs).astype(np.int16))
    logging.getLogger("radiomics").setLevel(logging.ERROR)
    extractor = RadiomicsFeatureExtractor(binWidth=BIN_WIDTH)
    extractor.disableAllFeatures()
    for family in ("firstorder", "glcm", "glrlm", "glszm"):
        extractor.enableFeatureClassByName(family)
    found = dict(extractor.execute(volume, sitk.Cast(volume > 0, sitk.sitkUInt8)))
    wavelets = RadiomicsFeatureExtractor(binWidth=BIN_WIDTH)
    wavelets.disableAllImageTypes()
    wavelets.enableImageTypeByName("Wavelet", customArgs={"wavelet": WAVELET})
    wavelets.disableAllFeatures()
    wavelets.enableFeaturesByName(glcm=list(WAVELET_GLCM), glrlm=[])
    found |= wavelets.execute(volume, sitk.Cast(volume > 0, sitk.sitkUInt8))
    named = {
        name.removeprefix("wavelet-").removeprefix("original_"): float(value)
        for name, value in found.items()
        if not name.startswith("diagnostics")
    }
    # Prefixes were dropped on the original image: of three shared names the last, GLSZM's, stays.
    families = ("firstorder_", "glcm_", "glrlm_", "glszm_")
    for family in families:
        for name in [key for key in named if key.startswith(family)]:
            named[name.removeprefix(family)] = named.pop(name)
    return pd.Series(named, dtype=float)[list(FEATURE_NAMES)]


def _cropped(volume: np.ndarray) -> np.ndarray:
    """The lungs with a margin; from even places on, so that the wavelets fall as on the whole."""
    box = []
    for axis in range(3):
        others = tuple(k for k in range(3) if k != axis)
        places = np.flatnonzero(volume.any(axis=others))
        start = max(0, int(places[0]) - _MARGIN) // 2 * 2
        box.append(slice(start, min(volume.shape[axis], int(places[-1]) + 1 + _MARGIN)))
    return volume[tuple(box)]
