"""Histograms of oriented gradients, the features that Table 9 compares with (section 7)."""

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.radiomics.features import check_mask

ORIENTATIONS = 32
CELLS = (10, 12)
"""Cells along y and x."""

CELL_MM = 32.0

N_COMPONENTS = 375


def extract_hog(image: sitk.Image, mask: sitk.Image) -> NDArray[np.float64]:
    """Gradient orientations in the axial slice in which the lungs are largest.

    Over half a turn, rise and fall alike, each weighted by its steepness. The paper prints the
    number of orientations only. Here the slice, HU + 1024 with 0 outside the lungs, lies in a frame
    of 320 x 384 mm around them, with cells of 32 mm and blocks of 2 x 2 cells (Dalal and Triggs
    2005).

    Args:
        image: HU, axial.
        mask: The lungs, above 0, in the image's grid.

    Returns:
        (12672,): the blocks' histograms, of the same length for every scan.

    Raises:
        DataError: The mask is empty or in another grid, or lung voxels are not numbers.
    """
    from skimage.feature import hog

    check_mask(image, mask)
    inside = sitk.GetArrayViewFromImage(mask) > 0
    z = int(inside.sum(axis=(1, 2)).argmax())
    plane = np.where(inside[z], sitk.GetArrayViewFromImage(image)[z] + 1024.0, 0).clip(0)
    if not np.isfinite(plane).all():
        raise DataError("The image holds values inside the lungs that are not numbers.")
    cell = [max(2, round(CELL_MM / s)) for s in image.GetSpacing()[1::-1]]
    frame = np.zeros([n * c for n, c in zip(CELLS, cell, strict=True)])
    source, target = [], []
    for axis, size in enumerate(frame.shape):
        places = np.flatnonzero(inside[z].any(axis=1 - axis))
        shift = size // 2 - int(places[[0, -1]].mean())
        low, high = max(0, -shift), min(plane.shape[axis], size - shift)
        source.append(slice(low, high))
        target.append(slice(low + shift, high + shift))
    frame[tuple(target)] = plane[tuple(source)]
    found: NDArray[np.float64] = hog(
        frame, orientations=ORIENTATIONS, pixels_per_cell=cell, cells_per_block=(2, 2)
    )
    return found


def reduce_hog(
    train: NDArray[np.float64], *others: NDArray[np.float64]
) -> tuple[NDArray[np.float64], ...]:
    """Principal components of the training patients' histograms, for these and for others.

    Args:
        train: (patients, values); the components are fitted on these alone.
        others: (patients, values) each.

    Returns:
        Of each table its min(375, training patients) components.

    Raises:
        ParameterError: There are fewer than two training patients.
    """
    from sklearn.decomposition import PCA

    if len(train) < 2:
        raise ParameterError(f"{len(train)} training patients; components need two at least.")
    pca = PCA(n_components=min(N_COMPONENTS, *np.shape(train)), svd_solver="full").fit(train)
    return tuple(pca.transform(table) for table in (train, *others))
