import pytest
import torch

from covidmtl_core.errors import ParameterError
from covidmtl_core.explain import class_activation_map, enlarged, mass_inside
from covidmtl_core.models import CovidMTL


@pytest.fixture(scope="module")
def model() -> CovidMTL:
    torch.manual_seed(0)
    return CovidMTL(use_features=False).eval()


@pytest.mark.parametrize("task, pair", [("ct", (1, 0)), ("severity", (2, 0))])
def test_the_map_sums_up_to_the_logit(model: CovidMTL, task: str, pair: tuple[int, int]) -> None:
    volume = torch.randn(2, 1, 40, 33, 37)
    found = class_activation_map(model, volume, task, *pair)
    with torch.no_grad():
        logits = model(volume)[task]
    bias = model.classifiers[task].bias
    expected = logits[:, pair[0]] - logits[:, pair[1]] - (bias[pair[0]] - bias[pair[1]])
    torch.testing.assert_close(found.mean((1, 2, 3)), expected.detach(), atol=1e-5, rtol=1e-4)


def test_features_leave_the_volume_its_part() -> None:
    torch.manual_seed(1)
    model = CovidMTL(n_features=5).train()
    volume, features = torch.randn(1, 1, 40, 40, 40), torch.randn(1, 5)
    exact = class_activation_map(model, volume, "nat")
    fine = class_activation_map(model, volume, "nat", layer="trunk.stages.1", features=features)
    assert exact.shape == (1, 2, 2, 2) and fine.shape == (1, 5, 5, 5)
    assert model.training and not exact.requires_grad and not fine.requires_grad


def test_gradients_times_activations_of_the_head_are_the_exact_map(model: CovidMTL) -> None:
    """Behind the head's ReLU both ways are the same, so one checks the other."""
    volume = torch.randn(1, 1, 40, 40, 40)
    exact = class_activation_map(model, volume, "ct")
    other = class_activation_map(model, volume, "ct", layer="heads.ct.2")
    torch.testing.assert_close(exact, other, atol=1e-5, rtol=1e-4)


def test_mass_inside_compares_with_the_regions_share() -> None:
    lungs = torch.ones(4, 4, 4, dtype=torch.bool)
    lesions = torch.zeros(4, 4, 4, dtype=torch.bool)
    lesions[0] = True
    assert mass_inside(torch.ones(4, 4, 4), lesions, lungs) == (0.25, 0.25)
    assert mass_inside(lesions.float() - 0.5, lesions, lungs) == (1.0, 0.25)
    lungs[0] = False
    assert mass_inside(torch.ones(4, 4, 4), lesions, lungs) == (0.0, 0.0)
    with pytest.raises(ParameterError):
        mass_inside(-torch.ones(4, 4, 4), lesions, lungs)


def test_enlarged_keeps_the_mean() -> None:
    found = torch.rand(1, 2, 2, 2)
    big = enlarged(found, (8, 8, 8))
    assert big.shape == (1, 8, 8, 8)
    torch.testing.assert_close(big.mean(), found.mean())


def test_unknown_task_and_layer_are_named(model: CovidMTL) -> None:
    with pytest.raises(ParameterError, match="age"):
        class_activation_map(model, torch.randn(1, 1, 40, 40, 40), "age")
    with pytest.raises(ParameterError, match=r"trunk\.roof"):
        class_activation_map(model, torch.randn(1, 1, 40, 40, 40), "ct", layer="trunk.roof")
