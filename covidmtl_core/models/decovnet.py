"""deCoVNet, a network for COVID-19 by others that the paper compares with (reference [19])."""

import torch.nn.functional as F
from torch import Tensor, nn

from covidmtl_core.models.layers import ConvNorm, check_volume, run


class Bottleneck(nn.Module):
    """A residual block that is narrow inside: a kernel along z, one in the plane, one of 1.

    Args:
        channels: Maps that come in.
        width: Maps that go out.
        inner: Maps inside.
        stride: In the plane.
    """

    def __init__(self, channels: int, width: int, inner: int, stride: int) -> None:
        super().__init__()
        self.along = _conv_norm(channels, inner, (3, 1, 1), relu=True)
        self.within = _conv_norm(inner, inner, (1, 3, 3), (1, stride, stride), relu=True)
        self.widen = _conv_norm(inner, width, (1, 1, 1))
        self.shortcut = _conv_norm(channels, width, (1, 1, 1), (1, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, D, H, W) to (N, width, D, H / stride, W / stride)."""
        y = self.within(self.along(x))
        return F.relu(self.widen(y) + self.shortcut(x), inplace=True)


class DeCoVNet(nn.Module):
    """A stem, two residual blocks, and a classifier that pools step by step.

    343,058 parameters for two classes.

    Args:
        num_classes: Classes.
        checkpointing: Compute activations again in the backward pass instead of keeping them.
    """

    def __init__(self, num_classes: int = 2, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        stem = nn.Sequential(
            _conv_norm(1, 16, (5, 7, 7), (1, 2, 2), relu=True),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        pool = nn.MaxPool3d((2, 1, 1), ceil_mode=True)
        self.stages = nn.ModuleList(
            [stem, Bottleneck(16, 64, 16, 1), nn.Sequential(pool, Bottleneck(64, 128, 32, 2))]
        )
        layers: list[nn.Module] = [nn.AdaptiveMaxPool3d((16, 24, 36))]
        for channels, width, size in ((128, 64, (4, 12, 18)), (64, 32, (1, 6, 9)), (32, 32, 1)):
            layers += [nn.Conv3d(channels, width, 3, padding=1), nn.ReLU()]
            layers += [nn.AdaptiveMaxPool3d(size)]
        layers += [nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, num_classes)]
        self.head = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) of any size to (N, num_classes) logits."""
        check_volume(x, 1)
        for stage in self.stages:
            x = run(stage, stage, self.checkpointing, x)
        return self.head(x)


def decovnet(num_classes: int = 2, checkpointing: bool = False) -> DeCoVNet:
    """deCoVNet for one input channel."""
    return DeCoVNet(num_classes, checkpointing)


def _conv_norm(
    channels: int,
    width: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int] = (1, 1, 1),
    relu: bool = False,
) -> ConvNorm:
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return ConvNorm(nn.Conv3d(channels, width, kernel, stride, padding, bias=False), relu=relu)
