"""ResNet3D-34, the largest network that the paper compares with (section 5.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from covidmtl_core.models.layers import ConvNorm, Stem, check_volume, initialise, run
from covidmtl_core.shift3d import Shift3D


class BasicBlock(nn.Module):
    """Two convolutions of size 3 around which the input is passed.

    Args:
        channels: Maps that come in.
        width: Maps that go out.
        stride: Of the first convolution.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(channels, width, 3, stride, relu=True)
        self.second = _conv_norm(width, width, 3)
        same = channels == width and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, D, H, W) to (N, width, D / stride, H / stride, W / stride)."""
        y = self.second(self.first(x))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet3D(nn.Module):
    """A residual network of basic blocks, each stage of stride 2.

    Args:
        blocks: Blocks of each stage.
        num_classes: Classes.
        shift: Shift3D behind the first convolution, or None.
        checkpointing: Compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        num_classes: int = 2,
        shift: Shift3D | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = Stem(_conv_norm(1, 64, 5, 2), shift)
        stages, channels = [], 64
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            first = BasicBlock(channels, width, stride=2)
            rest = [BasicBlock(width, width, stride=1) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, num_classes)
        )
        initialise(self, "fan_in")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) of any size to (N, num_classes) logits."""
        check_volume(x, 1)
        x = self.stem(x, self.checkpointing)
        for stage in self.stages:
            x = run(stage, stage, self.checkpointing, x)
        return self.head(x)


def resnet3d34(
    num_classes: int = 2, shift: Shift3D | None = None, checkpointing: bool = False
) -> ResNet3D:
    """ResNet3D-34 as released: 63,460,930 parameters for two classes."""
    return ResNet3D((3, 4, 6, 3), num_classes, shift, checkpointing)


def _conv_norm(
    channels: int, width: int, kernel: int, stride: int = 1, relu: bool = False
) -> ConvNorm:
    conv = nn.Conv3d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    return ConvNorm(conv, momentum=0.01, relu=relu)
