"""Training and prediction: the paper's recipe (section 5.1) as defaults, on a CPU or on CUDA.

Every random number comes from the configured seed, the step and the place in the batch, so there is
no generator whose state could be lost: a training that was killed and started again gives the
numbers of one that ran through. Under `torchrun` the processes share each batch.
"""

import contextlib
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from covidmtl_core.augment import Augmentation, augment
from covidmtl_core.claims import write_atomically
from covidmtl_core.errors import DataError, ParameterError, TrainingError
from covidmtl_core.losses import (
    MeanLoss,
    MultitaskLoss,
    RandomWeightedLoss,
    UncertaintyLoss,
    task_losses,
)
from covidmtl_core.models import for_inference
from covidmtl_core.recipe import PAPER_STANDARDISATION, TrainConfig
from covidmtl_core.store import Patients

_FORMAT = 1
_REPORT_SECONDS = 60


@dataclass
class Trained:
    """A network that was trained, with what it takes to predict.

    Attributes:
        model: The network, in eval mode, on the device that it was trained on.
        config: How.
        history: A row an epoch: epoch (from 1), learning_rate, loss, and loss and mean weight of
            each task; for patients to validate by `validation_loss`, the mean over the tasks of
            `validation_loss_<task>`, and `validation_accuracy_<task>`; `samples_per_second`,
            `seconds`, `gib` (largest memory).
        scaling: Mean and standard deviation of the volumes; least and range of each feature.
        folder: Where its checkpoints lie.
    """

    model: nn.Module
    config: TrainConfig
    history: pd.DataFrame
    scaling: dict[str, Tensor]
    folder: Path


def fit(
    config: TrainConfig,
    patients: Patients,
    folder: str | os.PathLike[str],
    validation: Patients | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    keep_best: bool = True,
    start: Trained | None = None,
) -> Trained:
    """Train a network, or go on where an earlier call was stopped.

    In a subfolder of `folder` that is named by a hash of parameters and data lie `last.pt`,
    `best.pt` (least loss of `validation`) and `history.csv`, each replaced as a whole after every
    epoch.

    Args:
        config: What and how.
        patients: To train on.
        folder: Of this and other trainings.
        validation: Patients whose losses are noted after each epoch, and by whom the best epoch is
            chosen; None keeps the last epoch only, as the paper does.
        device: None takes CUDA where there is one.
        progress: Whether a line is printed after each epoch, and each minute in one.
        keep_best: False where `validation` are the test patients, whose losses are then noted and
            choose nothing: no `best.pt` is written.
        start: With `frozen_trunk`, the training whose trunk is taken.

    Returns:
        The network after the last epoch.

    Raises:
        ParameterError: The parameters do not fit the patients or the device.
        DataError: A volume or a checkpoint cannot be read, or another run works on the training.
        TrainingError: Memory ran out, or a loss is no longer a number.
    """
    group = _Group()
    target = _device(device, group)
    _check(config, patients)
    _check_shares(config, patients, group)
    if validation is not None:
        _check(config, validation)
    if config.sync_batchnorm and target.type == "cpu" and group.size > 1:
        raise ParameterError("sync_batchnorm is true, but torch has it for CUDA only.")
    if config.precision not in ("auto", "float32") and target.type == "cpu":
        raise ParameterError(
            f"precision is {config.precision}; a CPU trains in float32 only: it is no slower, and "
            "oneDNN's gradients in bf16 are wrong for maps of depth 2."
        )
    if config.frozen_trunk != (start is not None):
        raise ParameterError("frozen_trunk and a training to start from go together.")
    trunk: nn.Module | None = getattr(start.model, "trunk", None) if start else None
    if start is not None and trunk is None:
        raise ParameterError("the training to start from has no trunk to take.")
    patients = _given(config, patients, config.jitter)
    if validation is not None:
        validation = _given(config, validation)
        if not any(bool((validation.labels[task] >= 0).any()) for task in config.tasks):
            raise ParameterError("no validation patient has a label.")
    key = _key(config, patients, validation, target, group, trunk)
    run = Path(folder) / key
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{run} cannot be made ({error.strerror}).") from error
    lock = FileLock(run / ".lock", timeout=0) if group.rank == 0 else contextlib.nullcontext()
    devices = [target] if target.type == "cuda" else []
    try:
        with lock, torch.random.fork_rng(devices), _autotuned(config, target), _threads(config):
            run_of = config, patients, validation, run, key, target, group
            return _Run(*run_of, progress, keep_best, trunk).train()
    except Timeout:
        raise DataError(f"Another run is training in {run}: wait until it has ended.") from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ParameterError(
            f"crops of {config.crop} end in maps of one voxel, and where a part of a batch is one "
            f"patient no norm can work on that: take a larger crop, or another batch_size (now "
            f"{config.batch_size} of {len(patients)} patients) or micro_batches."
        ) from error
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(
            f"memory ran out on {target} with batch_size {config.batch_size}, micro_batches "
            f"{config.micro_batches} and crops of {config.crop}: set checkpointing to true and "
            f"call again to go on; or set micro_batches to {2 * config.micro_batches} or a smaller "
            "crop, with which the training begins anew."
        ) from error


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> Trained:
    """A trained network from its checkpoint.

    Args:
        path: `last.pt` or `best.pt`.
        device: None takes CUDA where there is one.

    Raises:
        DataError: The file is missing or damaged.
    """
    target = _device(device, _Group())
    saved = _read_checkpoint(Path(path), target)
    config = TrainConfig(**saved["config"])
    scaling = _on_cpu(saved["scaling"])
    model = config.make_model(len(scaling["feature_range"])).to(target)
    model.load_state_dict(saved["model"])
    return Trained(model.eval(), config, pd.DataFrame(saved["history"]), scaling, Path(path).parent)


