"""Finding the lungs: the classical method, the authors' refinement of it, and ours.

All lengths are in mm and all areas in mm2; arrays are (z, y, x) with x to the patient's left, y to
the back and z to the head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cc3d
import edt
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from covidmtl_core import _released_segmentation as released
from covidmtl_core.boxes import bounds
from covidmtl_core.ct import check_image, same_grid
from covidmtl_core.errors import DataError, ParameterError

RIGHT, LEFT = 1, 2
"""Labels of the two lungs."""

METHODS = ("classical", "released", "refined")

AIR_BELOW = -420
"""HU below which a voxel is air or aerated lung; half way between lung and soft tissue (paper)."""

WORKING_MM = 2.0
"""Voxel size at which `refined` reasons; the surface is settled at full resolution."""

CLOSING_MM = 8.0
"""Radius of the closing that takes in vessels and small white regions."""

WHITE_CLOSING_MM = 30.0
"""Added to it in a lung of which `WHITE_SHARE` or more is white, in proportion below."""

WHITE_SHARE = 0.125

SPINE_MM = 28.0
"""Half width of spine, aorta and what lies before them, where lungs are not widened."""

WALL_DEPTH_MM = 35.0
"""Thickest white region that is bridged along the chest wall."""

Mask = NDArray[np.bool_]
Segmenter = Callable[[sitk.Image], sitk.Image]


def segment_lungs(
    image: sitk.Image, method: str | Segmenter = "refined", n_jobs: int | None = None
) -> sitk.Image:
    """Label the lungs of a chest CT.

    `classical` is thresholding and connected regions (reference [25] of the paper); `released` adds
    the active contours of Algorithm 1 as the authors' code has them, and both work at 1 mm, keep
    trachea and bronchi and lose a lung that the airways do not join. `refined`, ours, removes the
    airways, keeps both lungs, and takes white regions in: ground glass by its density,
    consolidations by closing each lung and bridging its outline along the chest wall.

    Args:
        image: HU, 3D, any orientation and spacing, as from `ct.read_ct`.
        method: One of `METHODS`, or a function that takes the image and returns a mask in its
            grid: 1 right and 2 left lung, or 1 for both.
        n_jobs: Processes that `released` may use; None takes one for each core.

    Returns:
        uint8 label mask in the image's own grid: 1 right lung, 2 left lung. Vessels and lesions
        inside the lungs belong to them.

    Raises:
        DataError: No lung was found.
        ParameterError: The method is unknown, its mask does not fit the image, or this is not 3D.
    """
    if not callable(method) and method not in METHODS:
        raise ParameterError(
            f"method is {method!r}; it must be one of {', '.join(METHODS)}, or a function."
        )
    check_image(image)
    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    upright = image if code == "LPS" else sitk.DICOMOrient(image, "LPS")
    spacing = upright.GetSpacing()[::-1]
    hu, inside = _whole_blocks(_as_hu(sitk.GetArrayViewFromImage(upright)), _factors(spacing))
    if callable(method):
        labels = _sided(_checked_mask(method(image), image), hu, spacing)
    elif method == "refined":
        labels = _refined(hu, spacing)[inside]
    else:
        lungs = _at_one_mm(hu[inside], spacing, method, n_jobs)
        labels = _sided(lungs, hu, spacing)
    if not labels.any():
        name = getattr(method, "__name__", method)
        raise DataError(
            f"The method {name!r} found no lung in the scan: look at it, it may not be a chest CT "
            "in HU."
        )
    mask = sitk.GetImageFromArray(labels)
    mask.CopyInformation(upright)
    mask = mask if code == "LPS" else sitk.DICOMOrient(mask, code)
    mask.CopyInformation(image)
    return mask


def _as_hu(voxels: NDArray[Any]) -> NDArray[Any]:
    """HU from -1024 on, as int16 where they are whole numbers, else as float32."""
    if voxels.dtype == np.int16:
        return voxels if voxels.min() >= -1024 else np.maximum(voxels, np.int16(-1024))
    kept = np.clip(voxels.astype(np.float32), -1024, 32_767)
    return kept.astype(np.int16) if voxels.dtype.kind in "iu" else kept


def _whole_blocks(
    hu: NDArray[Any], factors: Sequence[int]
) -> tuple[NDArray[Any], tuple[slice, ...]]:
    """The volume, continued at its far ends to whole blocks of averaged voxels; and its place."""
    missing = [-n % f for n, f in zip(hu.shape, factors, strict=True)]
    inside = tuple(slice(n) for n in hu.shape)
    return np.pad(hu, [(0, n) for n in missing], mode="edge") if any(missing) else hu, inside


def _checked_mask(mask: sitk.Image, image: sitk.Image) -> NDArray[Any]:
    """The mask of somebody else's segmenter, upright."""
    if not isinstance(mask, sitk.Image) or not same_grid(mask, image):
        raise ParameterError(
            "The segmenter must return a SimpleITK image in the image's grid; resample it first."
        )
    labels = sitk.GetArrayFromImage(sitk.DICOMOrient(mask, "LPS"))
    found = set(np.unique(labels).tolist()) - {0}
    if not found <= {RIGHT, LEFT}:
        raise ParameterError(f"The segmenter's mask has labels {sorted(found)}; 1 and 2 are known.")
    return labels


