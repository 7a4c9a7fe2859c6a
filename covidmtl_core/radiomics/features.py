"""The 375 lung features of section 4.1."""

import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import pandas as pd
import SimpleITK as sitk
from numpy.typing import NDArray

from covidmtl_core.boxes import bounds
from covidmtl_core.ct import check_image, same_grid
from covidmtl_core.errors import DataError, MissingDependencyError, ParameterError
from covidmtl_core.radiomics.names import FEATURE_NAMES, WAVELET_GLCM

BACKENDS = ("fast", "pyradiomics")

BIN_WIDTH = 25
WAVELET = "coif1"

HIGHEST = 32_700
"""Of HU + 1024; larger values count as this, since pyradiomics' 16-bit bin edges overflow."""

_MARGIN = 4
"""Voxels around the lungs; the wavelet reaches three."""


def extract_features(
    image: sitk.Image, mask: sitk.Image, backend: str = "fast", n_jobs: int | None = None
) -> pd.Series:
    """Features of one pair of lungs, as the authors extracted them (section 4.1).

    They gave pyradiomics the array of HU + 1024 with 0 outside the lungs, without its spacing, and
    took every voxel above 0. Here the array is cropped to the lungs, which changes no value.

    Args:
        image: HU; axial, upright (LPS) and in voxels of 1 mm for the paper's numbers: sub-bands and
            textures know directions and neighbours, not mm.
        mask: The lungs, above 0, in the image's grid.
        backend: `fast`, compiled loops; or `pyradiomics`, the reference, whose values they equal.
        n_jobs: Threads of `fast`; None takes one for each core.

    Returns:
        float64, indexed by `radiomics.names.FEATURE_NAMES`. Textures without a pair of neighbours
        or a run in any direction are NaN.

    Raises:
        DataError: The mask is empty, fills the image, lies on one line or is in another grid; or
            lung voxels are not numbers or lie below -1024 HU.
        MissingDependencyError: The backend's package is not installed.
        ParameterError: The backend is unknown, or these are not 3D images of one number a voxel.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ParameterError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    if n_jobs is not None and (not isinstance(n_jobs, int) or n_jobs < 1):
        raise ParameterError(f"n_jobs is {n_jobs!r}; give a number from 1, or None.")
    lungs = masked_lungs(image, mask)
    if backend == "pyradiomics":
        found = _by_pyradiomics(lungs)
    else:
        found = _kernels().extract(lungs, BIN_WIDTH, n_jobs)
    return pd.Series(found, dtype=float)[list(FEATURE_NAMES)]


def overwritten_features(image: sitk.Image, mask: sitk.Image) -> pd.Series:
    """The three run-length (GLRLM) values that the released table lost to zones (GLSZM).

    Args, errors: as `extract_features`.

    Returns:
        float64, by name; the same names hold the zones' values in `extract_features`.
    """
    lost = _kernels().overwritten(masked_lungs(image, mask), BIN_WIDTH)
    return pd.Series(lost, dtype=float)


def sub_bands(image: sitk.Image, mask: sitk.Image) -> dict[str, NDArray[np.float64]]:
    """The wavelet sub-bands that textures are measured in.

    Args, errors: as `extract_features`.

    Returns:
        By name (letters for x, y and z; L low-pass, H high-pass), each (z, y, x), on the lungs'
        box with its margin, as `masked_lungs` returns it.
    """
    with ThreadPoolExecutor() as pool:
        return dict(_kernels().sub_bands(masked_lungs(image, mask), pool))


def masked_lungs(image: sitk.Image, mask: sitk.Image) -> NDArray[np.int16]:
    """HU + 1024 of the lungs, 0 outside, cropped with a margin; what the authors extracted from.

    Raises:
        DataError: As `extract_features`.
    """
    check_mask(image, mask)
    inside = sitk.GetArrayViewFromImage(mask) > 0
    # Odd where the whole is odd: the wavelets continue an odd axis.
    box = tuple(
        slice(s.start, s.stop + (n - (s.stop - s.start)) % 2 * (s.stop < n))
        for s, n in zip(bounds(inside, _MARGIN), inside.shape, strict=True)
    )
    values = np.where(inside[box], sitk.GetArrayViewFromImage(image)[box], 0).astype(float)
    if not np.isfinite(values).all():
        raise DataError("The image holds values inside the lungs that are not numbers.")
    lungs = (np.clip(np.rint(values) + 1024, 0, HIGHEST) * inside[box]).astype(np.int16)
    if lungs.all():
        raise DataError("The mask fills the whole image; the wavelets need what lies around.")
    spans = [np.ptp(places) for places in np.nonzero(lungs)] if lungs.any() else []
    if sum(span > 0 for span in spans) < 2:
        raise DataError(
            "The mask holds no lung voxel above -1024 HU."
            if not spans
            else "The lung voxels of the mask lie on one line; textures need an area at least."
        )
    return lungs


def check_mask(image: sitk.Image, mask: sitk.Image) -> None:
    """Refuse a mask that is empty or in another grid than the image.

    Raises:
        DataError: It is.
        ParameterError: These are not two 3D images with one real number a voxel.
    """
    check_image(image)
    check_image(mask, "mask")
    if not same_grid(mask, image):
        raise DataError(
            f"The mask, of {mask.GetSize()} voxels, is not in the grid of the image, of "
            f"{image.GetSize()} voxels: resample it first."
        )
    if not (sitk.GetArrayViewFromImage(mask) > 0).any():
        raise DataError("The mask is empty: it holds no lung voxel.")


def _kernels() -> ModuleType:
    """The fast extractor, whose packages only some users have."""
    try:
        from covidmtl_core.radiomics import _fast
    except ImportError as error:
        raise MissingDependencyError(
            "Extracting features needs numba, connected-components-3d and joblib: "
            "pip install covidmtl-core[volumes]."
        ) from error
    return _fast


def _by_pyradiomics(lungs: NDArray[np.int16]) -> dict[str, float]:
    try:
        from radiomics.featureextractor import RadiomicsFeatureExtractor
    except ImportError as error:
        raise MissingDependencyError(
            "The backend 'pyradiomics' needs it: pip install --no-build-isolation "
            "pyradiomics==3.0.1 (with numpy and setuptools installed)."
        ) from error
    volume = sitk.GetImageFromArray(lungs)
    inside = sitk.Cast(volume > 0, sitk.sitkUInt8)
    logging.getLogger("radiomics").setLevel(logging.ERROR)
    extractor = RadiomicsFeatureExtractor(binWidth=BIN_WIDTH)
    extractor.disableAllFeatures()
    for family in ("firstorder", "glcm", "glrlm", "glszm"):
        extractor.enableFeatureClassByName(family)
    wavelets = RadiomicsFeatureExtractor(binWidth=BIN_WIDTH)
    wavelets.disableAllImageTypes()
    wavelets.enableImageTypeByName("Wavelet", customArgs={"wavelet": WAVELET})
    wavelets.disableAllFeatures()
    wavelets.enableFeaturesByName(glcm=list(WAVELET_GLCM), glrlm=[])
    with warnings.catch_warnings():  # undefined textures: they come out as NaN
        warnings.simplefilter("ignore")
        found = {**extractor.execute(volume, inside), **wavelets.execute(volume, inside)}
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
    return named