def predict(trained: Trained, patients: Patients, batch_size: int | None = None) -> pd.DataFrame:
    """Probabilities of every class of every task.

    Args:
        trained: From `fit` or `load`.
        patients: Their centre crops are looked at.
        batch_size: Patients at a time; None takes as many as the training, or 1024 of features.

    Returns:
        Indexed by patient; columns `<task>_<class>`.

    Raises:
        ParameterError: The network takes what the patients do not have.
        DataError: A volume cannot be read.
    """
    config = trained.config
    _check(config, patients)
    patients = _given(config, patients)
    known = len(trained.scaling["feature_range"])
    if patients.features is not None and patients.features.shape[1] != known:
        raise ParameterError(
            f"the network knows {known} features, the patients have {patients.features.shape[1]}."
        )
    device = next(trained.model.parameters()).device
    model = for_inference(trained.model) if config.use_volume else trained.model.eval()
    usual = config.batch_size // config.micro_batches if config.use_volume else 1024
    size = batch_size or max(1, usual)
    keys: list[list[tuple[int, int | None]]] = [
        [(i, None) for i in range(first, min(first + size, len(patients)))]
        for first in range(0, len(patients), size)
    ]
    rows = []
    with torch.no_grad(), _threads(config):
        for batch in _loader(config, patients, keys, device):
            with _autocast(config, device):
                outputs = _forward(model, config, _prepared(batch, trained.scaling, device, None))
            shares = [outputs[task].float().softmax(1).cpu() for task in config.tasks]
            rows.append(torch.cat(shares, 1))
    columns = [f"{task}_{k}" for task, classes in config.tasks.items() for k in range(classes)]
    return pd.DataFrame(torch.cat(rows).numpy(), index=patients.ids, columns=columns).rename_axis(
        "patient_id"
    )


