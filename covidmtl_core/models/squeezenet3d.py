"""SqueezeNet3D and ShiftNet3D, which is SqueezeNet3D with Shift3D (sections 2.2 and 4.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from covidmtl_core.models.layers import ConvNorm, Stem, check_volume, initialise, run
from covidmtl_core.shift3d import Shift3D

WIDTH = 512
"""Feature maps that the trunk ends with."""

PLACES = ("input", "stem", "stage1", "stage2", "stage3")
"""Where Shift3D can sit: before everything, in the stem (the paper), behind a pair of Fires."""


class Fire(nn.Module):
    """SqueezeNet's module: few maps, then many by kernels of 1 and of 3, side by side.

    Args:
        channels: Maps that come in.
        squeezed: Maps between.
        expanded: Maps of either kernel size.
        bypass: Add the input to the output?
    """

    def __init__(self, channels: int, squeezed: int, expanded: int, bypass: bool) -> None:
        super().__init__()
        self.squeeze = _conv_norm(channels, squeezed, 1, relu=True)
        self.expand1 = _conv_norm(squeezed, expanded, 1)
        self.expand3 = _conv_norm(squeezed, expanded, 3)
        self.bypass = bypass

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, D, H, W) to (N, 2 * expanded, D, H, W)."""
        squeezed = self.squeeze(x)
        expanded = torch.cat([self.expand1(squeezed), self.expand3(squeezed)], 1)
        if self.bypass:
            expanded += x
        return F.relu(expanded, inplace=True)


class Trunk(nn.Module):
    """The stem and eight Fire modules: what the tasks of COVID-MTL share.

    Args:
        channels: Of the input.
        shift: Shift3D, or None.
        checkpointing: Compute activations again in the backward pass instead of keeping them.
        shift_place: One of `PLACES`; the paper's is behind the first convolution.
    """

    def __init__(
        self,
        channels: int = 1,
        shift: Shift3D | None = None,
        checkpointing: bool = False,
        shift_place: str = "stem",
    ) -> None:
        super().__init__()
        if shift_place not in PLACES:
            raise ValueError(f"shift_place is {shift_place!r}; it must be among {PLACES}.")
        self.channels, self.checkpointing = channels, checkpointing
        in_stem = shift_place == "stem"
        self.stem = Stem(_conv_norm(channels, 64, 3, stride=2), shift if in_stem else None)
        self.shift, self.shift_place = None if in_stem else shift, shift_place
        stages, width = [], 64
        for number, expanded in enumerate((64, 128, 192, 256), start=1):
            pool = [nn.MaxPool3d(3, 2, 1)] if number > 1 else []  # the stem has the first
            squeezed = 32 * number
            first = Fire(width, squeezed, expanded, bypass=False)
            width = 2 * expanded
            stages.append(nn.Sequential(*pool, first, Fire(width, squeezed, expanded, bypass=True)))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, D, H, W) to (N, 512, ceil(D / 32), ceil(H / 32), ceil(W / 32))."""
        check_volume(x, self.channels)
        x = self.stem(self._shifted(x, "input"), self.checkpointing)
        for number, stage in enumerate(self.stages, start=1):
            x = self._shifted(run(stage, stage, self.checkpointing, x), f"stage{number}")
        return x

    def _shifted(self, x: Tensor, place: str) -> Tensor:
        return x if self.shift is None or self.shift_place != place else self.shift(x)


class SqueezeNet3D(nn.Module):
    """A classifier of volumes; with `shift` it is the paper's ShiftNet3D.

    3,660,034 parameters for two classes and one channel.

    Args:
        num_classes: Classes.
        channels: Of the input.
        shift: Shift3D, or None.
        checkpointing: As for `Trunk`.
        shift_place: As for `Trunk`.
    """

    def __init__(
        self,
        num_classes: int = 2,
        channels: int = 1,
        shift: Shift3D | None = None,
        checkpointing: bool = False,
        shift_place: str = "stem",
    ) -> None:
        super().__init__()
        self.trunk = Trunk(channels, shift, checkpointing, shift_place)
        self.head = nn.Sequential(
            nn.Dropout(0.3), nn.Conv3d(WIDTH, num_classes, 1), nn.ReLU(), *global_mean()
        )
        initialise(self, "fan_out")

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, D, H, W) of any size to (N, num_classes) logits."""
        return self.head(self.trunk(x))


def squeezenet3d(num_classes: int = 2, checkpointing: bool = False) -> SqueezeNet3D:
    """The paper's SqueezeNet3D, for one input channel."""
    return SqueezeNet3D(num_classes, checkpointing=checkpointing)


def shiftnet3d(
    num_classes: int = 2,
    shift: Shift3D | None = None,
    checkpointing: bool = False,
    shift_place: str = "stem",
) -> SqueezeNet3D:
    """The paper's ShiftNet3D, for one input channel; None is Shift3D as in the paper."""
    return SqueezeNet3D(num_classes, 1, shift or Shift3D(), checkpointing, shift_place)


def global_mean() -> list[nn.Module]:
    """Layers from (N, C, D, H, W) to the maps' means, (N, C)."""
    return [nn.AdaptiveAvgPool3d(1), nn.Flatten()]


def _conv_norm(
    channels: int, width: int, kernel: int, stride: int = 1, relu: bool = False
) -> ConvNorm:
    conv = nn.Conv3d(channels, width, kernel, stride, padding=kernel // 2)
    return ConvNorm(conv, eps=1e-3, momentum=0.01, relu=relu)
