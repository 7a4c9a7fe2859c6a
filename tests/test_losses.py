"""The multitask losses against theory and by hand."""

import pytest
import torch
from torch import nn

from covidmtl_core.losses import MeanLoss, RandomWeightedLoss, UncertaintyLoss, task_losses


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(*values: float) -> dict[str, torch.Tensor]:
    return {f"task {k}": torch.tensor(v, requires_grad=True) for k, v in enumerate(values)}


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("draws", [1, 2, 7])
def test_random_weights_have_the_moments_of_dirichlet_means(tasks: int, draws: int) -> None:
    loss = RandomWeightedLoss(draws, generator())
    names = [str(k) for k in range(tasks)]
    calls = 4000
    weights = torch.stack([loss.weigh(names) for _ in range(calls)])
    assert torch.allclose(weights.sum(1), torch.ones(calls, dtype=torch.float64))
    assert (weights >= 0).all()
    variance = (tasks - 1) / (tasks**2 * (tasks + 1) * draws)
    assert (weights.mean(0) - 1 / tasks).abs().max() < 4.5 * (variance / calls) ** 0.5
    assert (weights.var(0) / variance - 1).abs().max() < 0.15
    covariance = -variance / (tasks - 1)
    found = torch.cov(weights.T)[0, 1] / covariance
    assert abs(float(found) - 1) < 0.2


def test_one_draw_for_two_tasks_is_uniform() -> None:
    loss = RandomWeightedLoss(1, generator())
    weights = torch.stack([loss.weigh(["a", "b"])[0] for _ in range(4000)]).sort().values
    ideal = (torch.arange(4000) + 0.5) / 4000
    assert (weights - ideal).abs().max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, P = 0.001


def test_many_draws_become_the_mean_loss() -> None:
    values = losses(1.0, 5.0, 30.0)
    total = RandomWeightedLoss(200_000, generator())(values)
    assert total.item() == pytest.approx(MeanLoss()(values).item(), rel=0.01)


def test_weights_are_readable_and_multiply_losses_and_gradients() -> None:
    values = losses(2.0, 3.0, 4.0)
    for loss in (MeanLoss(), RandomWeightedLoss(2, generator()), UncertaintyLoss(values)):
        total = loss(values)
        assert list(loss.weights) == list(values)
        by_hand = sum(loss.weights[t] * values[t].item() for t in values)
        assert total.item() == pytest.approx(by_hand, rel=1e-6)
        grads = torch.autograd.grad(total, list(values.values()))
        assert [g.item() for g in grads] == pytest.approx(list(loss.weights.values()), rel=1e-6)


def test_weights_are_new_at_each_call_and_fixed_by_a_seed() -> None:
    values = losses(1.0, 2.0)
    one, other = RandomWeightedLoss(2, generator(3)), RandomWeightedLoss(2, generator(3))
    seen = []
    for _ in range(3):
        one(values), other(values)
        assert one.weights == other.weights
        seen.append(one.weights["task 0"])
    assert len(set(seen)) == 3
    torch.manual_seed(4)
    first = RandomWeightedLoss()(values).item()
    torch.manual_seed(4)
    assert RandomWeightedLoss()(values).item() == first


def test_a_missing_task_leaves_weights_to_the_others() -> None:
    values = losses(1.0, 2.0, 3.0)
    del values["task 1"]
    for loss in (MeanLoss(), RandomWeightedLoss(2, generator())):
        loss(values)
        assert sum(loss.weights.values()) == pytest.approx(1) and len(loss.weights) == 2
    uncertain = UncertaintyLoss(["task 0", "task 1", "task 2"])
    uncertain(values).backward()
    assert uncertain.log_variances["task 1"].grad is None


def test_uncertainty_loss_finds_the_log_of_the_losses() -> None:
    values = {"a": torch.tensor(0.5), "b": torch.tensor(4.0), "size": torch.tensor(9.0)}
    loss = UncertaintyLoss(values, regressions=["size"])
    optimiser = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(2000):
        optimiser.zero_grad()
        loss(values).backward()
        optimiser.step()
    # exp(-s) L + s / 2 is least at s = log(2 L); with half the loss, at s = log(L).
    wanted = {"a": 1.0, "b": 8.0, "size": 9.0}
    for task, variance in wanted.items():
        assert loss.log_variances[task].exp().item() == pytest.approx(variance, rel=1e-3)