class _Group:
    """The processes that train together; one, unless started by torchrun."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


class _Step(nn.Module):
    """Network and loss in one, so that processes share the gradients of both."""

    def __init__(self, config: TrainConfig, model: nn.Module) -> None:
        super().__init__()
        self.config, self.model = config, model
        self.loss: MultitaskLoss = MeanLoss()
        if config.loss == "random":
            self.loss = RandomWeightedLoss(config.draws, torch.Generator())
        elif config.loss != "mean":
            self.loss = UncertaintyLoss(config.tasks)
            self.loss.requires_grad_(config.loss == "uncertainty")

    def forward(
        self, batch: dict[str, Any], step: int, part: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seed = self.config.seed
        if isinstance(self.loss, RandomWeightedLoss) and self.loss.generator:
            # Seeded by the step, so that all parts of a batch are weighted alike.
            self.loss.generator.manual_seed(_seed(seed, "loss", step))
        _seed_generators(_seed(seed, "network", step, part))  # of dropout and Shift3D
        outputs = _forward(self.model, self.config, batch)
        labels = {task: batch["labels"][task] for task in outputs}
        found = task_losses({task: output.float() for task, output in outputs.items()}, labels)
        if not found:
            return 0 * torch.stack([output.sum() for output in outputs.values()]).sum(), {}
        total = self.loss(found)
        return total, {task: loss.detach() for task, loss in found.items()}


class _Run:
    """One training, from its checkpoint to its end."""

    def __init__(
        self,
        config: TrainConfig,
        patients: Patients,
        validation: Patients | None,
        folder: Path,
        key: str,
        device: torch.device,
        group: _Group,
        progress: bool,
        keep_best: bool,
        trunk: nn.Module | None,
    ) -> None:
        self.config, self.patients, self.validation = config, patients, validation
        self.keep_best = keep_best
        self.folder, self.key, self.device, self.group = folder, key, device, group
        self.progress = progress and group.rank == 0
        self.epoch, self.history, self.best = 0, list[dict[str, Any]](), math.inf
        saved = None
        if (folder / "last.pt").exists():
            saved = _read_checkpoint(folder / "last.pt", device)
            if saved["key"] != key:
                raise DataError(f"{folder / 'last.pt'} is of another training: delete it.")
        self.scaling = _on_cpu(saved["scaling"]) if saved else _scaling(config, patients)
        torch.manual_seed(_seed(config.seed, "weights"))
        model = config.make_model(len(self.scaling["feature_range"]))
        if trunk is not None:
            model.get_submodule("trunk").load_state_dict(trunk.state_dict())
        if config.sync_batchnorm and group.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        layout = torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
        self.step = _Step(config, model).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.shared: nn.Module = self.step
        if group.size > 1:
            unknown = any(bool((known < 0).any()) for known in patients.labels.values())
            self.shared = DistributedDataParallel(self.step, find_unused_parameters=unknown)
        self.optimizer = torch.optim.SGD(
            [p for p in self.step.parameters() if p.requires_grad],
            config.learning_rate,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=_precision(config, device) == torch.float16
        )
        if saved:
            self.step.model.load_state_dict(saved["model"])
            self.step.loss.load_state_dict(saved["loss"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.epoch, self.history, self.best = saved["epoch"], saved["history"], saved["best"]
            self._write_history()

    def train(self) -> Trained:
        while self.epoch < self.config.epochs:
            row = self._train_epoch()
            self.epoch += 1
            looked_at = self.validation is not None or self.epoch == self.config.epochs
            if looked_at and self.config.refresh_norms:
                self._refresh_norms()
            if self.validation is not None:
                row |= self._validate()
            self.history.append(row)
            self._keep(row)
            if self.progress:
                print(self._line(row), flush=True)
        history = pd.DataFrame(self.history)
        model = self.step.model.eval()
        return Trained(model, self.config, history, self.scaling, self.folder)

    def _train_epoch(self) -> dict[str, Any]:
        config, group = self.config, self.group
        batches = _batches(config, len(self.patients), self.epoch)
        shares = [batch[group.rank :: group.size] for batch in batches]
        for settings in self.optimizer.param_groups:
            settings["lr"] = config.learning_rate_of(self.epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.shared.train()
        sums: dict[str, float] = {}
        started = reported = time.perf_counter()
        loader = _loader(config, self.patients, shares, self.device)
        for number, batch in enumerate(loader):
            whole = len(batches[number])
            done = self._one_step(batch, self.epoch * len(batches) + number, whole, number)
            for name, value in done.items():
                sums[name] = sums.get(name, 0.0) + value
            now = time.perf_counter()
            if self.progress and now - reported > _REPORT_SECONDS:
                reported = now
                rate = (number + 1) * config.batch_size / (now - started)
                print(
                    f"epoch {self.epoch + 1} of {config.epochs}, batch {number + 1} of "
                    f"{len(batches)}: {rate:.2f} samples/s, {_gib(self.device):.1f} GiB",
                    flush=True,
                )
        seconds = time.perf_counter() - started
        samples = sum(map(len, batches))
        means = {
            f"{kind}_{task}": sums[f"{kind}_{task}"] / sums[f"{of}_{task}"]
            for kind, of in (("loss", "known"), ("weight", "calls"))
            for task in config.tasks
            if sums.get(f"{of}_{task}")
        }
        return {
            "epoch": self.epoch + 1,
            "learning_rate": config.learning_rate_of(self.epoch),
            "loss": sums["loss"] / samples,
            **means,
            "samples_per_second": samples / seconds,
            "seconds": seconds,
            "gib": _gib(self.device),
        }

    def _one_step(
        self, batch: dict[str, Any], step: int, whole: int, number: int
    ) -> dict[str, float]:
        """Forward, backward and update.

        Returns:
            Sums over the batch: `loss` and, of each task, `loss` over the `known` labels and
            `weight` over the `calls` that had any.
        """
        config, group = self.config, self.group
        self.optimizer.zero_grad(set_to_none=True)
        parts = _parts(batch, config.micro_batches)
        sums: defaultdict[str, float] = defaultdict(float)
        for place, part in enumerate(parts):
            share = len(part["index"]) / whole
            hurry = group.size > 1 and place < len(parts) - 1
            wait = self.shared.no_sync() if hurry else contextlib.nullcontext()  # type: ignore[operator]
            with wait:
                with _autocast(config, self.device):
                    prepared = _prepared(part, self.scaling, self.device, config.augmentation)
                    total, losses = self.shared(
                        prepared, step, group.rank * config.micro_batches + place
                    )
                self._check_finite(total, losses, part, number)
                # The processes' gradients are averaged: so each gives its part of the whole.
                self.scaler.scale(total * share * group.size).backward()
            sums["loss"] += float(total.detach()) * len(part["index"])
            weights = self.step.loss.weights
            for task, loss in losses.items():
                known = int((part["labels"][task] >= 0).sum())
                sums[f"loss_{task}"] += float(loss) * known
                sums[f"known_{task}"] += known
                sums[f"weight_{task}"] += weights[task]
                sums[f"calls_{task}"] += 1
        self.scaler.step(self.optimizer)
        self.scaler.update()
        found: list[Any] = [sums]
        if group.size > 1:
            found *= group.size
            dist.all_gather_object(found, sums)
        return {name: sum(other[name] for other in found) for other in found for name in other}

    def _check_finite(
        self, total: Tensor, losses: dict[str, Tensor], part: dict[str, Any], number: int
    ) -> None:
        if torch.isfinite(total):
            return
        bad = [t for t, loss in losses.items() if not torch.isfinite(loss)]
        ids = ", ".join(str(self.patients.ids[i]) for i in part["index"].tolist())
        raise TrainingError(
            f"the loss of {', '.join(bad) or 'the tasks together'} is {total.item()} in epoch "
            f"{self.epoch + 1}, batch {number + 1} (patients {ids}): look at these patients' data, "
            "or lower learning_rate, with which the training begins anew; the checkpoint of the "
            "epoch before is kept."
        )

    def _refresh_norms(self) -> None:
        norms = [m for m in self.step.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms or not self.config.use_volume or self.config.frozen_trunk:
            return
        before = [norm.momentum for norm in norms]
        self.step.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        every: list[list[tuple[int, int | None]]] = [
            [(index, None) for index, _ in batch]
            for batch in _batches(replace(self.config, shuffle=False), len(self.patients), 0)
        ]
        with torch.no_grad():
            for batch in _loader(self.config, self.patients, every, self.device):
                for part in _parts(batch, self.config.micro_batches):
                    with _autocast(self.config, self.device):
                        prepared = _prepared(part, self.scaling, self.device, None)
                        _forward(self.step.model, self.config, prepared)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    def _validate(self) -> dict[str, float]:
        """Loss and accuracy of each task over the patients whose label is known."""
        assert self.validation is not None
        trained = Trained(self.step.model, self.config, pd.DataFrame(), self.scaling, self.folder)
        shares = torch.tensor(predict(trained, self.validation).to_numpy())
        found: dict[str, float] = {}
        widths = list(self.config.tasks.values())
        for task, part in zip(self.config.tasks, shares.split(widths, 1), strict=True):
            labels = self.validation.labels[task]
            known = labels >= 0
            if known.any():
                part, labels = part[known], labels[known]
                of_label = part.gather(1, labels[:, None]).clamp(min=1e-12)
                found[f"validation_loss_{task}"] = float(-of_label.log().mean())
                right = (part.argmax(1) == labels).double().mean()
                found[f"validation_accuracy_{task}"] = float(right)
        losses = [value for name, value in found.items() if "_loss_" in name]
        return {"validation_loss": sum(losses) / max(len(losses), 1)} | found

    def _keep(self, row: dict[str, Any]) -> None:
        if self.group.rank:
            return
        better = row.get("validation_loss", math.inf) < self.best
        self.best = min(self.best, row.get("validation_loss", math.inf))
        saved = {
            "format": _FORMAT,
            "key": self.key,
            "config": asdict(self.config),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
            "scaling": self.scaling,
            "model": self.step.model.state_dict(),
            "loss": self.step.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        for name in ["best.pt"] * (better and self.keep_best) + ["last.pt"]:
            part = self.folder / f".{name}.part"
            try:
                with part.open("wb") as stream:
                    torch.save(saved, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                part.replace(self.folder / name)
            except (OSError, RuntimeError) as error:  # torch turns one into the other
                part.unlink(missing_ok=True)
                reason = getattr(error, "strerror", None) or "torch gives no reason"
                raise DataError(
                    f"{self.folder / name} cannot be written ({reason}): is the disk full? The "
                    "epoch before is kept; call again to go on."
                ) from error
        self._write_history()

    def _write_history(self) -> None:
        if self.group.rank == 0:
            table = pd.DataFrame(self.history).to_csv(index=False, lineterminator="\n")
            write_atomically(self.folder / "history.csv", table)

    def _line(self, row: dict[str, Any]) -> str:
        parts = [f"{t} {row[f'loss_{t}']:.3f}" for t in self.config.tasks if f"loss_{t}" in row]
        if "validation_loss" in row:
            parts.append(f"validation {row['validation_loss']:.3f}")
        left = (self.config.epochs - self.epoch) * row["seconds"] / 60
        return (
            f"epoch {self.epoch} of {self.config.epochs}: loss {row['loss']:.4f} "
            f"({', '.join(parts)}), {row['samples_per_second']:.2f} samples/s, "
            f"{row['gib']:.1f} GiB, {left:.0f} min left"
        )


def _seed(*parts: Any) -> int:
    """A number of 62 bits for what is named."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 2


