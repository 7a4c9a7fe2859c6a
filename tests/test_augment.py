"""Augmentation: seeded for each sample, and as often as it should be."""

import pytest
import torch

from covidmtl_core.augment import Augmentation, augment

NEVER = {"noise": 0.0, "rotation": 0.0, "flip": 0.0}


def volumes(n: int = 4, height: int = 6) -> torch.Tensor:
    return torch.randn(n, 1, 5, height, 6, generator=torch.Generator().manual_seed(0))


def test_a_sample_depends_on_its_seed_alone() -> None:
    x, seeds = volumes(8), torch.arange(8) + 100
    before = x.clone()
    whole = augment(x, seeds)
    assert torch.equal(x, before)
    for k in range(8):
        assert torch.equal(augment(x[k : k + 1], seeds[k : k + 1]), whole[k : k + 1])


def test_nothing_drawn_is_the_same_tensor() -> None:
    x = volumes()
    assert augment(x, torch.arange(4), Augmentation(**NEVER)) is x


@pytest.mark.parametrize(("kind", "share"), [("noise", 0.2), ("rotation", 0.1), ("flip", 0.15)])
def test_each_comes_as_often_as_its_probability(kind: str, share: float) -> None:
    n = 2000
    x = volumes(1).expand(n, -1, -1, -1, -1)
    new = augment(x, torch.arange(n), Augmentation(**(NEVER | {kind: share})))
    changed = (new != x).flatten(1).any(1).float().mean()
    assert abs(float(changed) - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_rotations_stay_in_the_plane_and_flips_on_their_axis() -> None:
    for height, turns in ((6, (1, 2, 3)), (8, (2,))):
        x = volumes(1, height)
        found = set()
        for seed in range(60):
            new = augment(x, torch.tensor([seed]), Augmentation(**(NEVER | {"rotation": 1.0})))
            found |= {k for k in turns if torch.equal(new[0], torch.rot90(x[0], k, (-2, -1)))}
        assert found == set(turns)
    x = volumes(1)
    for axis in range(3):
        settings = Augmentation(**(NEVER | {"flip": 1.0}), flip_axis=axis)
        assert torch.equal(augment(x, torch.tensor([3]), settings), x.flip(axis + 2))


def test_noise_has_the_deviation_it_should() -> None:
    x = torch.zeros(1, 1, 40, 40, 40)
    settings = Augmentation(**(NEVER | {"noise": 1.0}), noise_sd=0.4)
    deviations = [augment(x, torch.tensor([seed]), settings).std() for seed in range(200)]
    assert float(max(deviations)) < 0.405
    assert float(torch.stack(deviations).mean()) == pytest.approx(0.2, abs=0.03)
