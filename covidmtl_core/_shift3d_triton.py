"""Shift3D on CUDA, as a kernel in Triton: each element is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096
"""Elements a program moves."""


def shift_on_cuda(x: Tensor, axis: Tensor, distance: Tensor, fill: int | None) -> Tensor:
    """Shift every map of a tensor, whose memory is contiguous or channels last.

    Args:
        x: (N, C, D, H, W) integers.
        axis: (N, C): 0, 1 or 2.
        distance: (N, C): without padding from 0 to less than the size of the axis; with padding
            at most that size, either way.
        fill: What fills the places that nothing is shifted to; None shifts circularly.

    Returns:
        The shifted maps, in the memory format of `x`.
    """
    target = torch.empty_like(x)
    samples, channels, depth, height, width = x.shape
    channels_last = not x.is_contiguous()
    if channels_last:
        blocks, rows, columns = samples, depth * height * width, channels
    else:
        blocks, rows, columns = samples * channels, depth * height, width
    wide = min(triton.next_power_of_2(columns), 1024)
    high = max(_ELEMENTS // wide, 1)
    plan = torch.stack([axis, distance]).to(torch.int32)
    if x.is_cuda:
        plan = plan.pin_memory().to(x.device, non_blocking=True)
    grid = (blocks * triton.cdiv(rows, high), triton.cdiv(columns, wide))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _shift[grid](
            x, target, plan, fill or 0, samples * channels, channels, depth, height, width,
            PADDED=fill is not None, CHANNELS_LAST=channels_last, ROWS=high, COLUMNS=wide,
        )  # fmt: skip
    return target


@triton.jit
def _shift(  # type: ignore[no-untyped-def]
    source, target, plan, fill, maps, channels, depth, height, width,
    PADDED: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Rows are voxels and columns channels, or rows are lines and columns their voxels.
    lines = depth * height * width if CHANNELS_LAST else depth * height
    programs = tl.cdiv(lines, ROWS)
    block = tl.program_id(0) // programs
    row = (tl.program_id(0) % programs) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if CHANNELS_LAST:
        line, w, of = row // width, row % width, block * channels + column
        inside = (row < lines) & (column < channels)
    else:
        line, w, of = row, column, block
        inside = (row < lines) & (column < width)
    d, h = line // height, line % height
    axis = tl.load(plan + of, mask=of < maps, other=0)
    by = tl.load(plan + maps + of, mask=of < maps, other=0)
    d -= tl.where(axis == 0, by, 0)
    h -= tl.where(axis == 1, by, 0)
    w -= tl.where(axis == 2, by, 0)
    if PADDED:
        there = (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width) & inside
    else:
        d = tl.where(d < 0, d + depth, d)
        h = tl.where(h < 0, h + height, h)
        w = tl.where(w < 0, w + width, w)
        there = inside
    first = block.to(tl.int64) * lines * (channels if CHANNELS_LAST else width)
    if CHANNELS_LAST:
        old = ((d * height + h) * width + w).to(tl.int64) * channels + column
        new = row.to(tl.int64) * channels + column
    else:
        old = (d * height + h) * width + w
        new = row * width + column
    value = tl.load(source + first + old, mask=there, other=fill)
    tl.store(target + first + new, value, mask=inside)