def test_uncertainty_loss_that_never_learns_is_the_mean_loss() -> None:
    values = losses(2.0, 3.0, 7.0)
    assert UncertaintyLoss(values)(values).item() == pytest.approx(MeanLoss()(values).item())


def test_task_losses_mix_classification_and_regression_and_mask() -> None:
    logits = torch.randn(4, 3, generator=generator(), requires_grad=True)
    ages = torch.randn(4, 1, generator=generator(1), requires_grad=True)
    targets = {
        "severity": torch.tensor([0, -1, 2, -100]),
        "age": torch.tensor([1.0, float("nan"), 3.0, float("nan")]),
    }
    found = task_losses({"severity": logits, "age": ages}, targets)
    picked = -torch.log_softmax(logits, 1)[[0, 2], [0, 2]].mean()
    assert found["severity"].item() == pytest.approx(picked.item(), rel=1e-6)
    squares = ((ages[[0, 2], 0] - torch.tensor([1.0, 3.0])) ** 2).mean()
    assert found["age"].item() == pytest.approx(squares.item(), rel=1e-6)
    MeanLoss()(found).backward()
    for grad in (logits.grad, ages.grad):
        assert grad is not None and grad.isfinite().all()
        assert (grad[[1, 3]] == 0).all() and (grad[[0, 2]] != 0).any()


def test_a_batch_without_labels_of_a_task_leaves_it_out() -> None:
    outputs = {"ct": torch.randn(2, 2), "nat": torch.randn(2, 2)}
    unknown = torch.tensor([-1, -1])
    assert list(task_losses(outputs, {"ct": torch.tensor([0, 1]), "nat": unknown})) == ["ct"]
    nothing = task_losses(outputs, {"ct": unknown, "nat": unknown})
    with pytest.raises(ValueError, match="no task loss"):
        MeanLoss()(nothing)


def test_half_precision_losses_are_summed_in_single() -> None:
    values = {"a": torch.tensor(1.0).bfloat16(), "b": torch.tensor(2.0).bfloat16()}
    assert MeanLoss()(values).dtype == torch.float32


def test_the_sum_stays_in_single_precision_under_autocast() -> None:
    values = losses(1000.3, 2.3)
    with torch.autocast("cpu", torch.bfloat16):
        total = MeanLoss()(values)
    assert total.dtype == torch.float32 and total.item() == pytest.approx(501.3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_classes_of_any_integer_type(dtype: torch.dtype) -> None:
    assert "ct" in task_losses({"ct": torch.randn(2, 2)}, {"ct": torch.tensor([0, 1], dtype=dtype)})


def test_wrong_uses_are_named() -> None:
    with pytest.raises(ValueError, match="of a regression"):
        task_losses({"age": torch.randn(2, 2)}, {"age": torch.tensor([0.5, 1.5])})
    with pytest.raises(ValueError, match=r"\(N, classes\)"):
        task_losses({"ct": torch.randn(2)}, {"ct": torch.tensor([0, 1])})
    outputs = {"ct": torch.randn(2, 2)}
    with pytest.raises(ValueError, match="'nat'"):
        task_losses(outputs, {"nat": torch.tensor([0, 1])})
    with pytest.raises(ValueError, match=r"\(2, 2\) asks for \(2,\)"):
        task_losses(outputs, {"ct": torch.tensor([0, 1, 1])})
    with pytest.raises(ValueError, match="draws is 0"):
        RandomWeightedLoss(0)
    with pytest.raises(ValueError, match="'a' has the shape"):
        MeanLoss()({"a": torch.ones(3)})
    with pytest.raises(ValueError, match="'b'"):
        UncertaintyLoss(["a"])({"b": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="regressions"):
        UncertaintyLoss(["a"], ["b"])


def test_uncertainty_parameters_are_there_before_the_optimiser() -> None:
    model = nn.ModuleDict({"loss": UncertaintyLoss(["ct", "nat"])})
    assert sum(p.numel() for p in model.parameters()) == 2
