"""Algorithm 1 as the authors released it, voxel by voxel, at many times its speed.

Same results by other means: closings by running sums, snakes whose circulant matrix is
inverted by Fourier transform and whose splines are evaluated for all contours of a slice at once.
`tests/benchmarks/plain_segmentation.py` is the same algorithm in plain scikit-image.
"""

import math
from itertools import pairwise
from typing import Any

import cc3d
import numpy as np
from joblib import Parallel, cpu_count, delayed
from numpy.typing import NDArray
from scipy import fft, ndimage
from skimage.filters import sobel
from skimage.measure import find_contours

from covidmtl_core.boxes import bounds

Mask = NDArray[np.bool_]

AIR_BELOW = 604
"""HU + 1024: below, a voxel is air (-420 HU)."""

_MARGIN = 24
"""Pixels around the lungs beyond which nothing influences them (closings of 10, splines)."""


def classical(volume: NDArray[np.int16]) -> Mask:
    """The start of Algorithm 1: thresholding and connected regions (reference [25]).

    Args:
        volume: HU + 1024, (z, y, x), at 1 mm.

    Returns:
        Lungs, airways included; the largest connected region only.
    """
    lungs = np.zeros(volume.shape, bool)
    for plane, lung in zip(volume, lungs, strict=True):
        labels = _regions(plane < AIR_BELOW)
        inner = np.ones(labels.max() + 1, bool)
        inner[0] = False
        for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
            inner[edge] = False
        if not inner.any():
            continue
        labels = _regions(~inner[labels])
        around = labels == labels[0, 0]
        if 2 * np.count_nonzero(around) <= around.size:
            around = labels == _by_area(labels)[0]
        np.logical_not(around, out=lung)
    if lungs.any():
        box = bounds(lungs)
        labels = cc3d.connected_components(lungs[box], connectivity=26)
        if labels.max() > 1:
            lungs[box] = labels == _by_area(labels)[0]
    return lungs


def refine(volume: NDArray[np.int16], lungs: Mask, n_jobs: int | None = None) -> Mask:
    """The active contours of Algorithm 1, slice by slice, in parallel processes.

    Args:
        volume: HU + 1024, (z, y, x), at 1 mm.
        lungs: From `classical`.
        n_jobs: Processes; None takes one for each core.
    """
    refined = np.zeros_like(lungs)
    if not lungs.any():
        return refined
    planes, rows, columns = bounds(lungs, (0, _MARGIN, _MARGIN))
    jobs = n_jobs or cpu_count()
    cuts = np.linspace(planes.start, planes.stop, 8 * jobs + 1).astype(int).tolist()
    batches = [slice(a, b) for a, b in pairwise(cuts) if b > a]
    done = Parallel(n_jobs=jobs, max_nbytes=None)(
        delayed(_refine_slices)(volume[b, rows, columns], lungs[b, rows, columns]) for b in batches
    )
    for batch, made in zip(batches, done, strict=True):
        refined[batch, rows, columns] = made
    return refined


def _refine_slices(volume: NDArray[np.int16], lungs: Mask) -> Mask:
    return np.stack([_refine_slice(*planes) for planes in zip(volume, lungs, strict=True)])


def _refine_slice(image: NDArray[np.int16], plane: Mask) -> Mask:
    labels = _regions(plane)
    order = _by_area(labels)
    if len(order) < 2 or plane.sum() < 15_000:
        return closed(plane, 5)
    first = labels == order[0]
    grown = plane.copy()
    lungs = [closed(lung, 10) for lung in (first, plane & ~first)]
    for outline in _outlines(image, lungs):
        grown |= outline
    labels = _regions(grown)
    refined = np.zeros_like(plane)
    for label in _by_area(labels)[:2]:
        lung = labels == label
        box = bounds(lung, 12)
        refined[box] |= closed(_eroded(lung[box], 2), 10)
    return refined


def closed(mask: Mask, radius: int) -> Mask:
    """Closing with a disk; beyond the border lies nothing."""
    if not mask.any():
        return mask.copy()
    box = bounds(mask, radius + 1)
    result = np.zeros_like(mask)
    result[box] = _eroded(_dilated(mask[box], radius), radius)
    return result


def _regions(plane: Mask) -> NDArray[Any]:
    """Regions of a slice that touch at sides or corners.

    As a volume of one slice: in 2D cc3d 4.1.1 mislabels masks of odd width at connectivity 8.
    """
    return cc3d.connected_components(plane[None], connectivity=26)[0]


def _dilated(mask: Mask, radius: int) -> Mask:
    """Dilation with a disk: each of its rows asks running sums whether a stretch holds anything."""
    rows, columns = mask.shape
    sums = np.zeros((rows + 2 * radius, columns + 2 * radius + 1), np.int32)
    np.cumsum(np.pad(mask, radius), axis=1, out=sums[:, 1:])
    result = np.zeros_like(mask)
    for shift in range(-radius, radius + 1):
        half = math.isqrt(radius * radius - shift * shift)
        lines = sums[radius + shift : radius + shift + rows]
        before, after = lines[:, radius - half :], lines[:, radius + half + 1 :]
        result |= before[:, :columns] != after[:, :columns]
    return result


def _eroded(mask: Mask, radius: int) -> Mask:
    """Erosion with a disk; the border does not erode."""
    return ~_dilated(~mask, radius)


