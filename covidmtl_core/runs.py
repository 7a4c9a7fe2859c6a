"""Whole runs as the command line starts them: training with its test; a look at the machine."""

import platform
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import torch
import torch.distributed as dist

from covidmtl_core import cohort, training
from covidmtl_core.claims import write_atomically
from covidmtl_core.errors import DataError
from covidmtl_core.evaluation import classification_metrics
from covidmtl_core.losses import MeanLoss, task_losses
from covidmtl_core.models import CovidMTL
from covidmtl_core.recipe import TrainConfig
from covidmtl_core.shift3d import _fast_path
from covidmtl_core.store import Patients, load_preprocessed

_GIB_FIRST, _GIB_NEXT = 2.3, 1.2
"""Peak of a training step at full size on a CPU, measured: one volume, and each more (to three)."""


def train(source: Path, target: Path, config: TrainConfig, device: str | None = None) -> None:
    """Train, predict the test patients, print and keep how well.

    Beside the checkpoints (see `training.fit`) lie `predictions.csv` and `metrics.csv`.

    Args:
        source: See `store.load_preprocessed`.
        target: Folder of runs.
        config: What and how.
        device: As for `training.fit`.
    """
    scans, features, volumes = load_preprocessed(source)
    ids = cohort.split(scans)
    missing = [task for task in config.tasks if task not in scans]
    if missing:
        raise DataError(f"{source / 'scans.csv'} has no column {missing[0]!r}.")
    sides = [
        Patients(
            scans.loc[side, list(config.tasks)],
            features if config.use_features else None,
            volumes if config.use_volume else None,
        )
        for side in ids
    ]
    trained = training.fit(config, sides[0], target, device=device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        predicted = training.predict(trained, sides[1])
        measures = {}
        for task, classes in config.tasks.items():
            known = scans.loc[ids[1], task].dropna()
            known = known[known >= 0]
            columns = [f"{task}_{k}" for k in range(classes)]
            if known.nunique() == classes:
                measures[task] = classification_metrics(
                    known.astype(int), predicted.loc[known.index, columns]
                )
        table = pd.DataFrame(measures).T.rename_axis("task")
        for name, written in (("predictions", predicted), ("metrics", table)):
            text = written.to_csv(lineterminator="\n")
            write_atomically(trained.folder / f"{name}.csv", text)
        print(table.to_string(float_format="{:.3f}".format))
        print(f"Checkpoints, history, predictions and metrics: {trained.folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


def predict(checkpoint: Path, source: Path, device: str | None = None) -> pd.DataFrame:
    """What a trained network says of every ready scan of a folder; see `training.predict`.

    Args:
        checkpoint: See `training.load`.
        source: See `store.load_preprocessed`; labels are not looked at.
        device: None takes CUDA where there is one.
    """
    trained = training.load(checkpoint, device)
    config = trained.config
    scans, features, volumes = load_preprocessed(source)
    unknown = pd.DataFrame(-1, index=scans.index, columns=list(config.tasks))
    patients = Patients(
        unknown,
        features if config.use_features else None,
        volumes if config.use_volume else None,
    )
    return training.predict(trained, patients)


def doctor() -> Iterator[str]:
    """What this machine can train, line by line; short training steps are run."""
    memory = psutil.virtual_memory().available / 2**30
    yield f"Python {platform.python_version()}, torch {torch.__version__}"
    yield f"CPU: {torch.get_num_threads()} threads, {memory:.1f} GiB of memory free"
    cards = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    for card in cards:
        kind = "bf16" if card.major >= 8 else "fp16 with scaled gradients"
        yield f"CUDA: {card.name}, {card.total_memory / 2**30:.1f} GiB, trains in {kind}"
    device = torch.device("cuda" if cards else "cpu")
    fast = "its fast path" if _fast_path(device.type) else "plain PyTorch (slower, same numbers)"
    yield f"Shift3D runs on {device.type} by {fast}"
    seconds = _step_seconds(device)
    hours = 8 * seconds * 930 * 80 / 3600
    yield (
        f"A training step of COVID-MTL on one volume of 100x125x125 takes {seconds:.2f} s here; "
        f"at 200x250x250 eight times that, so the paper's 80 epochs of 930 patients take about "
        f"{hours:,.0f} h"
    )
    if not cards:
        fits = int((memory - _GIB_FIRST) / _GIB_NEXT) + 1 if memory > _GIB_FIRST else 0
        if fits >= 10:
            yield "The paper's batch of 10 fits into memory"
        elif fits:
            parts = -(-10 // fits)
            yield f"About {fits} volumes fit at once: train with --set micro_batches={parts}"
        else:
            yield "A volume of 200x250x250 does not fit: train with --set crop=[100,125,125]"


def _step_seconds(device: torch.device) -> float:
    """Median time of three training steps at an eighth of the paper's volume, in float32."""
    model = CovidMTL(use_features=False).to(device).train()
    volume = torch.randn(1, 1, 100, 125, 125, device=device)
    labels = {task: torch.zeros(1, dtype=torch.int64, device=device) for task in model.tasks}
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        MeanLoss()(task_losses(model(volume), labels)).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return sorted(times[1:])[1]
