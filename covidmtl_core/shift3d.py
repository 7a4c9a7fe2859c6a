"""Shift3D, the paper's augmentation of feature maps (section 4.2, Algorithm 2).

What to shift is drawn apart from the shifting, so that a shift can be looked at and replayed:
`draw_shifts` makes `Shifts`, `shift3d` applies them, `Shift3D` is both as a layer. This module
needs torch alone; with numba (CPU) or Triton (CUDA) installed it does the same faster.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""As what the fast paths move elements of so many bytes."""


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep `torch.compile` out of a function; unlike its `disable`, without importing it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class Shifts(NamedTuple):
    """One shift for each feature map of a batch.

    Attributes:
        axis: (N, C) int64 on the CPU: 0, 1 or 2 for depth, height or width.
        distance: (N, C) int64 on the CPU: voxels towards the end of the axis, or its start if
            negative; 0 leaves a map as it is.
    """

    axis: Tensor
    distance: Tensor


def draw_shifts(
    shape: torch.Size | tuple[int, ...],
    max_shift: float = 0.2,
    p: float = 0.25,
    distribution: str = "uniform",
    per_channel: bool = True,
    as_released: bool = False,
    padded: bool = False,
    generator: Generator | None = None,
) -> Shifts:
    """Draw what Shift3D does to a batch (Algorithm 2).

    Args:
        shape: (N, C, D, H, W) of the feature maps.
        max_shift: Longest shift as a share of the axis, 0 to 1, rounded down to whole voxels.
        p: Probability that a sample is shifted, 0 to 1.
        distribution: `uniform`: the distance is any number from 0 to the longest, equally likely.
            `normal`: it is normal around 0, with a standard deviation of half the longest shift,
            cut off there, and rounded. The paper has both (Table 7) and states no deviation.
        per_channel: Each map of a sample gets an axis and a distance of its own, as in the paper;
            else they share one.
        as_released: Draw the outcomes of the authors' code. Its rate is 1 / k, with k = 1 / p
            rounded down, and 0 for k = 1, so p above 1/2 never shifts; where padding is on, a
            distance of 0 towards the start wipes the map.
        padded: Will the shifts be applied with padding? Matters to `as_released` only.
        generator: Where the random numbers come from; None is torch's default generator.

    Returns:
        Shifts; the maps of samples that were not drawn have a distance of 0.

    Raises:
        ValueError: A parameter is out of its range, or the shape has not five axes.
    """
    _check_parameters(max_shift, p, distribution)
    if len(shape) != 5:
        raise ValueError(f"the shape is {tuple(shape)}; it must be (N, C, D, H, W).")
    samples, channels, *sizes = shape
    device = generator.device if generator is not None else torch.device("cpu")
    if as_released:
        one_in = int(1 / p) if p else 0
        chosen = torch.randint(max(one_in, 1), (samples, 1), generator=generator, device=device)
        drawn = (chosen == 0) & (one_in > 1)
    else:
        drawn = torch.rand(samples, 1, generator=generator, device=device) < p
    maps = samples, channels if per_channel else 1
    axis = torch.randint(3, maps, generator=generator, device=device)
    forward = torch.randint(2, maps, generator=generator, device=device) == 0
    size = torch.tensor(sizes, device=device)[axis]
    longest = torch.tensor([int(max_shift * n) for n in sizes], device=device)[axis]
    if distribution == "uniform":
        share = torch.rand(maps, dtype=torch.float64, generator=generator, device=device)
        distance = (share * (longest + 1)).long()
    else:
        share = torch.empty(maps, dtype=torch.float64, device=device)
        nn.init.trunc_normal_(share, std=0.5, a=-1.0, b=1.0, generator=generator)
        distance = (share.abs() * longest).round().long()
    if as_released and padded:
        distance = torch.where((distance == 0) & ~forward, size, distance)
    distance = torch.where(forward, distance, -distance) * drawn
    return Shifts(*(t.expand(samples, channels).cpu().contiguous() for t in (axis, distance)))