def _by_area(labels: NDArray[np.integer]) -> NDArray[np.intp]:
    """Labels from the largest region to the smallest; of equals, the one that starts first."""
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    if len(order) > 1 and counts[order[0]] == counts[order[1]]:
        tied = order[counts[order] == counts[order[0]]]
        starts = [int((labels == label).argmax()) for label in tied]
        order[: len(tied)] = tied[np.argsort(starts)]
    return order


def _outlines(image: NDArray[np.int16], lungs: list[Mask]) -> list[Mask]:
    """What the snakes enclose that start on the outlines of each closed lung of a slice."""
    contours = [find_contours(lung, 0.8) for lung in lungs]
    owner = [k for k, found in enumerate(contours) for _ in found]
    starts = [contour for found in contours for contour in found]
    snakes = _settle(np.stack([_edges(image, lung) for lung in lungs]), starts, owner)
    outlines = []
    for k, lung in enumerate(lungs):
        drawn = np.zeros(np.add(lung.shape, 2), bool)
        for snake in (snakes[i] for i, number in enumerate(owner) if number == k):
            rows, columns = snake.astype(int).T
            drawn[rows + 1, columns + 1] = True
        outside = cc3d.connected_components(~drawn, connectivity=4)
        outlines.append((outside != outside[0, 0])[1:-1, 1:-1])
    return outlines


def _edges(image: NDArray[np.int16], lung: Mask) -> NDArray[np.float64]:
    """Quadratic spline of the edge image that pulls the snakes.

    The intensities count as parts of the 16-bit range, as the released code has it; this makes
    the pull tiny.
    """
    coefficients = np.zeros(lung.shape)
    box = bounds(lung, 16)
    scaled = (2.0 * (image[box] * lung[box]) + 1) / 65_535
    coefficients[box] = ndimage.spline_filter(sobel(scaled), order=2, mode="mirror")
    return coefficients


def _settle(
    coefficients: NDArray[np.float64],
    starts: list[NDArray[np.float64]],
    owner: list[int],
    alpha: float = 0.02,
    beta: float = 20.0,
    gamma: float = 0.01,
    steps: int = 20,
) -> list[NDArray[np.float64]]:
    """Active contours (Kass et al.) from closed starts, all at once.

    Defaults of scikit-image's `active_contour` but for alpha, beta and the number of steps; after
    ten steps a contour that came back to within 0.1 pixel of an earlier place stops.

    Args:
        coefficients: (lungs, rows, columns) spline of each lung's edge image.
        starts: Contours (n, 2), rows and columns.
        owner: Each contour's lung.

    Returns:
        Settled contours.
    """
    if not starts:
        return []
    lengths = [len(start) for start in starts]
    ends = np.cumsum(lengths)
    parts = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    rows, columns = np.concatenate(starts).T
    snake: NDArray[np.complex128] = rows + 1j * columns
    lung = np.repeat(owner, lengths)
    smooth = {n: _inverse(n, alpha, beta, gamma) for n in set(lengths)}
    active = list(range(len(starts)))
    history: list[NDArray[np.complex128]] = []
    for step in range(steps):
        pulled = gamma * snake + _pull(coefficients, lung, snake)
        moved = snake.copy()
        for i in active:
            part = parts[i]
            moved[part] = fft.ifft(fft.fft(pulled[part]) * smooth[lengths[i]])
        move = moved - snake
        snake = snake + np.tanh(move.real) + 1j * np.tanh(move.imag)
        if step < 10:
            history.append(snake)
        elif step == 10:
            apart = np.stack(
                [np.abs(d.real) + np.abs(d.imag) for d in (h - snake for h in history)]
            )
            active = [i for i in active if apart[:, parts[i]].max(1).min() >= 0.1]
    return [np.stack([snake[part].real, snake[part].imag], axis=1) for part in parts]


def _inverse(n: int, alpha: float, beta: float, gamma: float) -> NDArray[np.float64]:
    """Spectrum of the inverse of the snake's circulant matrix A + gamma."""
    row = np.zeros(n)
    for offset, value in {
        0: 2 * alpha + 6 * beta + gamma,
        1: -alpha - 4 * beta,
        2: beta,
    }.items():
        for place in {offset % n, -offset % n}:
            row[place] += value
    return 1 / fft.fft(row).real


def _pull(
    coefficients: NDArray[np.float64], lung: NDArray[np.intp], places: NDArray[np.complex128]
) -> NDArray[np.complex128]:
    """Gradient of the spline at row + 1j * column of each lung."""
    _, n_rows, n_columns = coefficients.shape
    rows, columns = places.real, places.imag
    row = np.clip(np.floor(rows + 0.5).astype(int), 1, n_rows - 2)
    column = np.clip(np.floor(columns + 0.5).astype(int), 1, n_columns - 2)
    values_r, slopes_r = _weights(rows - row)
    values_c, slopes_c = _weights(columns - column)
    base = (lung * n_rows + row) * n_columns + column
    flat = coefficients.ravel()
    down = np.zeros(len(places))
    across = np.zeros(len(places))
    for i in range(3):
        line = [flat[base + (i - 1) * n_columns + j - 1] for j in range(3)]
        down += slopes_r[i] * sum(value * c for value, c in zip(values_c, line, strict=True))
        across += values_r[i] * sum(slope * c for slope, c in zip(slopes_c, line, strict=True))
    return down + 1j * across


def _weights(t: NDArray[np.float64]) -> tuple[tuple[NDArray[np.float64], ...], ...]:
    """Values and slopes of the three quadratic B-splines around an offset of -0.5 to 0.5."""
    before, after = 0.5 - t, 0.5 + t
    return (before**2 / 2, 0.75 - t**2, after**2 / 2), (-before, -2 * t, after)
