"""The loops over voxels of the fast feature extractor, compiled by numba."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Line = NDArray[np.float64]

_LOW = (
    -0.015655728135791993,
    -0.07273261951252645,
    0.3848648468648578,
    0.8525720202116004,
    0.3378976624574818,
    -0.07273261951252645,
)
COIF1_LOW = np.array(_LOW)
"""Decomposition low-pass filter of the wavelet coif1, to the digits that PyWavelets has."""

COIF1_HIGH = np.array([-_LOW[5], _LOW[4], -_LOW[3], _LOW[2], -_LOW[1], _LOW[0]])

_END = np.array([2, 1, 0, 3, 4, 5])
_LOW_AT_END, _HIGH_AT_END = COIF1_LOW[_END], COIF1_HIGH[_END]
"""At the far end of an axis PyWavelets adds the third term first; rounding shows it."""


@njit(nogil=True, cache=True)
def _combine(
    a: Line, b: Line, c: Line, d: Line, e: Line, f: Line, taps: Line, target: Line
) -> None:
    t0, t1, t2, t3, t4, t5 = taps
    for x in range(len(target)):
        target[x] = t0 * a[x] + t1 * b[x] + t2 * c[x] + t3 * d[x] + t4 * e[x] + t5 * f[x]


@njit(nogil=True, cache=True)
def filter_axis(
    source: NDArray[np.float64],
    axis: int,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Undecimated coif1 step along an axis, periodic, for the planes from start to stop.

    Terms are added in the order in which PyWavelets adds them, for the same bits.
    """
    depth, height, width = source.shape
    line = np.empty(width + 5)
    for z in range(start, stop):
        for y in range(height):
            if axis == 2:
                for k in range(2):
                    line[k] = source[z, y, (k - 2) % width]
                line[2 : width + 2] = source[z, y]
                for k in range(3):
                    line[width + 2 + k] = source[z, y, k % width]
                a, b, c, d, e, f = line[5:], line[4:], line[3:], line[2:], line[1:], line
                last = False
            elif axis == 1:
                a, b, c = (
                    source[z, (y + 3) % height],
                    source[z, (y + 2) % height],
                    source[z, (y + 1) % height],
                )
                d, e, f = source[z, y], source[z, (y - 1) % height], source[z, (y - 2) % height]
                last = y == height - 1
            else:
                a, b, c = (
                    source[(z + 3) % depth, y],
                    source[(z + 2) % depth, y],
                    source[(z + 1) % depth, y],
                )
                d, e, f = source[z, y], source[(z - 1) % depth, y], source[(z - 2) % depth, y]
                last = z == depth - 1
            if last:
                _combine(c, b, a, d, e, f, _LOW_AT_END, low[z, y])
                _combine(c, b, a, d, e, f, _HIGH_AT_END, high[z, y])
            else:
                _combine(a, b, c, d, e, f, COIF1_LOW, low[z, y])
                _combine(a, b, c, d, e, f, COIF1_HIGH, high[z, y])
            if axis == 2:
                x = width - 1
                a, b, c, d, e, f = a[x:], b[x:], c[x:], d[x:], e[x:], f[x:]
                _combine(c, b, a, d, e, f, _LOW_AT_END, low[z, y, x:])
                _combine(c, b, a, d, e, f, _HIGH_AT_END, high[z, y, x:])


@njit(nogil=True, cache=True)
def value_range(
    values: NDArray[Any], inside: NDArray[np.bool_], start: int, stop: int
) -> tuple[float, float]:
    """Least and greatest value inside."""
    low, high = np.inf, -np.inf
    for z in range(start, stop):
        for y in range(values.shape[1]):
            for x in range(values.shape[2]):
                if inside[z, y, x]:
                    low = min(low, values[z, y, x])
                    high = max(high, values[z, y, x])
    return low, high


@njit(nogil=True, cache=True)
def discretise(
    values: NDArray[Any],
    inside: NDArray[np.bool_],
    edges: NDArray[np.float64],
    levels: NDArray[np.uint16],
    seen: NDArray[np.bool_],
    start: int,
    stop: int,
) -> None:
    """Grey levels 1, 2, ... of half-open bins, and which are `seen`; a border of 0 stays."""
    width = edges[1] - edges[0]
    for z in range(start, stop):
        for y in range(values.shape[1]):
            for x in range(values.shape[2]):
                if inside[z, y, x]:
                    value = values[z, y, x]
                    k = int((value - edges[0]) / width)
                    while value < edges[k]:
                        k -= 1
                    while value >= edges[k + 1]:
                        k += 1
                    levels[z + 1, y + 1, x + 1] = k + 1
                    seen[k + 1] = True


@njit(nogil=True, cache=True)
def count_pairs_and_runs(
    levels: NDArray[np.uint16],
    steps: NDArray[np.int64],
    pairs: NDArray[np.uint32],
    runs: NDArray[np.uint32],
    start: int,
    stop: int,
) -> None:
    """Add the neighbours (GLCM) and runs (GLRLM) that begin in the planes from start to stop.

    Args:
        levels: Grey levels, 0 outside, with a border of 0.
        steps: For each direction, how far the next voxel lies in the flat array.
        pairs: (directions, levels, levels); of a voxel and the next one.
        runs: (directions, levels, lengths).
        start: First plane inside the border.
        stop: Plane behind the last one.
    """
    flat = levels.ravel()
    _, height, width = levels.shape
    for z in range(start + 1, stop + 1):
        for y in range(1, height - 1):
            base = (z * height + y) * width
            for i in range(base + 1, base + width - 1):
                level = flat[i]
                if level == 0:
                    continue
                for k in range(len(steps)):
                    step = steps[k]
                    following = flat[i + step]
                    if following:
                        pairs[k, level - 1, following - 1] += 1
                    if flat[i - step] != level:
                        end = i + step
                        while flat[end] == level:
                            end += step
                        runs[k, level - 1, (end - i) // step - 1] += 1