def shift3d(x: Tensor, shifts: Shifts, padding_value: float | None = None) -> Tensor:
    """Shift each feature map along an axis.

    The gradient is the opposite shift, with zeros where padding came in; it can be differentiated
    again, by `torch.autograd` (not by `torch.func`). The paths for CPU, CUDA and plain PyTorch give
    the same bits.

    Args:
        x: (N, C, D, H, W), any type, not changed.
        shifts: From `draw_shifts`, or made by hand; distances may exceed the axis.
        padding_value: What fills the places that nothing is shifted to; None lets elements that
            leave at one end come in again at the other.

    Returns:
        A tensor like `x`; `x` itself if all distances are 0.

    Raises:
        ValueError: `x` has not five axes, or `shifts` does not fit it.
    """
    _check_shifts(x, shifts)
    if not x.numel() or not shifts.distance.any():
        return x
    return _apply(x, *shifts, padding_value)


def relu_shift_max_pool(
    x: Tensor, shifts: Shifts | None = None, padding_value: float | None = None
) -> Tensor:
    """ReLU, Shift3D and max-pool (kernel 3, stride 2, padding 1): what follows the stem's norm.

    Equals `max_pool3d(shift3d(relu(x), ...), 3, 2, 1)` and its gradient. On the CPU, with numba,
    one pass does it: the shift moves where the pool reads, so it costs nothing, and the map between
    ReLU and pool is neither made nor kept for the gradient, which cannot be differentiated again.

    Args:
        x: (N, C, D, H, W), floating, not changed.
        shifts: As for `shift3d`; None shifts nothing.
        padding_value: As for `shift3d`; it is put in after the ReLU.

    Returns:
        (N, C, ceil(D / 2), ceil(H / 2), ceil(W / 2)).

    Raises:
        ValueError: As `shift3d`.
    """
    if shifts is not None:
        _check_shifts(x, shifts)
        shifts = shifts if shifts.distance.any() else None
    fits = x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and not x.is_neg()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if fits and not traced and x.numel() and x.shape[2:].numel() < 2**30:
        if x.device.type == "cpu" and _fast_path("cpu") is not None:
            return _FusedStem.apply(x, shifts, padding_value)
    if shifts is not None and padding_value is not None:
        return F.max_pool3d(shift3d(F.relu(x), shifts, padding_value), 3, 2, 1)
    # ReLU commutes with both others, and has an eighth of the work behind them.
    return F.relu(F.max_pool3d(x if shifts is None else shift3d(x, shifts), 3, 2, 1))


