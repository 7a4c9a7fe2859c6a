"""Boxes around masks."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[slice, ...]


def bounds(mask: NDArray[np.bool_], margins: int | Sequence[int] = 0) -> Box:
    """The smallest box that holds the mask; of an empty mask, an empty box.

    Args:
        mask: Any number of axes.
        margins: Voxels by which the box is wider on each side, as far as the grid reaches; one
            number, or one for each axis.
    """
    box = []
    for axis, margin in enumerate(np.broadcast_to(margins, mask.ndim).tolist()):
        others = tuple(k for k in range(mask.ndim) if k != axis)
        places = np.flatnonzero(mask.any(axis=others))
        if not len(places):
            return (slice(0, 0),) * mask.ndim
        start, stop = int(places[0]) - margin, int(places[-1]) + 1 + margin
        box.append(slice(max(0, start), min(mask.shape[axis], stop)))
    return tuple(box)
