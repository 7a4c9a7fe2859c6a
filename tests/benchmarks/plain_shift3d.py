"""Shift3D and SqueezeNet3D in the plainest PyTorch: what ours must equal and is timed against."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def released_outcome(size: tuple[int, int, int], rng: random.Random) -> tuple[int, int]:
    """Axis and signed distance of one map, drawn as the authors' code draws them."""
    axis = rng.randint(0, 2)
    distance = rng.randint(0, int(0.2 * size[axis]))
    return axis, -distance if rng.randint(0, 1) else distance


def one_map(x: Tensor, axis: int, distance: int, padding_value: float | None) -> Tensor:
    """A (D, H, W) map shifted by `torch.roll`, then padded."""
    shifted = torch.roll(x, distance, axis)
    if padding_value is not None and distance:
        new = [slice(None)] * 3
        new[axis] = slice(0, distance) if distance > 0 else slice(distance, None)
        shifted[tuple(new)] = padding_value
    return shifted


def loop(x: Tensor, axis: Tensor, distance: Tensor, padding_value: float | None = None) -> Tensor:
    """Map by map, written into a copy, as autograd records it."""
    shifted = x * 1
    for n in range(x.shape[0]):
        if distance[n].any():
            for c in range(x.shape[1]):
                by = int(axis[n, c]), int(distance[n, c])
                shifted[n, c] = one_map(x[n, c], *by, padding_value)
    return shifted


class PlainFire(nn.Module):
    def __init__(self, channels: int, squeezed: int, expanded: int, bypass: bool) -> None:
        super().__init__()
        self.squeeze = plain_conv(channels, squeezed, 1)
        self.one = plain_conv(squeezed, expanded, 1)
        self.three = plain_conv(squeezed, expanded, 3)
        self.bypass = bypass

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.squeeze(x))
        y = torch.cat([self.one(y), self.three(y)], 1)
        return F.relu(y + x if self.bypass else y)


def plain_conv(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv3d(channels, width, kernel, stride, kernel // 2)
    return nn.Sequential(conv, nn.BatchNorm3d(width, 1e-3, 0.01))


def plain_squeezenet3d(num_classes: int = 2) -> nn.Sequential:
    """SqueezeNet3D without Shift3D; its parameters come in the order of ours."""
    layers: list[nn.Module] = [plain_conv(1, 64, 3, 2), nn.ReLU()]
    width = 64
    for squeezed, expanded in ((32, 64), (64, 128), (96, 192), (128, 256)):
        layers += [nn.MaxPool3d(3, 2, 1), PlainFire(width, squeezed, expanded, False)]
        width = 2 * expanded
        layers += [PlainFire(width, squeezed, expanded, True)]
    head = [nn.Dropout(0.3), nn.Conv3d(512, num_classes, 1), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.AdaptiveAvgPool3d(1), nn.Flatten())