def _at_one_mm(hu: NDArray[Any], spacing: Sequence[float], method: str, n_jobs: int | None) -> Mask:
    """The authors' pipeline: HU + 1024 at 1 mm by cubic splines, there segmented, and back."""
    whole = hu if hu.dtype == np.int16 else np.rint(hu).astype(np.int16)
    volume = np.minimum(whole, np.int16(3071))
    volume += np.int16(1024)
    shape = volume.shape
    if not np.allclose(spacing, 1, atol=1e-4):
        volume = np.maximum(_zoomed(volume, np.round(np.multiply(shape, spacing)).astype(int)), 0)
    mask = released.classical(volume)
    if method == "released":
        mask = released.refine(volume, mask, n_jobs)
    if mask.shape != shape:
        mask = ndimage.zoom(mask, np.divide(shape, mask.shape), order=0, mode="nearest")
    return mask


def _zoomed(volume: NDArray[np.int16], shape: Sequence[int]) -> NDArray[np.int16]:
    """What `ndimage.zoom` gives with cubic splines, axis by axis: far fewer operations."""
    along = [
        ndimage.zoom(np.eye(old), (new / old, 1), order=3, mode="nearest")
        for old, new in zip(volume.shape, shape, strict=True)
    ]
    partly = np.einsum("zk,yj,kjx->zyx", along[0], along[1], volume.astype(float), optimize=True)
    zoomed = np.empty(shape, np.int16)
    for plane, target in zip(partly, zoomed, strict=True):
        target[:] = np.rint(plane @ along[2].T)
    return zoomed


# --- right and left -----------------------------------------------------------------------------


