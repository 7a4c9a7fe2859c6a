"""The released segmentation (Algorithm 1) in plain scikit-image, one thread, nothing clever.

The reference that `segment_lungs(method="released")` must equal voxel by voxel, and the baseline of
its speed. Volumes are HU + 1024 at 1 mm, (z, y, x).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure, morphology, segmentation


def classical(volume: NDArray[np.int16]) -> NDArray[np.bool_]:
    """The start of Algorithm 1: thresholding and connected regions (reference [25])."""
    air = volume < 604
    for plane in air:
        plane[:] = segmentation.clear_border(plane)
    solid = ~air
    components = measure.label(solid)
    for corner in (components[0, 0, 0], components[-1, -1, -1]):
        solid |= components == corner
    lungs = np.zeros_like(air)
    for plane, solid_plane in zip(lungs, solid, strict=True):
        regions = measure.label(solid_plane)
        plane[:] = regions != largest(regions)
    components = measure.label(lungs)
    return components == largest(components) if components.any() else lungs


def largest(labels: NDArray[np.int64]) -> int:
    """The label with the most voxels, 0 aside."""
    values, counts = np.unique(labels[labels != 0], return_counts=True)
    return int(values[counts.argmax()]) if len(values) else -1


def refine(volume: NDArray[np.int16], lungs: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The active contours of Algorithm 1, slice by slice."""
    refined = np.zeros_like(lungs)
    for index, plane in enumerate(lungs):
        if not plane.any():
            continue
        regions = by_area(plane)
        if len(regions) < 2 or plane.sum() < 15_000:
            refined[index] = morphology.binary_closing(plane, morphology.disk(5))
            continue
        grown = plane.copy()
        for lung in (regions[0], plane & ~regions[0]):
            grown |= outline(volume[index], morphology.binary_closing(lung, morphology.disk(10)))
        for lung in by_area(grown)[:2]:
            eroded = morphology.binary_erosion(lung, morphology.disk(2))
            refined[index] |= morphology.binary_closing(eroded, morphology.disk(10))
    return refined


def by_area(plane: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The regions of a slice, largest first."""
    labels = measure.label(plane)
    order = sorted(measure.regionprops(labels), key=lambda region: -region.area)
    return [labels == region.label for region in order]


def outline(image: NDArray[np.int16], lung: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What the snakes enclose that start on the outlines of one closed lung."""
    drawn = np.zeros_like(lung)
    masked = image * lung
    for contour in measure.find_contours(lung, 0.8):
        snake = segmentation.active_contour(masked, contour, alpha=0.02, beta=20, max_num_iter=20)
        rows, columns = snake.astype(int).T
        drawn[rows, columns] = True
    return ndimage.binary_fill_holes(drawn)