class Shift3D(nn.Module):
    """Shift3D as a layer: feature maps are shifted at random in training (Algorithm 2).

    The paper puts it behind the first convolution, norm and ReLU; it fits anywhere in a network
    whose tensors are (N, C, D, H, W). In eval mode, and where nothing is drawn, it returns its
    input. Under `torch.compile` it breaks the graph in training, as random Python code does.

    Args:
        max_shift: As for `draw_shifts`.
        p: As for `draw_shifts`; 0 never shifts, 1 shifts each sample.
        distribution: As for `draw_shifts`.
        per_channel: As for `draw_shifts`.
        padding_value: As for `shift3d`.
        decay_steps: Calls in training within which the probability falls from `p` to 0, along
            half a cosine. They are counted in the buffer `step`, which is saved with the model.
        as_released: As for `draw_shifts`.
        generator: Where the random numbers come from; None is torch's default generator, so that
            `torch.manual_seed` fixes the shifts.

    Raises:
        ValueError: A parameter is out of its range.
    """

    step: Tensor

    def __init__(
        self,
        max_shift: float = 0.2,
        p: float = 0.25,
        distribution: str = "uniform",
        per_channel: bool = True,
        padding_value: float | None = None,
        decay_steps: int | None = None,
        as_released: bool = False,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        _check_parameters(max_shift, p, distribution)
        if decay_steps is not None:
            if decay_steps < 1:
                raise ValueError(f"decay_steps is {decay_steps}; it must be at least 1, or None.")
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.max_shift, self.p, self.distribution = max_shift, p, distribution
        self.per_channel, self.padding_value = per_channel, padding_value
        self.decay_steps, self.as_released, self.generator = decay_steps, as_released, generator

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) to the same shape."""
        shifts = self.draw(x.shape)
        return x if shifts is None else shift3d(x, shifts, self.padding_value)

    def draw(self, shape: torch.Size | tuple[int, ...]) -> Shifts | None:
        """What to do to a batch of this shape; None in eval mode. In training the call counts."""
        return self._draw(shape) if self.training else None

    @eager
    def _draw(self, shape: torch.Size | tuple[int, ...]) -> Shifts | None:
        p = self.next_probability()
        if p == 0:
            return None
        padded = self.padding_value is not None
        settings = self.max_shift, p, self.distribution, self.per_channel, self.as_released, padded
        return draw_shifts(shape, *settings, generator=self.generator)

    def next_probability(self) -> float:
        """The probability of the next call in training, which is counted."""
        if self.decay_steps is None:
            return self.p
        step = int(self.step)
        self.step += 1
        share = min(step / self.decay_steps, 1)
        return self.p * (1 + math.cos(math.pi * share)) / 2 if share < 1 else 0.0

    def extra_repr(self) -> str:
        """The main parameters, for `print(model)`."""
        return f"max_shift={self.max_shift}, p={self.p}, distribution={self.distribution!r}"


def _check_parameters(max_shift: float, p: float, distribution: str) -> None:
    for name, value in (("max_shift", max_shift), ("p", p)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be from 0 to 1.")
    if distribution not in ("uniform", "normal"):
        raise ValueError(f"distribution is {distribution!r}; it must be 'uniform' or 'normal'.")


def _check_shifts(x: Tensor, shifts: Shifts) -> None:
    if x.dim() != 5:
        raise ValueError(f"the input has the shape {tuple(x.shape)}; it must be (N, C, D, H, W).")
    for name, part in zip(Shifts._fields, shifts, strict=True):
        if part.shape != x.shape[:2] or part.dtype != torch.int64 or part.device.type != "cpu":
            raise ValueError(
                f"the shifts' {name} is {part.dtype} {tuple(part.shape)} on {part.device}; it must "
                f"be int64 {tuple(x.shape[:2])}, as the input's samples and channels, on the CPU."
            )
    if shifts.axis.numel() and not 0 <= int(shifts.axis.min()) <= int(shifts.axis.max()) <= 2:
        raise ValueError("the shifts' axis must be 0, 1 or 2 (depth, height, width).")


def _within(shape: torch.Size, axis: Tensor, distance: Tensor, padded: bool) -> Tensor:
    """Distances that do not exceed the axis; without padding, 0 to less than its size."""
    size = torch.tensor(shape[2:], device="cpu")[axis]
    return distance.clamp(-size, size) if padded else distance.remainder(size.clamp(min=1))


@eager
def _apply(x: Tensor, axis: Tensor, distance: Tensor, padding_value: float | None) -> Tensor:
    return _Shift.apply(x, axis, distance, padding_value)


class _Shift(torch.autograd.Function):
    """A shift whose gradient is a shift."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: Tensor, distance: Tensor, padding_value: float | None
    ) -> Tensor:
        ctx.save_for_backward(axis, distance)
        ctx.padded = padding_value is not None
        return _shifted(x, axis, distance, padding_value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        axis, distance = ctx.saved_tensors
        padding = 0.0 if ctx.padded else None
        return _Shift.apply(gradients[0], axis, -distance, padding), None, None, None


@cache
def _fast_path(device: str) -> Any:
    """The module with the fast path of a kind of device, or None if its compiler is missing."""
    try:
        if device == "cpu":
            from . import _shift3d_numba

            return _shift3d_numba
        if device == "cuda":
            from . import _shift3d_triton

            still = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
            one = torch.ones(1, 1, 1, 1, 1, dtype=torch.int32, device=device)
            _shift3d_triton.shift_on_cuda(one, still, still, None)
            return _shift3d_triton
    except ImportError:
        pass
    except Exception as error:
        warnings.warn(f"Shift3D runs without its {device} kernel: {error}", stacklevel=2)
    return None


def _shifted(x: Tensor, axis: Tensor, distance: Tensor, padding_value: float | None) -> Tensor:
    distance = _within(x.shape, axis, distance, padding_value is not None)
    x = x.resolve_conj().resolve_neg()
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    if not channels_last:
        x = x.contiguous()
    bits = _BITS.get(x.element_size(), x.dtype)
    fast = _fast_path(x.device.type) if x.element_size() in _BITS else None
    fill = None
    if fast is not None and padding_value is not None:
        fill = int(torch.tensor([padding_value], dtype=x.dtype, device="cpu").view(bits))
    if fast is not None and x.is_cuda:
        return fast.shift_on_cuda(x.view(bits), axis, distance, fill).view(x.dtype)
    if not x.is_contiguous():
        moved = _shifted(x.contiguous(), axis, distance, padding_value)
        return moved.contiguous(memory_format=torch.channels_last_3d)
    inner = torch.tensor([x.shape[3] * x.shape[4], x.shape[4], 1], device="cpu")[axis]
    size = torch.tensor(x.shape[2:], device="cpu")[axis]
    jobs = torch.stack([inner * size, inner * distance], dim=-1).flatten(0, 1)
    target = torch.empty_like(x)
    if fast is not None:
        fast.shift_on_cpu(x.view(bits), target.view(bits), jobs, fill)
    else:
        _shift_plainly(x, target, jobs, padding_value)
    return target


def _shift_plainly(x: Tensor, target: Tensor, jobs: Tensor, padding_value: float | None) -> None:
    """With PyTorch alone: two copies for each shifted map."""
    for sample, shifted, job in zip(x, target, jobs.view(*x.shape[:2], 2), strict=True):
        if not job[:, 1].any():
            shifted.copy_(sample)
            continue
        for source, new, (stretch, by) in zip(sample, shifted, job.tolist(), strict=True):
            source, new = source.view(-1, stretch), new.view(-1, stretch)
            kept = stretch - abs(by)
            new[:, max(by, 0) :][:, :kept] = source[:, max(-by, 0) :][:, :kept]
            fresh = new[:, :by] if by >= 0 else new[:, by:]
            if padding_value is None:
                fresh.copy_(source[:, kept:])
            else:
                fresh.fill_(padding_value)


class _FusedStem(torch.autograd.Function):
    """ReLU, shift and max-pool at once; the gradient goes to the winners."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shifts: Shifts | None, padding_value: float | None) -> Tensor:
        maps = x.shape[:2]
        still = torch.zeros(maps, dtype=torch.int64, device="cpu")
        axis, distance = (still, still) if shifts is None else shifts
        padding = padding_value if shifts is not None else None
        distance = _within(x.shape, axis, distance, padding is not None)
        shape = (*maps, *((n + 1) // 2 for n in x.shape[2:]))
        pooled = x.new_empty(shape)
        wanted = ctx.needs_input_grad[0]
        winners = x.new_empty(shape if wanted else (*maps, 0, 0, 0), dtype=torch.int32)
        jobs = torch.stack([axis, distance], dim=-1).flatten(0, 1)
        _fast_path("cpu").pool_on_cpu(x, pooled, winners, jobs, padding)
        ctx.save_for_backward(winners)
        ctx.shape = x.shape
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (winners,) = ctx.saved_tensors
        target = gradients[0].new_empty(ctx.shape)
        _fast_path("cpu").unpool_on_cpu(gradients[0].contiguous(), winners, target)
        return target, None, None
