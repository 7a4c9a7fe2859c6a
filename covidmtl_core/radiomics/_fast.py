"""The 375 features by compiled loops: pyradiomics' definitions and results, none of its code.

Definitions: documentation of pyradiomics 3.0.1 (van Griethuysen et al. 2017). Counts have
pyradiomics' order of axes, (levels, levels or lengths, directions), so that sums round alike.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import cc3d
import numpy as np
from joblib import cpu_count
from numpy.typing import NDArray

from covidmtl_core.boxes import bounds
from covidmtl_core.radiomics import _kernels
from covidmtl_core.radiomics.names import GLCM, GLRLM, GLSZM

Values = NDArray[Any]
Mask = NDArray[np.bool_]
Features = dict[str, float]

EPSILON = float(np.spacing(1))

_PARTS = 8
"""Shares of the planes that threads work on."""

DIRECTIONS = np.array(
    [(z, y, x) for z in (0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (z, y, x) > (0, 0, 0)]
)
"""The 13 directions to neighbours, (z, y, x)."""


@np.errstate(divide="ignore", invalid="ignore")
def extract(volume: NDArray[np.int16], bin_width: float, n_jobs: int | None = None) -> Features:
    """All features, by released name.

    Args:
        volume: HU + 1024 of the lungs and what little is needed around them, 0 outside.
        bin_width: Width of a grey level.
        n_jobs: Threads; None takes one for each core.
    """
    inside = volume > 0
    box = bounds(inside)
    inside = np.ascontiguousarray(inside[box])
    with ThreadPoolExecutor(n_jobs or cpu_count()) as pool:
        kept = np.array([_meets_twice(inside, d) for d in DIRECTIONS])
        image, levels = _discretised(volume[box], inside, bin_width, pool)
        counts = np.bincount(image.ravel())[1:]
        found = _first_order(volume[box][inside], counts / counts.sum())
        pairs, runs = _counted(image, len(levels), pool)
        found |= _of_pairs(pairs, levels) | _of_runs(runs, levels, kept)
        found |= _of_zones(image[1:-1, 1:-1, 1:-1], levels)
        for band, values in sub_bands(volume, pool):
            image, levels = _discretised(values[box], inside, bin_width, pool)
            pairs, runs = _counted(image, len(levels), pool)
            textures = _of_pairs(pairs, levels, with_mcc=False)
            found |= {f"{band}_glcm_{name}": value for name, value in textures.items()}
            textures = _of_runs(runs, levels, kept)
            found |= {f"{band}_glrlm_{name}": value for name, value in textures.items()}
    return found


def overwritten(volume: NDArray[np.int16], bin_width: float, n_jobs: int | None = None) -> Features:
    """The run-length features of the image whose names the zones share, from `volume` above."""
    inside = volume > 0
    box = bounds(inside)
    inside = np.ascontiguousarray(inside[box])
    with ThreadPoolExecutor(n_jobs or cpu_count()) as pool:
        image, levels = _discretised(volume[box], inside, bin_width, pool)
        _, runs = _counted(image, len(levels), pool)
    kept = np.array([_meets_twice(inside, d) for d in DIRECTIONS])
    found = _of_runs(runs, levels, kept)
    return {name: found[name] for name in GLRLM if name in GLSZM}


# --- voxels to counts ---------------------------------------------------------------------------


def sub_bands(volume: Values, pool: ThreadPoolExecutor) -> Iterator[tuple[str, Values]]:
    """Sub-bands of one level of the undecimated wavelet transform; letters for x, y and z.

    An odd axis is continued by its first plane, as pyradiomics does.
    """
    shape = tuple(slice(n) for n in volume.shape)
    whole = np.pad(volume.astype(float), [(0, n % 2) for n in volume.shape], mode="wrap")

    def split(source: Values, axis: int) -> Iterator[tuple[str, Values]]:
        low, high = np.empty_like(source), np.empty_like(source)
        _planewise(pool, _kernels.filter_axis, len(source), source, axis, low, high)
        yield "L", low
        del low
        yield "H", high

    for first, x in split(whole, 2):
        for second, y in split(x, 1):
            for third, z in split(y, 0):
                yield first + second + third, z[shape]


def _discretised(
    values: Values, inside: Mask, bin_width: float, pool: ThreadPoolExecutor
) -> tuple[NDArray[np.uint16], Values]:
    """Numbers 1, 2, ... of the grey levels that occur, with a border of 0; and these levels.

    Bins start at a multiple of their width.
    """
    ranges = _planewise(pool, _kernels.value_range, len(values), values, inside)
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    edges = np.arange(low - low % bin_width, high + 2 * bin_width, bin_width)
    image = np.zeros(np.add(values.shape, 2), np.uint16)
    seen = np.zeros(len(edges) + 1, bool)
    _planewise(pool, _kernels.discretise, len(values), values, inside, edges, image, seen)
    levels = np.flatnonzero(seen)
    if len(levels) < levels[-1]:
        numbers = np.zeros(len(seen), np.uint16)
        numbers[levels] = np.arange(1, len(levels) + 1)
        image = numbers[image]
    return image, levels


def _counted(
    image: NDArray[np.uint16], n_levels: int, pool: ThreadPoolExecutor
) -> tuple[Values, Values]:
    """Neighbours (levels, levels, 13) and runs (levels, lengths, 13)."""
    steps = DIRECTIONS @ np.array([n // image.itemsize for n in image.strides])
    longest = max(image.shape) - 2

    def part(cut: tuple[int, int]) -> tuple[Values, Values]:
        pairs = np.zeros((len(steps), n_levels, n_levels), np.uint32)
        runs = np.zeros((len(steps), n_levels, longest), np.uint32)
        _kernels.count_pairs_and_runs(image, steps, pairs, runs, *cut)
        return pairs, runs

    (pairs, runs), *others = pool.map(part, _cuts(len(image) - 2))
    for more_pairs, more_runs in others:
        pairs += more_pairs
        runs += more_runs
    return (
        np.ascontiguousarray(pairs.transpose(1, 2, 0), dtype=float),
        np.ascontiguousarray(runs.transpose(1, 2, 0), dtype=float),
    )


def _planewise(
    pool: ThreadPoolExecutor, kernel: Callable[..., Any], planes: int, *arguments: Any
) -> list[Any]:
    """What a kernel returns for each share of the planes."""
    return list(pool.map(lambda cut: kernel(*arguments, *cut), _cuts(planes)))


def _cuts(planes: int) -> list[tuple[int, int]]:
    places = np.linspace(0, planes, _PARTS + 1).astype(int).tolist()
    return [(a, b) for a, b in pairwise(places) if b > a]


# --- counts to features -------------------------------------------------------------------------


def _first_order(values: Values, shares: Values) -> Features:
    """Measures of the distribution of the voxels' values and of the grey levels' shares."""
    counts = np.bincount(values)
    x = np.flatnonzero(counts)
    n = counts[x]
    total = n.sum()
    ranks = np.cumsum(n)

    def percentile(q: float) -> float:
        place = q / 100 * (total - 1)
        low, high = (
            x[np.searchsorted(ranks, rank, side="right")]
            for rank in (np.floor(place), np.ceil(place))
        )
        return float(low + (high - low) * (place % 1))

    def mean(of: Values, weights: Values = n) -> float:
        return float((of * weights).sum() / weights.sum())

    low, high = percentile(10), percentile(90)
    middle = np.where((x >= low) & (x <= high), n, 0)
    centred = x - mean(x)
    variance = mean(centred**2)
    energy = float((x.astype(float) ** 2 * n).sum())
    return {
        "10Percentile": low,
        "90Percentile": high,
        "Energy": energy,
        "Entropy": float(_entropy(shares)),
        "InterquartileRange": percentile(75) - percentile(25),
        "Kurtosis": mean(centred**4) / (variance**2 or 1),
        "Maximum": float(x[-1]),
        "MeanAbsoluteDeviation": mean(np.abs(centred)),
        "Mean": mean(x),
        "Median": percentile(50),
        "Minimum": float(x[0]),
        "Range": float(x[-1] - x[0]),
        "RobustMeanAbsoluteDeviation": mean(np.abs(x - mean(x, middle)), middle),
        "RootMeanSquared": float(np.sqrt(energy / total)),
        "Skewness": mean(centred**3) / (variance**1.5 or 1),
        "TotalEnergy": energy,
        "Uniformity": float((shares**2).sum()),
        "Variance": variance,
    }


def _of_pairs(counts: Values, levels: Values, with_mcc: bool = True) -> Features:
    """Grey level co-occurrence (GLCM), symmetrical; means over the directions.

    Args:
        counts: (levels, levels, directions).
        levels: The grey levels that occur.
        with_mcc: Whether the maximal correlation coefficient is wanted, which takes longest.
    """
    n_levels = int(levels[-1])
    counts = counts + counts.transpose(1, 0, 2)
    counts = counts[:, :, counts.any(axis=(0, 1))]
    if not counts.size:
        return dict.fromkeys(GLCM, np.nan) | ({"MCC": 1.0} if len(levels) < 2 else {})
    p = counts / counts.sum(axis=(0, 1))
    i = levels.astype(float)[:, None, None]
    j = i.transpose(1, 0, 2)
    px, py = p.sum(axis=1, keepdims=True), p.sum(axis=0, keepdims=True)
    ux, uy = (i * p).sum(axis=(0, 1)), (j * p).sum(axis=(0, 1))
    sums, differences = _diagonals(p, levels, n_levels)
    k = np.arange(n_levels, dtype=float)[:, None]
    sigma = np.sqrt((p * (i - ux) ** 2).sum(axis=(0, 1)) * (p * (j - uy) ** 2).sum(axis=(0, 1)))
    covariance = (p * (i - ux) * (j - uy)).sum(axis=(0, 1))
    joint, marginal = _entropy(p), np.fmax(_entropy(px), _entropy(py))
    gap = joint + (p * np.log2(px * py + EPSILON)).sum(axis=(0, 1))
    information = _entropy(px * py) - joint
    mean_difference = (k * differences).sum(axis=0)
    centred = i + j - ux - uy
    found = {
        "Autocorrelation": (p * (i * j)).sum(axis=(0, 1)),
        "ClusterProminence": (p * centred**4).sum(axis=(0, 1)),
        "ClusterShade": (p * centred**3).sum(axis=(0, 1)),
        "ClusterTendency": (p * centred**2).sum(axis=(0, 1)),
        "Contrast": (p * (i - j) ** 2).sum(axis=(0, 1)),
        "Correlation": np.where(sigma == 0, 1, covariance / (sigma + EPSILON)),
        "DifferenceAverage": mean_difference,
        "DifferenceEntropy": _entropy(differences),
        "DifferenceVariance": (differences * (k - mean_difference) ** 2).sum(axis=0),
        "Id": (differences / (1 + k)).sum(axis=0),
        "Idm": (differences / (1 + k**2)).sum(axis=0),
        "Idmn": (differences / (1 + k**2 / n_levels**2)).sum(axis=0),
        "Idn": (differences / (1 + k / n_levels)).sum(axis=0),
        "Imc1": np.where(marginal == 0, 0, gap / np.where(marginal == 0, 1, marginal)),
        "Imc2": np.where(information == 0, 0, np.sqrt(1 - np.exp(-2 * information))),
        "InverseVariance": (differences[1:] / k[1:] ** 2).sum(axis=0),
        "JointAverage": ux,
        "JointEnergy": (p**2).sum(axis=(0, 1)),
        "JointEntropy": joint,
        "MaximumProbability": p.max(axis=(0, 1)),
        "SumAverage": (np.arange(len(sums))[:, None] * sums).sum(axis=0),
        "SumEntropy": _entropy(sums),
        "SumSquares": (p * (i - ux) ** 2).sum(axis=(0, 1)),
    }
    if with_mcc:
        found["MCC"] = _maximal_correlation(p, px[:, 0], py[0])
    return {name: _mean_of_defined(value) for name, value in found.items()}


def _mean_of_defined(values: Values) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else np.nan


def _diagonals(p: Values, levels: Values, n_levels: int) -> tuple[Values, Values]:
    """Probabilities of each sum (2 n + 1, ...) and each difference (n, ...) of two levels."""
    sums = np.zeros((2 * n_levels + 1, p.shape[2]))
    differences = np.zeros((n_levels, p.shape[2]))
    for row, level in zip(p, levels, strict=True):
        sums[level + levels] += row
        np.add.at(differences, np.abs(level - levels), row)
    return sums, differences


def _maximal_correlation(p: Values, px: Values, py: Values) -> Values:
    """Root of the second largest eigenvalue of Q, for each direction."""
    if len(p) < 2:
        return np.ones(1)
    # Added up level by level, as pyradiomics does: where the eigenvalue is 0, rounding decides
    # whether its root is NaN.
    q = np.zeros_like(p)
    for k in range(len(p)):
        q += p[:, None, k] * p[None, :, k] / (px[:, None] * py[None, k] + EPSILON)
    values: Values = np.sqrt(np.sort(np.linalg.eigvals(q.transpose(2, 0, 1)))[:, -2])
    return values.real


def _of_runs(counts: Values, levels: Values, kept: Mask) -> Features:
    """Runs of one grey level (GLRLM); means over the directions.

    Args:
        counts: (levels, lengths, directions).
        levels: The grey levels that occur.
        kept: Which directions count.
    """
    if not kept.any():
        return dict.fromkeys(GLRLM, np.nan)
    counts = counts[:, :, kept]
    lengths = np.flatnonzero(counts.any(axis=(0, 2)))
    counts = counts[:, lengths]
    found = _of_sizes(counts, levels.astype(float), lengths + 1.0, _RUN_WORDS)
    return {name: float(np.mean(value)) for name, value in found.items()}


def _of_zones(volume: NDArray[np.uint16], levels: Values) -> Features:
    """Connected regions of one grey level (GLSZM)."""
    labels = cc3d.connected_components(volume, connectivity=26)
    sizes = np.bincount(labels.ravel())[1:]
    level = np.zeros(len(sizes) + 1, np.uint16)
    level[labels.ravel()] = volume.ravel()
    areas, column = np.unique(sizes, return_inverse=True)
    cell = (level[1:].astype(int) - 1) * len(areas) + column
    counts = np.bincount(cell, minlength=len(levels) * len(areas))
    counts = counts.reshape(len(levels), len(areas), 1)
    found = _of_sizes(counts, levels.astype(float), areas.astype(float), _ZONE_WORDS)
    return {name: float(value[0]) for name, value in found.items()}


_RUN_WORDS = ("Run", "ShortRun", "LongRun", "RunLength")
_ZONE_WORDS = ("Zone", "SmallArea", "LargeArea", "SizeZone")


def _of_sizes(
    counts: Values, levels: Values, sizes: Values, words: tuple[str, str, str, str]
) -> dict[str, Values]:
    """The 16 measures that runs and zones share, from counts (levels, sizes, directions)."""
    unit, small, large, size = words
    i, j = levels[:, None, None], sizes[None, :, None]
    total = counts.sum(axis=(0, 1))
    by_level, by_size = counts.sum(axis=1), counts.sum(axis=0)
    of_level, of_size = by_level / total, by_size / total
    i1, j1 = i[:, 0], j[0]

    def mean(weights: Values) -> Values:
        return np.asarray((counts * weights).sum(axis=(0, 1)) / total)

    return {
        "GrayLevelNonUniformity": (by_level**2).sum(axis=0) / total,
        "GrayLevelNonUniformityNormalized": (by_level**2).sum(axis=0) / total**2,
        "GrayLevelVariance": (of_level * (i1 - (of_level * i1).sum(axis=0)) ** 2).sum(axis=0),
        f"HighGrayLevel{unit}Emphasis": mean(i**2),
        f"LowGrayLevel{unit}Emphasis": mean(1 / i**2),
        f"{large}Emphasis": mean(j**2),
        f"{large}HighGrayLevelEmphasis": mean(i**2 * j**2),
        f"{large}LowGrayLevelEmphasis": mean(j**2 / i**2),
        f"{small}Emphasis": mean(1 / j**2),
        f"{small}HighGrayLevelEmphasis": mean(i**2 / j**2),
        f"{small}LowGrayLevelEmphasis": mean(1 / (i**2 * j**2)),
        f"{size}NonUniformity": (by_size**2).sum(axis=0) / total,
        f"{size}NonUniformityNormalized": (by_size**2).sum(axis=0) / total**2,
        f"{unit}Entropy": _entropy(counts / total),
        f"{unit}Percentage": total / (by_size * j1).sum(axis=0),
        f"{unit}Variance": (of_size * (j1 - (of_size * j1).sum(axis=0)) ** 2).sum(axis=0),
    }


def _meets_twice(inside: Mask, direction: Values) -> bool:
    """Whether a line of voxels in this direction meets the mask in two voxels or more."""
    overlap = [
        tuple(
            slice(max(0, sign * d), n + min(0, sign * d))
            for n, d in zip(inside.shape, direction, strict=True)
        )
        for sign in (1, -1)
    ]
    if (inside[overlap[0]] & inside[overlap[1]]).any():
        return True
    voxels = np.argwhere(inside)
    axis = int(np.flatnonzero(direction)[0])
    lines = voxels - voxels[:, [axis]] * direction
    return len(np.unique(lines, axis=0)) < len(lines)


def _entropy(p: Values) -> Any:
    """Entropy in bits over all axes but the last, or over the only one."""
    axes = tuple(range(p.ndim - 1)) or (0,)
    return -(p * np.log2(p + EPSILON)).sum(axis=axes)
