"""Joining the losses of several tasks to one (section 4.3): random-weighted, uncertainty, mean.

All take a dict of task losses, as from `task_losses`, and return their weighted sum; the weights
of the last call stay readable. This module needs torch alone.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn


def task_losses(outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss of each task over the samples whose label is known (Eq 3).

    Args:
        outputs: (N, classes) logits of a classification, or (N,) or (N, 1) values of a regression.
        targets: (N,) of the same tasks: classes as integers, negative where unknown; or values of
            a regression as floats, NaN where unknown.

    Returns:
        Cross-entropy or mean squared error of each task. A task of which the batch has no label
        is left out, so that it neither counts nor spoils the sum.

    Raises:
        ValueError: The tasks differ, or a target's shape does not fit its output.
    """
    if outputs.keys() != targets.keys():
        raise ValueError(f"outputs have tasks {sorted(outputs)}, targets {sorted(targets)}.")
    losses = {}
    for task, output in outputs.items():
        target = targets[task]
        if target.shape != output.shape[:1]:
            raise ValueError(
                f"the target of {task!r} has the shape {tuple(target.shape)}; the output "
                f"{tuple(output.shape)} asks for {tuple(output.shape[:1])}."
            )
        regression = target.is_floating_point()
        if output[:1].numel() != len(output[:1]) if regression else output.dim() != 2:
            wanted = "(N,) or (N, 1) of a regression" if regression else "(N, classes)"
            raise ValueError(
                f"the output of {task!r} has the shape {tuple(output.shape)}; it must be {wanted}."
            )
        known = ~target.isnan() if regression else target >= 0
        if not known.any():
            continue
        output, target = output[known], target[known]
        if regression:
            losses[task] = F.mse_loss(output.reshape(target.shape), target.to(output.dtype))
        else:
            losses[task] = F.cross_entropy(output, target.long())
    return losses


class MultitaskLoss(nn.Module):
    """What the three losses have in common."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[list[str], Tensor] = [], torch.empty(0)

    @property
    def weights(self) -> dict[str, float]:
        """Task to weight, as the last call used them."""
        tasks, weights = self._last
        return dict(zip(tasks, weights.tolist(), strict=True))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The total loss.

        Args:
            losses: Task to its loss, a number. Tasks may be missing in a batch.

        Returns:
            The weighted sum, a number, in float32 or finer.

        Raises:
            ValueError: There is no task, or a loss is not a number.
        """
        if not losses:
            raise ValueError("there is no task loss: no sample of the batch has a label.")
        for task, loss in losses.items():
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss of {task!r} has the shape {tuple(loss.shape)}; it must be a number."
                )
        values = torch.stack([loss.reshape(()) for loss in losses.values()])
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        weights = self.weigh(list(losses))
        self._last = list(losses), weights.detach()
        return (weights.to(values) * values).sum()  # `@` would be half precision under autocast

    def weigh(self, tasks: list[str]) -> Tensor:
        """(K,) weights for the tasks of a call."""
        raise NotImplementedError


class MeanLoss(MultitaskLoss):
    """The mean of the task losses: each weight is 1 / K."""

    def weigh(self, tasks: list[str]) -> Tensor:
        """(K,) equal weights."""
        return torch.full((len(tasks),), 1 / len(tasks))


class RandomWeightedLoss(MultitaskLoss):
    """The paper's loss: weights drawn anew at each call (Eq 4 to 6).

    They are the mean of `draws` draws from the Dirichlet distribution whose concentrations are
    all 1, over the tasks of the call. A weight has the mean 1 / K and the variance
    (K - 1) / (K^2 (K + 1) draws): with many draws this is `MeanLoss`. For two tasks and one draw
    it is the paper's special case, p and 1 - p with a uniform p (Eq 5).

    Args:
        draws: The paper's n, at least 1; the paper uses 2.
        generator: Where the random numbers come from; None is torch's default generator. Give
            processes that train together equally seeded ones, so that they weight alike.

    Raises:
        ValueError: `draws` is less than 1.
    """

    def __init__(self, draws: int = 2, generator: Generator | None = None) -> None:
        super().__init__()
        if draws < 1:
            raise ValueError(f"draws is {draws}; it must be at least 1.")
        self.draws, self.generator = draws, generator

    def weigh(self, tasks: list[str]) -> Tensor:
        """(K,) random weights that sum to 1."""
        device = "cpu" if self.generator is None else self.generator.device
        shares = torch.empty(self.draws, len(tasks), dtype=torch.float64, device=device)
        shares.exponential_(generator=self.generator)
        return (shares / shares.sum(1, keepdim=True)).mean(0)


class UncertaintyLoss(MultitaskLoss):
    """Kendall et al.'s loss (reference [31]): weights learned from each task's uncertainty.

    The mean over tasks of exp(-s) L + s / 2, where s, the logarithm of a task's variance, is
    learned; the loss of a regression counts half. `weights` are what the losses are multiplied by.
    The parameters `log_variances` must be given to the optimiser, which the authors' code forgets:
    its s stay 0, and its loss is the mean loss.

    Args:
        tasks: Their names; known beforehand, so that the parameters exist before the optimiser.
        regressions: Those of them whose loss is a squared error.

    Raises:
        ValueError: There is no task, or a regression is not among them.
    """

    def __init__(self, tasks: Collection[str], regressions: Collection[str] = ()) -> None:
        super().__init__()
        if not tasks or not set(regressions) <= set(tasks):
            raise ValueError(
                f"tasks are {sorted(tasks)} and regressions {sorted(regressions)}; there must be "
                "a task, and regressions must be tasks."
            )
        self.log_variances = nn.ParameterDict({t: nn.Parameter(torch.zeros(())) for t in tasks})
        self.regressions = frozenset(regressions)

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The total loss; see `MultitaskLoss.forward`."""
        unknown = losses.keys() - set(self.log_variances)
        if unknown:
            raise ValueError(f"{sorted(unknown)} were not among the tasks given at the start.")
        total = super().forward(losses)
        penalty = torch.stack([self.log_variances[task] for task in losses]).mean() / 2
        return total + penalty.to(total)

    def weigh(self, tasks: list[str]) -> Tensor:
        """(K,) weights, exp(-s) / K."""
        shares = torch.tensor([0.5 if task in self.regressions else 1.0 for task in tasks])
        log_variances = torch.stack([self.log_variances[task] for task in tasks])
        return torch.exp(-log_variances) * shares.to(log_variances) / len(tasks)