def _seed_generators(seed: int) -> None:
    """As `torch.manual_seed`, which on a machine without a card remembers each call for it."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def _batches(config: TrainConfig, n: int, epoch: int) -> list[list[tuple[int, int | None]]]:
    """Places of patients, and the seeds of their crops and augmentation, batch by batch."""
    generator = torch.Generator().manual_seed(_seed(config.seed, "order", epoch))
    order = torch.randperm(n, generator=generator).tolist() if config.shuffle else list(range(n))
    keys = [(i, _seed(config.seed, "sample", epoch, i)) for i in order]
    return [list(keys[k : k + config.batch_size]) for k in range(0, n, config.batch_size)]


def _loader(
    config: TrainConfig,
    patients: Patients,
    batches: Sequence[Sequence[tuple[int, int | None]]],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    workers = config.workers
    if workers is None:
        spare = (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        workers = min(4, spare) if device.type == "cuda" and patients.volumes is not None else 0
    try:
        yield from DataLoader(
            patients,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            prefetch_factor=2 if workers else None,
        )
    except DataError as error:  # from a worker it comes with a traceback as its text
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None


def _as_it_is(batch: Any) -> Any:
    return batch


def _parts(batch: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """A batch in parts, every so-manieth patient in one, as processes share it."""
    picks = [slice(k, None, number) for k in range(min(number, len(batch["index"])))]
    return [
        {
            "index": batch["index"][pick],
            "seed": batch["seed"][pick],
            "labels": {task: values[pick] for task, values in batch["labels"].items()},
            "features": None if batch["features"] is None else batch["features"][pick],
            "volume": None if batch["volume"] is None else batch["volume"][pick],
        }
        for pick in picks
    ]


def _prepared(
    batch: dict[str, Any],
    scaling: dict[str, Tensor],
    device: torch.device,
    augmentation: Augmentation | None,
) -> dict[str, Any]:
    """On the device, standardised, scaled and augmented."""
    ready: dict[str, Any] = {"volume": None, "features": None}
    if batch["volume"] is not None:
        mean, sd = scaling["volume"].tolist()
        volume = (batch["volume"].to(device, non_blocking=True).float() - mean) / sd
        if augmentation is not None:
            volume = augment(volume, batch["seed"], augmentation)
        ready["volume"] = volume
    if batch["features"] is not None:
        scaled = (batch["features"] - scaling["feature_least"]) / scaling["feature_range"]
        ready["features"] = scaled.float().to(device, non_blocking=True)
    ready["labels"] = {
        task: values.to(device, non_blocking=True) for task, values in batch["labels"].items()
    }
    return ready


def _forward(model: nn.Module, config: TrainConfig, batch: dict[str, Any]) -> dict[str, Tensor]:
    if config.model != "covid_mtl":
        return {task: model(batch["volume"]) for task in config.tasks}
    return model(batch["volume"], batch["features"])


def _scaling(config: TrainConfig, patients: Patients) -> dict[str, Tensor]:
    """By what volumes and features are scaled: of the training patients only."""
    mean_sd = PAPER_STANDARDISATION
    if config.standardise == "training" and config.use_volume:
        mean_sd = patients.standardisation()
    features = patients.features
    if features is None:
        features = torch.zeros(1, 1, dtype=torch.float64)
    least = features.amin(0)
    range_ = features.amax(0) - least
    return {
        "volume": torch.tensor(mean_sd, dtype=torch.float64),
        "feature_least": least,
        "feature_range": torch.where(range_ > 0, range_, 1.0),
    }


def _on_cpu(scaling: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in scaling.items()}


def _given(config: TrainConfig, patients: Patients, jitter: Sequence[int] = (0, 0, 0)) -> Patients:
    """The patients, with what the network takes of them."""
    given = patients.cropped(config.crop, jitter)
    given.volumes = given.volumes if config.use_volume else None
    given.features = given.features if config.use_features else None
    return given


def _check(config: TrainConfig, patients: Patients) -> None:
    """Do parameters and patients go together?"""
    if config.use_volume and patients.volumes is None:
        raise ParameterError("use_volume is true, but the patients have no volumes.")
    if config.use_features and patients.features is None:
        raise ParameterError("use_features is true, but the patients have no features.")
    for task, classes in config.tasks.items():
        if task not in patients.labels:
            raise ParameterError(f"there is no label {task!r}: {', '.join(patients.labels)}.")
        most = int(patients.labels[task].max())
        if most >= classes:
            raise ParameterError(f"{task} has {classes} classes, but a patient's is {most}.")


def _check_shares(config: TrainConfig, patients: Patients, group: _Group) -> None:
    """Has every process a patient of every batch?"""
    if config.batch_size < group.size:
        raise ParameterError(
            f"batch_size is {config.batch_size}; it must be at least {group.size}, the number of "
            "processes."
        )
    rest = len(patients) % config.batch_size
    if 0 < rest < group.size:
        raise ParameterError(
            f"the last batch has {rest} patients for {group.size} processes: change batch_size."
        )


def _key(
    config: TrainConfig,
    patients: Patients,
    validation: Patients | None,
    device: torch.device,
    group: _Group,
    trunk: nn.Module | None,
) -> str:
    settings = asdict(config) | {
        "workers": None,
        "autotune": None,
        "checkpointing": None,
        "tasks": list(config.tasks.items()),
        "precision": str(_precision(config, device)),
    }
    data = [p.fingerprint() for p in (patients, validation) if p is not None]
    if trunk is not None:
        found = hashlib.sha256()
        for value in trunk.state_dict().values():
            found.update(value.cpu().numpy().tobytes())
        data.append(found.hexdigest())
    text = json.dumps([_FORMAT, settings, group.size, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        if saved["format"] != _FORMAT:
            raise DataError(f"{path} is of another version of this package: train again.")
        return saved
    except FileNotFoundError:
        raise DataError(f"{path} is missing: train first, or name another file.") from None
    except DataError:
        raise
    except Exception as error:  # torch raises anything on a damaged file
        raise DataError(f"{path} is damaged: delete it and train again.") from error


def _device(device: str | torch.device | None, group: _Group) -> torch.device:
    if device is None:
        device = f"cuda:{group.local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ParameterError(f"device is {device!r}; it must be cpu or cuda.") from None
    if target.type not in ("cpu", "cuda"):
        raise ParameterError(f"device is {device!r}; it must be cpu or cuda.")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ParameterError("device is cuda, but torch finds none: run `covidmtl doctor`.")
        place = group.local_rank if target.index is None else target.index
        if place >= torch.cuda.device_count():
            raise ParameterError(
                f"there is no card {place}: torch finds {torch.cuda.device_count()}."
            )
        target = torch.device("cuda", place)
        torch.cuda.set_device(target)
    return target


def _precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    if config.precision != "auto":
        return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            config.precision
        ]
    # Cards before Ampere say that they have bf16, and emulate it slowly.
    native = torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if native else torch.float16


def _autocast(config: TrainConfig, device: torch.device) -> Any:
    precision = _precision(config, device)
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextlib.contextmanager
def _autotuned(config: TrainConfig, device: torch.device) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = config.autotune and device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def _threads(config: TrainConfig) -> Iterator[None]:
    """One for features alone: faster, and their results are those of any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if config.use_volume else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _gib(device: torch.device) -> float:
    """Largest memory taken so far, of the card or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError) or "t allocate memory" in str(error)
