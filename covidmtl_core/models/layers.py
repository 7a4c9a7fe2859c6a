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
        return relu_shift_max_pool(self.conv(x), shifts, padding_value)


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