def _sided(mask: NDArray[Any], hu: NDArray[Any], spacing: Sequence[float]) -> NDArray[np.uint8]:
    """Labels of a mask; right and left are told apart unless both are there."""
    if (mask == LEFT).any():
        return mask.astype(np.uint8)
    factors = _factors(spacing)
    labels = np.zeros(mask.shape, np.uint8)
    if not mask.any():
        return labels
    box = bounds(mask)
    every = tuple(slice(f // 2, None, f) for f in factors)
    step = _multiplied(spacing, factors)
    blocks = tuple(slice(s.start // f, -(-s.stop // f)) for s, f in zip(box, factors, strict=True))
    whole = np.zeros([(s.stop - s.start) * f for s, f in zip(blocks, factors, strict=True)], bool)
    place = tuple(
        slice(s.start * f, min(n, s.stop * f))
        for s, f, n in zip(blocks, factors, mask.shape, strict=True)
    )
    known = mask[place] > 0
    inner = tuple(slice(n) for n in known.shape)
    whole[inner] = known
    right = _nearer_right(whole[every], step, _middle(hu[every], step) - blocks[2].start)
    side = _enlarged(np.where(right, RIGHT, LEFT).astype(np.uint8), factors)
    labels[place] = side[inner] * known
    return labels


def _middle(hu: NDArray[Any], step: Sequence[float]) -> float:
    """Column of the spine: thick bone in the back half; else of the middle of all that is solid."""
    solid = hu > -300
    rows = np.flatnonzero(solid.any(axis=(0, 2)))
    if not len(rows):
        return (hu.shape[2] - 1) / 2
    back = int(rows[[0, -1]].mean())
    reach = [max(1, int(4 / s)) for s in step]
    bone = _grown(hu[:, back:] > 160, [r // 2 for r in reach])
    spine = _worn(bone, [r + r // 2 for r in reach])
    if spine.sum() * np.prod(step) > 5_000:
        return _mean_column(spine)
    return float(np.flatnonzero(solid.any(axis=(0, 1)))[[0, -1]].mean())


def _nearer_right(lungs: Mask, spacing: Sequence[float], middle: float) -> Mask:
    """Every voxel of the grid that is nearer to the right lung than to the left.

    Lungs that touch are eroded until two large parts come apart, one on each side of the middle.
    """
    depth = None
    if not lungs.any():  # thinner than the working grid
        return np.broadcast_to(np.arange(lungs.shape[2]) < middle, lungs.shape)
    for radius in (0, 1.5, 3, 5, 8, 12):
        if radius and depth is None:
            depth = edt.edt(lungs, anisotropy=tuple(spacing), parallel=0)
        parts = cc3d.connected_components(
            lungs if depth is None else depth > radius, connectivity=6
        )
        counts = np.bincount(parts.ravel(), minlength=3)
        counts[0] = 0
        pair = np.argsort(-counts)[:2]
        if not counts[pair[1]] or counts[pair[1]] < 0.1 * counts[pair[0]]:
            continue
        lungs_apart = [parts == label for label in pair]
        columns = [_mean_column(part) for part in lungs_apart]
        if min(columns) < middle < max(columns):
            right, left = lungs_apart if columns[0] < columns[1] else lungs_apart[::-1]
            return _distance2(right, spacing) <= _distance2(left, spacing)
    return np.full(lungs.shape, _mean_column(lungs) < middle)


def _mean_column(mask: Mask) -> float:
    return float(np.average(np.arange(mask.shape[2]), weights=mask.sum(axis=(0, 1))))


# --- ours ---------------------------------------------------------------------------------------


def _refined(hu: NDArray[Any], spacing: Sequence[float]) -> NDArray[np.uint8]:
    factors = _factors(spacing)
    coarse = _shrunk(hu, factors)
    step = _multiplied(spacing, factors)
    labels = np.zeros(hu.shape, np.uint8)
    padding = _padding(coarse)
    body = _body(coarse, step)
    airways = _grown(_airways(coarse, body, step), 1)
    air = (coarse < AIR_BELOW) & ~padding & ~airways
    middle = _middle(coarse, step)
    lungs = _lung_air(air, coarse, body, step, middle)
    if not lungs.any():
        return labels
    box = bounds(lungs, [int(25 / s) for s in step])
    elsewhere = (air & ~lungs | padding | airways)[box]
    lungs, local = lungs[box], coarse[box]
    middle -= box[2].start
    right = _nearer_right(lungs, step, middle)
    found = np.zeros(lungs.shape, np.uint8)
    glass = _ground_glass(local, lungs, step) & ~elsewhere
    for label, side in ((LEFT, ~right), (RIGHT, right)):
        lung = _completed(lungs & side, glass & side, local, step, label, middle)
        found[lung & ~elsewhere] = label
    place = tuple(slice(s.start * f, s.stop * f) for s, f in zip(box, factors, strict=True))
    labels[place] = _settled(found, lungs, elsewhere, right, hu[place], factors)
    return labels


def _factors(spacing: Sequence[float]) -> tuple[int, ...]:
    """How many voxels are averaged along each axis."""
    return tuple(max(1, round(WORKING_MM / s)) for s in spacing)


def _multiplied(spacing: Sequence[float], factors: Sequence[int]) -> tuple[float, ...]:
    """Size of the averaged voxels in mm."""
    return tuple(float(s * f) for s, f in zip(spacing, factors, strict=True))


def _shrunk(hu: NDArray[Any], factors: Sequence[int]) -> NDArray[np.float32]:
    """Means over blocks of voxels, which also takes most of the noise away."""
    image = sitk.GetImageFromArray(hu)
    return sitk.GetArrayFromImage(sitk.BinShrink(sitk.Cast(image, sitk.sitkFloat32), factors[::-1]))


def _padding(hu: NDArray[np.float32]) -> Mask:
    """Flat regions at the lowest value: outside the scanner's round field of view.

    Clipped noise in air reaches the same value, but never over five voxels in a row.
    """
    lowest = hu <= -1023
    if lowest.mean() < 0.02:
        return np.zeros_like(lowest)
    return _grown(_worn(lowest, (0, 2, 2)), (0, 2, 2))


def _body(hu: NDArray[np.float32], step: Sequence[float]) -> Mask:
    """The largest solid thing, after thin ones (the table's shell, blankets) are worn away."""
    parts = cc3d.connected_components(
        _worn(hu > -300, [max(1, int(3.5 / s)) for s in step]), connectivity=6
    )
    counts = np.bincount(parts.ravel(), minlength=2)
    counts[0] = 0
    return parts == counts.argmax()


def _airways(hu: NDArray[np.float32], body: Mask, step: Sequence[float]) -> Mask:
    """Trachea and main bronchi, followed from slice to slice as long as their walls hold.

    Every round hole near the middle of a slice may be the trachea; the one that can be followed
    the longest way down is.
    """
    holes = [_holes(plane, step) for plane in hu]
    columns = np.flatnonzero(body.any(axis=(0, 1)))
    if not len(columns):
        return np.zeros_like(body)
    middle, half_width = columns[[0, -1]].mean(), np.ptp(columns) / 2
    seen = np.zeros(hu.shape, bool)
    longest: dict[int, Mask] = {}
    for z in range(len(hu) - 1, len(hu) // 3, -1):
        labels, areas = holes[z]
        for label in np.flatnonzero((areas > 40) & (areas < 900)):
            hole = labels == label
            if seen[z][hole].any() or not _is_round(hole, step, middle, 0.25 * half_width):
                continue
            way = _followed(hole, z, holes, limit=max(600.0, 2.5 * areas[label]))
            for below, part in way.items():
                seen[below] |= part
            if len(way) > len(longest):
                longest = way
    airways = np.zeros(hu.shape, bool)
    if len(longest) * step[0] >= 30:
        for z, part in longest.items():
            airways[z] = part
    return airways


def _holes(plane: NDArray[np.float32], step: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Connected dark regions of a slice, and their areas; dark enough to show thin walls."""
    labels, count = cc3d.connected_components(plane < -700, connectivity=4, return_N=True)
    areas = np.bincount(labels.ravel(), minlength=count + 1) * float(step[1] * step[2])
    areas[0] = 0
    return labels, areas


def _is_round(hole: Mask, step: Sequence[float], middle: float, reach: float) -> bool:
    rows, columns = np.nonzero(hole)
    height, width = (np.ptp(rows) + 1) * step[1], (np.ptp(columns) + 1) * step[2]
    filled = hole.sum() * step[1] * step[2] / (height * width)
    return bool(
        abs(columns.mean() - middle) < reach and 0.4 < height / width < 2.5 and filled > 0.5
    )


def _followed(
    hole: Mask,
    z: int,
    holes: Sequence[tuple[NDArray[Any], NDArray[Any]]],
    limit: float,
) -> dict[int, Mask]:
    """A hole and what it continues as in the slices below; a region above `limit` mm2 is lung."""
    way = {z: hole}
    for below in range(z - 1, -1, -1):
        labels, areas = holes[below]
        touched = np.unique(labels[hole])
        touched = touched[(touched > 0) & (areas[touched] < limit)]
        if not len(touched):
            break
        hole = np.isin(labels, touched)
        way[below] = hole
    return way


def _lung_air(
    air: Mask, hu: NDArray[np.float32], body: Mask, step: Sequence[float], middle: float
) -> Mask:
    """The parts of the air that are lung: inside the body, and not as empty as gas."""
    parts, count = cc3d.connected_components(air, connectivity=6, return_N=True)
    voxels = np.bincount(parts.ravel(), minlength=count + 1)
    enclosed = np.bincount(parts[_sides_closed(body) >= 3], minlength=count + 1) / np.maximum(
        voxels, 1
    )
    volumes = voxels * np.prod(step) / 1000
    boxes = ndimage.find_objects(parts, max_label=count)
    behind = np.bincount(parts[:, -1].ravel(), minlength=count + 1)
    enclosed[behind > 0.1 * voxels] = enclosed[0] = (
        0  # the table's inside, cut by the field of view
    )
    lung = np.zeros(count + 1, bool)
    largest = 0.0
    candidates = np.flatnonzero((volumes > 0.3) & (enclosed > 0.8))
    for label in candidates[np.argsort(-volumes[candidates])]:
        box = boxes[label - 1]
        values = hu[box][parts[box] == label]
        if not _is_gas(values, volumes[label], largest):
            lung[label] = True
            largest = max(largest, volumes[label])
    lung &= (volumes > 30) | (_offsets(parts, count, middle) * step[2] > 20)
    return _near_large(parts, lung & (volumes > 30), lung, step)


def _offsets(parts: NDArray[Any], count: int, middle: float) -> NDArray[np.float64]:
    """How far the centre of each region lies from the middle column: the gullet's air is near."""
    columns = np.broadcast_to(np.arange(parts.shape[2], dtype=float), parts.shape)
    sums = np.bincount(parts.ravel(), columns.ravel(), count + 1)
    centres = sums / np.maximum(np.bincount(parts.ravel(), minlength=count + 1), 1)
    return np.abs(centres - middle)


def _near_large(parts: NDArray[Any], large: Mask, lung: Mask, step: Sequence[float]) -> Mask:
    """Regions that are large, and small ones within 15 mm of these."""
    sure = large[parts]
    if not large.any():
        return sure
    box = bounds(sure, [int(16 / s) for s in step])
    around = _distance2(sure[box], step) <= 15.0**2
    close = np.zeros_like(lung)
    close[parts[box][around]] = True
    return (lung & close)[parts]


def _is_gas(values: NDArray[np.float32], volume: float, largest: float) -> bool:
    """Gas in the bowel, by how empty it is: even emphysema, in a whole lung, holds more tissue."""
    median = np.median(values)
    if volume > 30:
        return bool(median < (-945 if largest else -960) and volume < max(0.3 * largest, 600.0))
    return bool(median < -945 or np.percentile(values, 5) < -955)


def _sides_closed(body: Mask) -> NDArray[np.uint8]:
    """On how many of four sides (left, right, front, back) a voxel has the body.

    A lung cut by a small field of view is open on one side; what lies around or below is on more.
    """
    sides = np.zeros(body.shape, np.uint8)
    for axis in (1, 2):
        sides += np.maximum.accumulate(body, axis=axis)
        sides += np.flip(np.maximum.accumulate(np.flip(body, axis), axis=axis), axis)
    return sides


def _ground_glass(hu: NDArray[np.float32], lungs: Mask, step: Sequence[float]) -> Mask:
    """Regions next to the lungs that are denser than they, but thinner than tissue and fat.

    The surface of every organ next to air looks so too, but is only a voxel or two thick.
    """
    between = (hu >= AIR_BELOW) & (hu < -200)
    radius = max(2.5, 1.05 * max(step))
    core = edt.edtsq(between, anisotropy=tuple(step), parallel=0) > radius**2
    if not core.any():
        return core
    between &= _distance2(core, step) <= (radius + 0.1) ** 2
    parts, count = cc3d.connected_components(between, connectivity=6, return_N=True)
    near = np.zeros(count + 1, bool)
    near[parts[_grown(lungs, 2)]] = True
    near[0] = False
    return near[parts]


def _completed(
    lung: Mask,
    glass: Mask,
    hu: NDArray[np.float32],
    step: Sequence[float],
    label: int,
    middle: float,
) -> Mask:
    """One lung with its vessels and white regions."""
    known = lung | glass
    if not known.any():
        return known
    parts, count = cc3d.connected_components(known, connectivity=6, return_N=True)
    large = np.bincount(parts.ravel(), minlength=count + 1) * np.prod(step) > 10_000
    large[0] = False
    central = np.abs(np.arange(known.shape[2]) - middle) * step[2] < SPINE_MM
    bridged = _along_wall(large[parts], step, label) & (hu < 200) & ~central
    white = (bridged.sum() + glass.sum()) / known.sum()
    extra = WHITE_CLOSING_MM * min(1.0, white / WHITE_SHARE)
    lung = _closed(known | bridged, CLOSING_MM, step)
    if extra > 1:
        lung |= _closed(lung, CLOSING_MM + extra, step) & ~central
    return _filled(lung)


def _along_wall(lung: Mask, step: Sequence[float], label: int) -> Mask:
    """White regions between a lung and the chest wall, beside it and behind it.

    Seen from outside, the wall is convex: where the lung's outline lies behind the straight line
    between its neighbours, in a slice or from slice to slice, something white has taken its place.
    In front it may be the heart.
    """
    outward = slice(None, None, -1 if label == RIGHT else 1)
    beside = _bridged(lung[:, :, outward], WALL_DEPTH_MM / step[2])[:, :, outward]
    behind = _bridged(lung.transpose(0, 2, 1), WALL_DEPTH_MM / step[1]).transpose(0, 2, 1)
    return beside | behind


def _bridged(lung: Mask, depth: float) -> Mask:
    """What lies between the outline towards the last axis and its bridged form, in voxels."""
    length = lung.shape[2]
    there = lung.any(axis=2)
    outline = np.where(there, length - 1 - lung[:, :, ::-1].argmax(axis=2), -1.0)
    bridge = outline
    for turn in (np.asarray, np.transpose):
        wider = turn(np.array([_hull(line) for line in turn(bridge)]))
        bridge = np.where(wider - outline > depth, bridge, wider)
    bridge = np.where(np.floor(bridge) - outline >= 3, np.floor(bridge), outline)
    column = np.arange(length)
    between: Mask = (column > outline[:, :, None]) & (column <= bridge[:, :, None])
    return between & np.expand_dims(there, 2)


def _hull(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper convex hull of a profile; steep stretches and places without lung (-1) stay."""
    places = np.flatnonzero(line >= 0)
    if len(places) < 3:
        return line
    x, y = places.tolist(), line[places].tolist()
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) > (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    corner_x, corner_y = places[corners].astype(float), line[places][corners]
    part = np.clip(np.searchsorted(corner_x, places, side="right") - 1, 0, len(corners) - 2)
    steepness = np.abs(np.diff(corner_y) / np.diff(corner_x))[part]
    hull = line.copy()
    bridged = np.interp(places, corner_x, corner_y)
    hull[places] = np.where(steepness < 1, bridged, line[places])
    return hull


def _settled(
    found: NDArray[np.uint8],
    aerated: Mask,
    elsewhere: Mask,
    right: Mask,
    hu: NDArray[Any],
    factors: Sequence[int],
) -> NDArray[np.uint8]:
    """Labels at full resolution: where lung borders on tissue, each voxel's own HU decide."""
    lung = found > 0
    border = _grown(lung, 1) & ~_worn(lung, 1) & (aerated | ~lung) & ~elsewhere
    inner = _enlarged(lung & ~border, factors)
    mask = inner | (_enlarged(border, factors) & (hu < AIR_BELOW))
    side = np.where(found > 0, found, np.where(right, RIGHT, LEFT)).astype(np.uint8)
    return _enlarged(side, factors) * mask


# --- morphology ---------------------------------------------------------------------------------


def _distance2(mask: Mask, step: Sequence[float]) -> NDArray[np.float32]:
    """Squared distance to the mask in mm2."""
    return edt.edtsq(~mask, anisotropy=tuple(step), parallel=0)


def _closed(mask: Mask, radius: float, step: Sequence[float]) -> Mask:
    """Closing with a ball; beyond the border lies nothing."""
    if not mask.any():
        return mask
    margin = [int(radius / s) + 2 for s in step]
    box = bounds(mask)
    padded = np.pad(mask[box], [(m, m) for m in margin])
    grown = _distance2(padded, step) <= radius**2
    closed = edt.edtsq(grown, anisotropy=tuple(step), parallel=0) > radius**2
    result = mask.copy()
    result[box] |= closed[tuple(slice(m, -m) for m in margin)]
    return result


def _filled(mask: Mask) -> Mask:
    """Fill what the mask encloses on all sides."""
    outside = cc3d.connected_components(~np.pad(mask, 1), connectivity=6)
    return (outside != outside[0, 0, 0])[1:-1, 1:-1, 1:-1]


def _worn(mask: Mask, voxels: int | Sequence[int]) -> Mask:
    """Erosion with a box; the border does not erode."""
    counts = np.broadcast_to(voxels, 3)
    for axis, count in enumerate(counts):
        worn = mask.copy()
        for shift in range(1, min(int(count), mask.shape[axis] - 1) + 1):
            low, high = [slice(None)] * 3, [slice(None)] * 3
            low[axis], high[axis] = slice(None, -shift), slice(shift, None)
            worn[tuple(low)] &= mask[tuple(high)]
            worn[tuple(high)] &= mask[tuple(low)]
        mask = worn
    return mask


def _grown(mask: Mask, voxels: int | Sequence[int]) -> Mask:
    """Dilation with a box."""
    return ~_worn(~mask, voxels)


def _enlarged(voxels: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    for axis, factor in enumerate(factors):
        voxels = voxels.repeat(factor, axis) if factor > 1 else voxels
    return voxels
