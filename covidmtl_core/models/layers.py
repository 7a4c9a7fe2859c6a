"""What the networks share: convolution with norm, the stem, checkpointing, inference."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from covidmtl_core.shift3d import Shift3D, Shifts, relu_shift_max_pool


class ConvNorm(nn.Sequential):
    """A 3D convolution and the batch norm behind it.

    Args:
        conv: The convolution.
        eps: Of the norm.
        momentum: Of the norm's running statistics.
    """

    def __init__(self, conv: nn.Conv3d, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.conv = conv
        self.norm: nn.Module = nn.BatchNorm3d(conv.out_channels, eps=eps, momentum=momentum)


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
    if not (checkpointing and torch.is_grad_enabled()):
        return call(*inputs)
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


def for_inference(model: nn.Module) -> nn.Module:
    """A copy of a network that predicts faster: norms folded into convolutions, channels last.

    Its outputs equal those of `model.eval()` but for rounding. It cannot be trained;
    `torch.compile` makes it faster still.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.norm, nn.BatchNorm3d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
