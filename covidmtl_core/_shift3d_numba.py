"""Shift3D and the stem's pool on the CPU, in loops compiled by numba."""

import os
import threading
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

_WORTH_A_THREAD = 1 << 20
"""Bytes a thread should have to move."""
_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
_ONE_AT_A_TIME = threading.Lock()


def _stay_serial() -> None:
    """In a forked child: OpenMP's threads did not come along, and the lock may be held for ever."""
    global _THREADS, _ONE_AT_A_TIME
    _THREADS, _ONE_AT_A_TIME = 1, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stay_serial)


def shift_on_cpu(x: Tensor, target: Tensor, jobs: Tensor, fill: int | None) -> None:
    """Shift every map of `x` into `target`.

    Args:
        x: (N, C, D, H, W) integers, contiguous.
        target: The same, to be written.
        jobs: (N * C, 2) int64: the length of the stretches within which a map is shifted, and by
            how many elements; without padding by 0 to less than that length.
        fill: What fills the places that nothing is shifted to; None shifts circularly.
    """
    source, moved = (t.view(len(jobs), -1).numpy() for t in (x, target))
    value = source.dtype.type(fill or 0)
    _in_threads(_shift_maps, _shift_all, x, source, moved, jobs.numpy(), fill is not None, value)


def pool_on_cpu(
    x: Tensor, pooled: Tensor, winners: Tensor, jobs: Tensor, padding: float | None
) -> None:
    """ReLU, shift and max-pool (3, stride 2, padding 1) of every map in one go.

    Args:
        x: (N, C, D, H, W) float32 or float64, contiguous.
        pooled: (N, C, ceil(D / 2), ceil(H / 2), ceil(W / 2)), to be written.
        winners: int32 of the same shape, to be written: where in its map of `x` each maximum was
            found; -1 where no gradient flows back. Or empty, if that is of no interest.
        jobs: (N * C, 2) int64: axis (0, 1, 2) and distance of each map's shift, the latter without
            padding from 0 to less than the size of the axis.
        padding: As a number, or None for circular shifts.
    """
    maps = x.flatten(0, 1).numpy(), pooled.flatten(0, 1).numpy(), winners.flatten(0, 1).numpy()
    fill = maps[0].dtype.type(0 if padding is None else padding)
    _in_threads(_pool_maps, _pool_all, x, *maps, jobs.numpy(), padding is not None, fill)


def unpool_on_cpu(gradient: Tensor, winners: Tensor, target: Tensor) -> None:
    """Add each pooled element's gradient to the zeros of `target`, at its winner's place."""
    maps = (t.flatten(0, 1).flatten(1).numpy() for t in (gradient, winners, target))
    _in_threads(_unpool_maps, _unpool_all, target, *maps)


