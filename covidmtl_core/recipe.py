"""What is trained and how: the paper's recipe (section 5.1), and what may be changed of it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import yaml
from torch import nn

from covidmtl_core.augment import Augmentation
from covidmtl_core.errors import ParameterError
from covidmtl_core.models import (
    CovidMTL,
    decovnet,
    resnet3d34,
    shiftnet3d,
    squeezenet3d,
    transfer_severity,
)
from covidmtl_core.models.squeezenet3d import PLACES
from covidmtl_core.shift3d import Shift3D

PAPER_STANDARDISATION = (16.71, 85.17)
"""Mean and standard deviation in the authors' code: of all their patients, the test's included."""

_WITHOUT_SHIFT: dict[str, Callable[..., nn.Module]] = {
    "squeezenet3d": squeezenet3d,
    "resnet3d34": resnet3d34,
    "decovnet": decovnet,
}
_SINGLE_TASK = ("shiftnet3d", *_WITHOUT_SHIFT)


@dataclass(frozen=True)
class TrainConfig:
    """What is trained and how. The defaults are the paper's COVID-MTL on volumes.

    Attributes:
        model: covid_mtl, shiftnet3d, squeezenet3d, resnet3d34 or decovnet; all but the first take
            one task and volumes.
        tasks: Task to number of classes.
        use_volume: Give COVID-MTL volumes?
        use_features: Give COVID-MTL features?
        crop: Voxels (D, H, W) of a volume that a network is given.
        jitter: Voxels by which a crop for training lies off the volume's centre, at most, along
            each axis; the authors' code varies it by 50 to 60, in steps of 10.
        loss: random, uncertainty, mean; or uncertainty-as-released, whose weights are never
            learned.
        draws: The paper's n, of the random-weighted loss.
        shift: Shift3D in COVID-MTL or ShiftNet3D?
        shift_p: Probability that it shifts a sample.
        shift_max: Its longest shift, a share of the axis.
        shift_distribution: uniform or normal.
        shift_place: Where it sits: input, stem (behind the first convolution, the paper), stage1,
            stage2 or stage3 (behind a pair of Fire modules).
        shift_as_released: Its outcomes as the authors' code draws them.
        frozen_trunk: Take the trunk of a trained COVID-MTL, frozen, and learn severity by new
            layers (section 5.4)? See `start` of `training.fit`.
        epochs: Passes through the training patients.
        batch_size: Patients in a step, over all processes.
        micro_batches: Parts into which a process divides its share of a batch, one after the
            other: less memory, and norms that see a part only. 2 on one card are the paper's two.
        learning_rate: At the start; it falls along half a cosine.
        min_learning_rate: In the last epoch. The authors' code has it in its log only: 0.
        momentum: Nesterov's.
        weight_decay: Of all parameters.
        shuffle: A new order each epoch? The authors' code has none.
        augmentation: Of the volumes; None for none.
        standardise: training: by the training patients' mean and deviation; paper: by its own.
        sync_batchnorm: Shall norms see the whole batch of all processes? The paper's do not.
        refresh_norms: Take the norms' statistics anew over the training patients after the last
            epoch, and before each validation? For short trainings, in which their slow averages do
            not settle.
        precision: float32 or, on CUDA, bf16 or fp16 (with scaled gradients); auto is float32 on a
            CPU, and on CUDA bf16, or fp16 where the card has none.
        autotune: Let cuDNN try its algorithms? A misspelt flag keeps the authors' code from it.
        checkpointing: Compute activations twice to save memory?
        workers: Processes that load batches; None takes what suits the machine.
        seed: Of everything that is random.

    Raises:
        ParameterError: A value cannot be used.
    """

    model: str = "covid_mtl"
    tasks: dict[str, int] = field(default_factory=lambda: {"ct": 2, "nat": 2, "severity": 3})
    use_volume: bool = True
    use_features: bool = False
    crop: tuple[int, int, int] = (200, 250, 250)
    jitter: tuple[int, int, int] = (25, 30, 30)
    loss: str = "random"
    draws: int = 2
    shift: bool = True
    shift_p: float = 0.25
    shift_max: float = 0.2
    shift_distribution: str = "uniform"
    shift_place: str = "stem"
    shift_as_released: bool = False
    frozen_trunk: bool = False
    epochs: int = 80
    batch_size: int = 10
    micro_batches: int = 1
    learning_rate: float = 0.005
    min_learning_rate: float = 5e-5
    momentum: float = 0.9
    weight_decay: float = 5e-5
    shuffle: bool = True
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    standardise: str = "training"
    sync_batchnorm: bool = False
    refresh_norms: bool = False
    precision: str = "auto"
    autotune: bool = True
    checkpointing: bool = False
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.augmentation, dict):  # as files and checkpoints hold it
            try:
                object.__setattr__(self, "augmentation", Augmentation(**self.augmentation))
            except TypeError:
                names = ", ".join(Augmentation.__dataclass_fields__)
                raise ParameterError(
                    f"augmentation is {self.augmentation!r}; it may have {names}."
                ) from None
        self._check_types()
        choices = {
            "model": ("covid_mtl", *_SINGLE_TASK),
            "loss": ("random", "uncertainty", "uncertainty-as-released", "mean"),
            "standardise": ("training", "paper"),
            "shift_place": PLACES,
            "precision": ("auto", "float32", "bf16", "fp16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ParameterError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        for name in ("epochs", "batch_size", "micro_batches", "draws"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} is {getattr(self, name)!r}; it must be 1 or more.")
        for name, least in (("crop", 1), ("jitter", 0)):
            sizes = getattr(self, name)
            whole = isinstance(sizes, list | tuple) and all(
                isinstance(n, int | np.integer) and n >= least for n in sizes
            )
            if not whole or len(sizes) != 3:
                raise ParameterError(f"{name} is {sizes!r}; it must be three sizes in voxels.")
            object.__setattr__(self, name, tuple(map(int, sizes)))
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ParameterError(
                f"min_learning_rate is {self.min_learning_rate}; it must be from 0 to "
                f"learning_rate, {self.learning_rate}."
            )
        if not (isinstance(self.tasks, dict) and self.tasks) or not all(
            isinstance(classes, int | np.integer) and classes >= 2
            for classes in self.tasks.values()
        ):
            raise ParameterError(
                f"tasks are {self.tasks!r}; they must be names with their numbers of classes, at "
                "least 2."
            )
        tasks = {str(task): int(classes) for task, classes in self.tasks.items()}
        object.__setattr__(self, "tasks", tasks)
        if self.model in _SINGLE_TASK and len(self.tasks) > 1:
            raise ParameterError(
                f"{self.model} has one task, not {', '.join(self.tasks)}: name one, or covid_mtl."
            )
        if self.model in _SINGLE_TASK and (self.use_features or not self.use_volume):
            raise ParameterError(f"{self.model} takes volumes only: set use_features to false.")
        try:
            self._make_shift()
        except ValueError as error:
            raise ParameterError(f"Shift3D's {error}") from None
        if not (self.use_volume or self.use_features):
            raise ParameterError("use_volume and use_features are both false: set one.")
        if self.model == "shiftnet3d" and not self.shift:
            raise ParameterError("ShiftNet3D without shift is squeezenet3d: name that.")
        given = self.model, list(self.tasks), self.use_volume, self.use_features
        if self.frozen_trunk and given != ("covid_mtl", ["severity"], True, False):
            raise ParameterError(
                "frozen_trunk is for covid_mtl on volumes with the one task severity."
            )

    def _check_types(self) -> None:
        """Numbers become Python's own, which checkpoints can hold."""
        for setting in fields(self):
            name, value = setting.name, getattr(self, setting.name)
            if setting.type in (float, int):
                kind = int | np.integer if setting.type is int else int | float | np.number
                fits = isinstance(value, kind) and not isinstance(value, bool)
                if not (fits and 0 <= value < (2**63 if setting.type is int else math.inf)):
                    wanted = "a whole number" if setting.type is int else "a number"
                    raise ParameterError(f"{name} is {value!r}; it must be {wanted}, not negative.")
                object.__setattr__(self, name, setting.type(value))
            elif setting.type is bool and not isinstance(value, bool):
                raise ParameterError(f"{name} is {value!r}; it must be true or false.")
        if self.workers is not None and not (isinstance(self.workers, int) and self.workers >= 0):
            raise ParameterError(f"workers is {self.workers!r}; it must be 0 or more, or nothing.")
        if not isinstance(self.augmentation, Augmentation | None):
            raise ParameterError("augmentation must be an Augmentation, or nothing.")

    @classmethod
    def as_released(cls, **changes: Any) -> "TrainConfig":
        """The deviations of the authors' code from the paper, where they can be had."""
        released: dict[str, Any] = {
            "shuffle": False,
            "min_learning_rate": 0.0,
            "autotune": False,
            "standardise": "paper",
            "shift_as_released": True,
            "augmentation": Augmentation(flip_axis=0),
            "precision": "fp16",
        }
        return cls(**(released | changes))

    def make_model(self, n_features: int) -> nn.Module:
        """The network, with random weights from torch's default generator."""
        shift = self._make_shift() if self.shift else None
        place = self.checkpointing, self.shift_place
        if self.model == "covid_mtl":
            given = self.use_volume, self.use_features
            model = CovidMTL(self.tasks, n_features, *given, shift, *place)
            return transfer_severity(model, *self.tasks.values()) if self.frozen_trunk else model
        (classes,) = self.tasks.values()
        if self.model == "shiftnet3d":
            return shiftnet3d(classes, shift, *place)
        return _WITHOUT_SHIFT[self.model](classes, checkpointing=self.checkpointing)

    def _make_shift(self) -> Shift3D:
        settings = self.shift_max, self.shift_p, self.shift_distribution
        return Shift3D(*settings, as_released=self.shift_as_released)

    def learning_rate_of(self, epoch: int) -> float:
        """Of an epoch, counted from 0."""
        share = epoch / max(self.epochs - 1, 1)
        least = self.min_learning_rate
        return least + (self.learning_rate - least) * (1 + math.cos(math.pi * share)) / 2

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> "TrainConfig":
        """From texts as for `values_from`."""
        return cls(**cls.values_from(texts))

    @classmethod
    def values_from(cls, texts: Sequence[str]) -> dict[str, Any]:
        """From `name=value`, the value in YAML: `epochs=2`, `crop=[100, 124, 124]`, `shift=no`.

        Raises:
            ParameterError: A text is not of this kind, or names no attribute.
        """
        values: dict[str, Any] = {}
        for text in texts:
            name, _, value = text.partition("=")
            if name not in cls.__dataclass_fields__ or not value:
                names = ", ".join(cls.__dataclass_fields__)
                raise ParameterError(f"{text!r} is not name=value of one of {names}.")
            try:
                # YAML wants a point before an exponent.
                value = re.sub(r"(?<![\w.])(\d+)(?=[eE][-+]?\d)", r"\1.0", value)
                value = re.sub(r"(\d[eE])(?=\d)", r"\1+", value)
                values[name] = yaml.safe_load(value)
                if name == "augmentation":
                    values[name] = values[name] or None
            except yaml.YAMLError:
                raise ParameterError(f"{text!r} has a value that cannot be understood.") from None
        return values
