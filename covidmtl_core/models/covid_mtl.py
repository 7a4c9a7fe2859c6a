"""COVID-MTL, the paper's network: one trunk, several tasks (section 4, Fig 1)."""

import copy
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from covidmtl_core.models.layers import initialise
from covidmtl_core.models.squeezenet3d import WIDTH, Trunk, global_mean
from covidmtl_core.shift3d import Shift3D

TASK_WIDTH = 32
"""Values in which each task and the feature branch sum up what they see."""


class CovidMTL(nn.Module):
    """Several tasks from CT volumes, lung features, or both.

    Shared are the trunk (SqueezeNet3D with Shift3D) and the feature branch (the paper's auxiliary
    feed-forward network); each task has a volume head, whose output is joined with the feature
    branch's, and a linear classifier. For the paper's tasks it has 3,848,199 parameters with
    volumes and features, 3,708,487 with volumes and 139,719 with features.

    Args:
        tasks: Name to number of classes.
        n_features: Features of a patient.
        use_volume: Take CT volumes?
        use_features: Take features?
        shift: Shift3D behind the trunk's first convolution: True as in the paper, False without,
            or one of your own.
        checkpointing: Compute the trunk's activations again in the backward pass instead of
            keeping them.
        shift_place: One of `squeezenet3d.PLACES`; the paper's is behind the first convolution.

    Raises:
        ValueError: There is no task, or nothing to take.
    """

    def __init__(
        self,
        tasks: Mapping[str, int] | None = None,
        n_features: int = 375,
        use_volume: bool = True,
        use_features: bool = True,
        shift: Shift3D | bool | None = True,
        checkpointing: bool = False,
        shift_place: str = "stem",
    ) -> None:
        super().__init__()
        self.tasks = dict({"ct": 2, "nat": 2, "severity": 3} if tasks is None else tasks)
        if not self.tasks or not (use_volume or use_features):
            raise ValueError("COVID-MTL needs at least one task, and volumes or features.")
        self.n_features = n_features
        if isinstance(shift, bool):
            shift = Shift3D() if shift else None
        self.trunk = Trunk(1, shift, checkpointing, shift_place) if use_volume else None
        self.heads = nn.ModuleDict({t: _volume_head() for t in self.tasks} if use_volume else {})
        self.feature_branch = _feature_branch(n_features) if use_features else None
        width = TASK_WIDTH * (use_volume + use_features)
        self.classifiers = nn.ModuleDict(
            {task: nn.Linear(width, classes) for task, classes in self.tasks.items()}
        )
        self.frozen = False
        initialise(self, "fan_out")

    def forward(
        self, volume: Tensor | None = None, features: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits of each task.

        Args:
            volume: (N, 1, D, H, W) of any size, standardised; None if the network takes none.
            features: (N, n_features), scaled; None if the network takes none.

        Returns:
            Task to (N, classes).

        Raises:
            ValueError: An input is missing, superfluous or of a wrong shape.
        """
        for name, given, part in (
            ("volume", volume, self.trunk),
            ("features", features, self.feature_branch),
        ):
            if (given is None) != (part is None):
                verb = "takes no" if part is None else "needs"
                raise ValueError(f"this network {verb} {name}.")
        if features is not None and features.shape[1:] != (self.n_features,):
            raise ValueError(
                f"features have the shape {tuple(features.shape)}; it must be "
                f"(N, {self.n_features})."
            )
        if volume is not None and features is not None and len(volume) != len(features):
            raise ValueError(f"there are {len(volume)} volumes and {len(features)} features' rows.")
        seen = self.trunk(volume) if self.trunk is not None else None
        read = [self.feature_branch(features)] if self.feature_branch is not None else []
        logits = {}
        for task, classifier in self.classifiers.items():
            parts = read if seen is None else [self.heads[task](seen), *read]
            logits[task] = classifier(torch.relu(torch.cat(parts, 1)))
        return logits

    def train(self, mode: bool = True) -> "CovidMTL":
        """Training mode; a frozen trunk keeps its norms' statistics, and shifts all the same."""
        super().train(mode)
        if self.frozen and self.trunk is not None:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def transfer_severity(model: CovidMTL, num_classes: int = 3) -> CovidMTL:
    """A network for severity on the trunk of a trained one (section 5.4).

    The trunk's weights and norms are frozen, and the task layers are replaced by fully connected
    ones: 512 maps' means to 32 values to the classes. Shift3D, if the trunk has it, stays on in
    training, which the paper found to matter (Fig 10); set `network.trunk.stem.shift = None` to
    take it out. The paper does not state the layers' sizes; 32 is that of the layers replaced.

    Args:
        model: A trained network that takes volumes; it is not changed.
        num_classes: Classes of severity.

    Returns:
        A network with the one task `severity`.

    Raises:
        ValueError: The network takes no volumes.
    """
    if model.trunk is None:
        raise ValueError("there is no trunk to transfer: this network takes no volumes.")
    new = copy.deepcopy(model)
    new.trunk.requires_grad_(False)  # type: ignore[union-attr]
    new.frozen, new.tasks = True, {"severity": num_classes}
    head = nn.Sequential(*global_mean(), nn.Dropout(0.3), nn.Linear(WIDTH, TASK_WIDTH))
    width = next(iter(model.classifiers.values())).in_features
    new.heads = nn.ModuleDict({"severity": head})
    new.classifiers = nn.ModuleDict({"severity": nn.Linear(width, num_classes)})  # type: ignore[arg-type]
    return new.train(model.training)


def _volume_head() -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.3), nn.Conv3d(WIDTH, TASK_WIDTH, 1), nn.ReLU(), *global_mean()
    )


def _feature_branch(n_features: int) -> nn.Sequential:
    widths = [n_features, 256, 128, 64]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, TASK_WIDTH))