def _in_threads(serial: Any, parallel: Any, x: Tensor, *arguments: Any) -> None:
    """Run a kernel over all maps, shared out among as many threads as torch uses.

    Not all of numba's thread pools can be entered by two threads at once, hence the lock.
    """
    maps = x.shape[0] * x.shape[1]
    size = x.numel() * x.element_size()
    threads = min(torch.get_num_threads(), _THREADS, maps, size // _WORTH_A_THREAD)
    if threads < 2:
        serial(*arguments, 0, maps)
        return
    with _ONE_AT_A_TIME:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            parallel(*arguments, maps, threads)
        finally:
            numba.set_num_threads(before)


@numba.njit(nogil=True, cache=True)
def _shift_maps(source, target, jobs, padded, fill, start, stop):  # type: ignore[no-untyped-def]
    for m in range(start, stop):
        stretch, by = jobs[m]
        for first in range(0, source.shape[1], stretch):
            old = source[m, first : first + stretch]
            new = target[m, first : first + stretch]
            if by >= 0:
                _copy(old[: stretch - by], new[by:])
                if padded:
                    new[:by] = fill
                else:
                    _copy(old[stretch - by :], new[:by])
            else:
                _copy(old[-by:], new[: stretch + by])
                new[stretch + by :] = fill


@numba.njit(nogil=True, cache=True)
def _copy(source, target):  # type: ignore[no-untyped-def]
    for i in range(len(source)):
        target[i] = source[i]


_PADDED = -(1 << 30)


@numba.njit(nogil=True, cache=True)
def _came_from(place, by, size, padded):  # type: ignore[no-untyped-def]
    """Where on its axis an element lay before the shift; `_PADDED` if it is new."""
    place -= by
    if padded:
        return place if 0 <= place < size else _PADDED
    return place + size if place < 0 else place


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _pool_maps(source, pooled, winners, jobs, padded, fill, start, stop):  # type: ignore[no-untyped-def]
    # Width first, then height, then depth, each keeping the first of equals: so the winner is
    # the first in the order of the shifted map, as in PyTorch.
    _, depth, height, width = source.shape
    high, wide = pooled.shape[2:]
    line = np.full(2 * wide + 1, -np.inf, source.dtype)
    rows, row_places = np.empty((height, wide), source.dtype), np.empty((height, wide), np.int32)
    planes, places = np.empty((3, high, wide), source.dtype), np.empty((3, high, wide), np.int32)
    for m in range(start, stop):
        axis, by = jobs[m]
        for z in range(depth):
            plane, place = planes[z % 3], places[z % 3]
            d = _came_from(z, by, depth, padded) if axis == 0 else z
            if d < 0:
                plane[:] = fill
                place[:] = _PADDED
            else:
                for h in range(height):
                    _rectify(source[m, d, h], line, by if axis == 2 else 0, padded, fill)
                    _pool_row(line, rows[h], row_places[h])
                    first = (d * height + h) * width
                    _name_places(row_places[h], first, by if axis == 2 else 0, width, padded)
                for y in range(high):
                    for k in range(max(2 * y - 1, 0), min(2 * y + 2, height)):
                        h = _came_from(k, by, height, padded) if axis == 1 else k
                        if k == max(2 * y - 1, 0):
                            if h < 0:
                                plane[y] = fill
                                place[y] = _PADDED
                            else:
                                _copy(rows[h], plane[y])
                                _copy(row_places[h], place[y])
                        elif h < 0:
                            _keep_fill(plane[y], place[y], fill)
                        else:
                            _keep_larger(plane[y], place[y], rows[h], row_places[h])
            if z % 2 or z == depth - 1:
                first = max(z - 2 + (z % 2 == 0), 0)
                best, where = pooled[m, z // 2].ravel(), places[first % 3].ravel()
                _copy(planes[first % 3].ravel(), best)
                for k in range(first + 1, z + 1):
                    _keep_larger(best, where, planes[k % 3].ravel(), places[k % 3].ravel())
                if winners.size:
                    _keep_positive(best, where, winners[m, z // 2].ravel())


@numba.njit(nogil=True, cache=True)
def _rectify(row, line, by, padded, fill):  # type: ignore[no-untyped-def]
    """ReLU of a row, shifted, between two borders of minus infinity."""
    width = len(row)
    inner = line[1 : width + 1]
    if by >= 0:
        _relu(row[: width - by], inner[by:])
        if padded:
            inner[:by] = fill
        else:
            _relu(row[width - by :], inner[:by])
    else:
        _relu(row[-by:], inner[: width + by])
        inner[width + by :] = fill


@numba.njit(nogil=True, cache=True)
def _relu(source, target):  # type: ignore[no-untyped-def]
    for i in range(len(source)):
        x = source[i]
        target[i] = source.dtype.type(0) if x <= 0 else x


@numba.njit(nogil=True, cache=True)
def _pool_row(line, best, place):  # type: ignore[no-untyped-def]
    for i in range(len(best)):
        value, where = line[2 * i], np.int32(2 * i)
        for k in range(1, 3):
            x = line[2 * i + k]
            larger = x > value or x != x
            value = x if larger else value
            where = np.int32(2 * i + k) if larger else where
        best[i] = value
        place[i] = where


@numba.njit(nogil=True, cache=True)
def _name_places(places, first, by, width, padded):  # type: ignore[no-untyped-def]
    """From places in the line, which starts with a border, to places in the map."""
    for i in range(len(places)):
        w = places[i] - np.int32(1 + by)
        if padded:
            places[i] = w + np.int32(first) if 0 <= w < width else np.int32(_PADDED)
        else:
            places[i] = w + np.int32(first) + (np.int32(width) if w < 0 else np.int32(0))


@numba.njit(nogil=True, cache=True)
def _keep_larger(best, place, others, other_places):  # type: ignore[no-untyped-def]
    for i in range(len(best)):
        x = others[i]
        larger = x > best[i] or x != x
        best[i] = x if larger else best[i]
        place[i] = other_places[i] if larger else place[i]


@numba.njit(nogil=True, cache=True)
def _keep_fill(best, place, fill):  # type: ignore[no-untyped-def]
    for i in range(len(best)):
        larger = fill > best[i] or fill != fill
        best[i] = fill if larger else best[i]
        place[i] = np.int32(_PADDED) if larger else place[i]


@numba.njit(nogil=True, cache=True)
def _keep_positive(best, place, winners):  # type: ignore[no-untyped-def]
    for i in range(len(best)):
        winners[i] = np.int32(-1) if best[i] <= 0 or place[i] < 0 else place[i]


@numba.njit(nogil=True, cache=True)
def _unpool_maps(gradient, winners, target, start, stop):  # type: ignore[no-untyped-def]
    for m in range(start, stop):
        new = target[m]
        new[:] = 0
        for i in range(gradient.shape[1]):
            place = winners[m, i]
            if place >= 0:
                new[np.uint32(place)] += gradient[m, i]


@numba.njit(parallel=True, nogil=True, cache=True)
def _shift_all(source, target, jobs, padded, fill, maps, threads):  # type: ignore[no-untyped-def]
    for k in numba.prange(threads):
        _shift_maps(
            source, target, jobs, padded, fill, maps * k // threads, maps * (k + 1) // threads
        )


@numba.njit(parallel=True, nogil=True, cache=True)
def _pool_all(source, pooled, winners, jobs, padded, fill, maps, threads):  # type: ignore[no-untyped-def]
    for k in numba.prange(threads):
        _pool_maps(
            source,
            pooled,
            winners,
            jobs,
            padded,
            fill,
            maps * k // threads,
            maps * (k + 1) // threads,
        )


@numba.njit(parallel=True, nogil=True, cache=True)
def _unpool_all(gradient, winners, target, maps, threads):  # type: ignore[no-untyped-def]
    for k in numba.prange(threads):
        _unpool_maps(gradient, winners, target, maps * k // threads, maps * (k + 1) // threads)
