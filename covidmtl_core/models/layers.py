"""What the networks share: convolution with norm, the stem, checkpointing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from covidmtl_core.shift3d import Shift3D, Shifts, eager, relu_shift_max_pool


class ConvNorm(nn.Sequential):
    """A 3D convolution, the batch norm behind it, and perhaps a ReLU behind that.

    Args:
        conv: The convolution.
        eps: Of the norm.
        momentum: Of the norm's running statistics.
        relu: With the ReLU?
    """

    def __init__(
        self, conv: nn.Conv3d, eps: float = 1e-5, momentum: float = 0.1, relu: bool = False
    ) -> None:
        super().__init__()
        self.conv = conv
        self.norm: nn.Module = nn.BatchNorm3d(conv.out_channels, eps=eps, momentum=momentum)
        self.relu: nn.Module = nn.ReLU(inplace=True) if relu else nn.Identity()


class Stem(nn.Module):
    """Convolution and norm, then ReLU, Shift3D and max-pool (3, stride 2, padding 1) in one.

    Args:
        conv: A convolution of stride 2 that halves each axis, rounding up.
        shift: Shift3D, or None.
    """

    def __init__(self, conv: ConvNorm, shift: Shift3D | None) -> None:
        super().__init__()
        self.conv, self.shift = conv, shift

    def forward(self, x: Tensor, checkpointing: bool = False) -> Tensor:
        """(N, C, D, H, W) to (N, 64, ceil(D / 4), ceil(H / 4), ceil(W / 4))."""
        sizes = [(size + 1) // 2 for size in x.shape[2:]]
        maps = len(x), self.conv.conv.out_channels, *sizes
        shifts = None if self.shift is None else self.shift.draw(maps)
        return run(self._pooled, self, checkpointing, x, shifts)

    def _pooled(self, x: Tensor, shifts: Shifts | None) -> Tensor:
        padding_value = self.shift.padding_value if self.shift else None
        x = self.conv.conv(x)
        norm = self.conv.norm
        x = _batch_norm(x, norm) if _is_plain(norm, x) else norm(x)  # type: ignore[arg-type]
        return relu_shift_max_pool(x, shifts, padding_value)


def _is_plain(norm: nn.Module, x: Tensor) -> bool:
    """Is this the case that `_BatchNorm` is made for?"""
    if type(norm) is not nn.BatchNorm3d or not norm.training or not torch.is_grad_enabled():
        return False
    usual = norm.affine and norm.track_running_stats and norm.momentum is not None
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    fits = x.device.type == "cpu" and x.dtype == norm.weight.dtype and x.is_contiguous()
    return usual and fits and not (hooked or traced) and x.numel() > x.shape[1]


def _batch_norm(x: Tensor, norm: nn.BatchNorm3d) -> Tensor:
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    running = norm.running_mean, norm.running_var
    return _BatchNorm.apply(x, norm.weight, norm.bias, *running, norm.momentum, norm.eps)


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training that turns the gradient it is given into the one it gives back.

    So the largest map of a network has one gradient less in memory, at the peak of a step. None
    but the stem holds that gradient: its pool and ReLU make a new one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        settings = running_mean, running_var, True, momentum, eps
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, *settings)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        gradient = gradients[0]
        sums = torch.zeros(2, x.shape[1], dtype=torch.float64, device="cpu")
        for values, given in zip(x, gradient, strict=True):  # map by map, for the cache's sake
            for c, (new, old) in enumerate(zip(given, values, strict=True)):
                sums[0, c] += new.sum()
                sums[1, c] += new.mul(old - mean[c]).sum()
        count = x.numel() // x.shape[1]
        scale = weight * rstd
        slope = -scale * rstd**2 * sums[1] / count
        offset = -scale * sums[0] / count
        for values, given in zip(x, gradient, strict=True):
            for c, (new, old) in enumerate(zip(given, values, strict=True)):
                new.mul_(scale[c]).add_(old - mean[c], alpha=float(slope[c])).add_(float(offset[c]))
        return gradient, (sums[1] * rstd).to(weight), sums[0].to(weight), None, None, None, None


def run(
    call: Callable[..., Tensor], module: nn.Module, checkpointing: bool, *inputs: Any
) -> Tensor:
    """Call a part of a network, keeping for the gradient its inputs only if `checkpointing`.

    The second forward pass leaves the running statistics of batch norms alone, so that training
    goes as without.
    """
    if checkpointing and torch.is_grad_enabled():
        return _checkpointed(call, module, *inputs)
    return call(*inputs)


@eager
def _checkpointed(call: Callable[..., Tensor], module: nn.Module, *inputs: Any) -> Tensor:
    return checkpoint(
        call,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _kept_statistics(module)),
    )


@contextlib.contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def check_volume(x: Tensor, channels: int) -> None:
    """Raise ValueError unless `x` is (N, channels, D, H, W)."""
    if x.dim() != 5 or x.shape[1] != channels or not all(x.shape[2:]):
        raise ValueError(
            f"the volume has the shape {tuple(x.shape)}; it must be (N, {channels}, D, H, W)."
        )


def initialise(model: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """He et al.'s initialisation of all convolutions (section 5.1).

    Args:
        model: The network.
        mode: `fan_in` or `fan_out`.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode=mode)
