"""Augmentation of a batch of volumes on its device (section 5.1), seeded for each sample.

What happens to a sample depends on its seed alone: not on its place in a batch, on the number of
processes, or on what was drawn before. The random crop belongs to reading (see `store`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covidmtl_core.errors import ParameterError


@dataclass(frozen=True)
class Augmentation:
    """Probabilities and sizes; together something happens to about 0.4 of the samples, as released.

    Raises:
        ParameterError: A value is out of its range.

    Attributes:
        noise: Probability of Gaussian noise.
        noise_sd: Largest standard deviation of the noise, in standard deviations of the volumes;
            it is drawn evenly from 0 to this.
        rotation: Probability of a rotation in the axial plane, by 90, 180 or 270 degrees; where
            height and width differ, by 180.
        flip: Probability of a flip.
        flip_axis: 0, 1 or 2 for depth, height or width; the width swaps left and right. The
            authors' code flips the depth, head to feet, which no patient does.
    """

    noise: float = 0.2
    noise_sd: float = 0.1
    rotation: float = 0.1
    flip: float = 0.15
    flip_axis: int = 2

    def __post_init__(self) -> None:
        for name in ("noise", "noise_sd", "rotation", "flip"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float | np.number)
                or not 0 <= value <= 1
            ):
                raise ParameterError(f"augmentation's {name} is {value!r}; it must be from 0 to 1.")
            object.__setattr__(self, name, float(value))
        if self.flip_axis not in (0, 1, 2):
            raise ParameterError(
                f"augmentation's flip_axis is {self.flip_axis!r}; it must be 0, 1 or 2."
            )


def augment(volumes: Tensor, seeds: Tensor, settings: Augmentation | None = None) -> Tensor:
    """Augment each volume by chance.

    Args:
        volumes: (N, 1, D, H, W), floating, standardised; not changed.
        seeds: (N,) int64.
        settings: None is the paper's.

    Returns:
        (N, 1, D, H, W); `volumes` itself if nothing happens to any.
    """
    settings = settings or Augmentation()
    changed = [
        _augment(volume, int(seed), settings)
        for volume, seed in zip(volumes, seeds.tolist(), strict=True)
    ]
    if all(new is None for new in changed):
        return volumes
    pairs = zip(volumes, changed, strict=True)
    return torch.stack([old if new is None else new for old, new in pairs])


def _augment(volume: Tensor, seed: int, settings: Augmentation) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    noise, rotation, flip, sd, turns = torch.rand(5, generator=generator).tolist()
    changed = None
    if noise < settings.noise:
        on_device = torch.Generator(volume.device).manual_seed(seed + 1)
        grains = torch.randn(
            volume.shape, generator=on_device, device=volume.device, dtype=torch.float32
        )
        changed = volume + (settings.noise_sd * sd * grains).to(volume.dtype)
    if rotation < settings.rotation:
        square = volume.shape[-1] == volume.shape[-2]
        times = 1 + int(3 * turns) if square else 2
        changed = torch.rot90(volume if changed is None else changed, times, (-2, -1))
    if flip < settings.flip:
        changed = torch.flip(volume if changed is None else changed, (settings.flip_axis - 3,))
    return changed
