"""The paper's trainings by name (sections 5.3, 5.4 and 7), on a reader's scans or on phantoms.

A name is a network and what is changed of it: `covid_mtl` is the paper's, `covid_mtl.noshift` lacks
Shift3D, `shiftnet3d.nat` is the single-task network for NAT. Every training is kept by
`training.fit`, so that what one chapter trained another reads, and what was stopped goes on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from filelock import FileLock
from joblib import Parallel, delayed

from covidmtl_core import book, evaluation, phantom, phantom_cohort, segmentation, store
from covidmtl_core.boxes import bounds
from covidmtl_core.cohort import TASKS, check_tier, load_cohort, load_features, split
from covidmtl_core.errors import DataError, ParameterError
from covidmtl_core.recipe import TrainConfig
from covidmtl_core.training import Trained, fit, predict

SINGLE_TASK = ("resnet3d34", "squeezenet3d", "decovnet", "shiftnet3d")

QUICK: dict[str, Any] = {
    "crop": (44, 36, 44),
    "jitter": (3, 3, 3),
    "refresh_norms": True,
    "workers": 0,
}
"""What trainings on phantoms change of the paper's recipe, besides their number of epochs."""

QUICK_MM = 6.0
"""Voxel size of the phantoms."""

_OF_THE_MACHINE = {"micro_batches", "checkpointing", "precision", "autotune", "workers"}
"""Settings of `recipe.TrainConfig` that a machine may ask for, not the recipe."""

_THE_PAPERS = [
    (229, 701),
    (397, 533),
    (397, 398, 135),
    (102, 297),
    (171, 228),
    (171, 164, 64),
]

_CLASSICAL_MM = 3.0
"""Voxel size at which the classical method looks for their lungs; coarser, it loses one."""


def _catalogue() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for model, (task, classes) in product(SINGLE_TASK, TASKS.items()):
        found[f"{model}.{task}"] = {"model": model, "tasks": {task: classes}}
    found |= {
        "covid_mtl": {},
        "covid_mtl.features": {"use_features": True},
        "covid_mtl.noshift": {"shift": False},
    }
    for loss in ("mean", "uncertainty"):
        found[f"covid_mtl.{loss}"] = {"loss": loss}
        found[f"covid_mtl.{loss}.noshift"] = {"loss": loss, "shift": False}
    found["diagnosis"] = {"tasks": {task: TASKS[task] for task in ("ct", "nat")}}
    transfer = {"tasks": {"severity": TASKS["severity"]}, "frozen_trunk": True}
    found["transfer"] = transfer
    found["transfer.noshift"] = transfer | {"shift": False}
    for task, classes in TASKS.items():
        of_task = {"model": "shiftnet3d", "tasks": {task: classes}}
        found[f"shiftnet3d.{task}.gaussian"] = of_task | {"shift_distribution": "normal"}
        found[f"shiftnet3d.{task}.classical"] = of_task
    found["covid_mtl.classical"] = {}
    features_only = {"use_volume": False, "use_features": True}
    found["covid_mtl.features_only"] = features_only
    for loss in ("mean", "uncertainty"):
        found[f"covid_mtl.features_only.{loss}"] = features_only | {"loss": loss}
    found["covid_mtl.features_only.unshuffled"] = features_only | {"shuffle": False}
    for draws in (1, 5, 20):
        found[f"covid_mtl.draws-{draws}"] = {"draws": draws}
    for percent in (10, 50, 100):
        found[f"covid_mtl.p-{percent}"] = {"shift_p": percent / 100}
    for place in ("input", "stage1", "stage2", "stage3"):
        found[f"covid_mtl.{place}"] = {"shift_place": place}
    return found


CATALOGUE = _catalogue()
"""Name to what it changes of `recipe.TrainConfig`. Those ending in `classical` change the lungs."""

_SHOWN = {
    "diagnosis": (
        *(f"{model}.{task}" for model in SINGLE_TASK for task in ("ct", "nat")),
        "covid_mtl",
        "covid_mtl.features",
    ),
    "severity": (
        *(f"{model}.severity" for model in SINGLE_TASK),
        "covid_mtl",
        "covid_mtl.features",
        "transfer",
        "transfer.noshift",
    ),
    "ablations": tuple(name for name in CATALOGUE if "features_only" not in name),
    "case_study": ("covid_mtl",),
}


def of_chapter(chapter: str, classical: bool = True) -> list[str]:
    """Networks on volumes that a chapter shows; it trains all where it has a reader's scans.

    Args:
        chapter: Its name; one that trains none has none.
        classical: Are there lungs of the classical method?
    """
    names = _SHOWN.get(chapter, ())
    return [name for name in names if classical or not name.endswith(".classical")]


_WORDS = {
    "resnet3d34": "ResNet3D-34",
    "squeezenet3d": "SqueezeNet3D",
    "decovnet": "deCoVNet",
    "shiftnet3d": "ShiftNet3D",
    "covid_mtl": "COVID-MTL",
    "features": "with features",
    "features_only": "features only",
    "noshift": "without Shift3D",
    "mean": "mean loss",
    "uncertainty": "uncertainty loss",
    "gaussian": "Gaussian shifts",
    "classical": "classical lungs",
    "unshuffled": "never shuffled",
    "diagnosis": "COVID-MTL, two tasks",
    "transfer": "Transfer learning",
    "input": "shifting the input",
    **{f"stage{k}": f"shifting behind Fire {2 * k}" for k in (1, 2, 3)},
}


def title(name: str) -> str:
    """An experiment in words, without its task: "COVID-MTL, mean loss"."""
    words = []
    for part in name.split("."):
        kind, _, number = part.partition("-")
        if number:
            words.append(f"n = {number}" if kind == "draws" else f"p = {int(number) / 100:g}")
        elif part not in TASKS:
            words.append(_WORDS[part])
    return ", ".join(words)


@dataclass(frozen=True)
class Scans:
    """Patients with scans made ready, and who of them is trained on.

    Attributes:
        table: Indexed by patient: `ct`, `nat`, `severity`.
        features: The 375 features.
        volumes: Patient to folder (see `store.Volume`).
        train: Patients to train on.
        test: Patients to test on.
        data: `phantom`, `released` (features alone) or `volumes`.
        preprocessing: Voxel size and segmentation method, where `covidmtl preprocess` was used.
    """

    table: pd.DataFrame
    features: pd.DataFrame
    volumes: dict[Any, Path]
    train: pd.Index
    test: pd.Index
    data: str
    preprocessing: dict[str, Any] = field(default_factory=dict)

    @property
    def are_the_papers(self) -> bool:
        """Are these the paper's scans and split, as far as voxel size, lungs and labels tell?"""
        sides = [self.table.loc[side] for side in (self.train, self.test)]
        counts = [
            tuple(side[task].value_counts().get(k, 0) for k in range(n))
            for side in sides
            for task, n in TASKS.items()
        ]
        made = self.preprocessing.get("spacing_mm"), self.preprocessing.get("method")
        return counts == _THE_PAPERS and made in ((1.0, "refined"), (1.0, "released"))

    def patients(self, ids: pd.Index, config: TrainConfig) -> store.Patients:
        """Some of the patients, with what a network is given."""
        features = self.features if config.use_features else None
        volumes = self.volumes if config.use_volume else None
        return store.Patients(self.table.loc[ids, list(config.tasks)], features, volumes)


@dataclass(frozen=True)
class Results:
    """What trainings said of the test patients, and what they cost.

    Attributes:
        truth: Indexed by patient, labels of the test patients.
        predictions: Indexed by `experiment`, `seed` and `patient_id`; columns `<task>_<class>`.
        history: Indexed by `experiment`, `seed` and `epoch`; losses and accuracies of
            `training.Trained.history`, those of the test patients named `test_...`.
        costs: Indexed by `experiment` and `seed`: `training_seconds`, `inference_seconds`, `gib`,
            and where the results were recorded `device`, `torch`, `commit` and `date`.
        circumstances: Patients, voxel size and settings, where the results were recorded.
    """

    truth: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame
    costs: pd.DataFrame
    circumstances: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What recorded results were computed on, with what and when, in one line."""
        facts = self.circumstances
        seeds = ", ".join(map(str, sorted(self.costs.index.unique("seed"))))
        said = {name: ", ".join(sorted(set(self.costs[name]))) for name in _RECORDED_WITH}
        return (
            f"Recorded on phantoms: {facts['patients']['training']} to train, "
            f"{facts['patients']['test']} to test, {facts['mm']:g} mm, "
            f"{facts['settings']['epochs']} epochs, {len(self.costs)} trainings with seeds "
            f"{seeds}; {said['device']}, {said['date']}, torch {said['torch']}, commit "
            f"{said['commit']}."
        )

    def probabilities(self, experiment: str, seed: int, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Labels (n,) and probabilities (n, classes) of the test patients whose label is known."""
        columns = [f"{task}_{k}" for k in range(TASKS[task])]
        found = self.predictions.loc[(experiment, seed), columns]
        labels = self.truth.loc[found.index, task]
        known = (labels.notna() & (labels >= 0)).to_numpy(bool)
        return labels[known].to_numpy(int), found[known].to_numpy(float)

    def metrics(self) -> pd.DataFrame:
        """`evaluation.classification_metrics` by `experiment`, `task` and `seed`."""
        rows = {}
        for experiment, seed in self.costs.index:
            row = self.predictions.loc[(experiment, seed)].iloc[0]
            for task in TASKS:
                if f"{task}_0" in row and pd.notna(row[f"{task}_0"]):
                    measured = evaluation.classification_metrics(
                        *self.probabilities(experiment, seed, task)
                    )
                    rows[experiment, task, seed] = measured
        return pd.DataFrame(rows).T.rename_axis(["experiment", "task", "seed"])


def phantom_scans(n_patients: int, lungs: str = "refined", mm: float = QUICK_MM) -> Scans:
    """The phantom cohort's first patients, scanned, segmented and cropped; kept among the results.

    Args:
        n_patients: How many.
        lungs: Segmentation method.
        mm: Voxel size.

    Raises:
        ParameterError: There are not so many, or too few for every class to be tested on.
    """
    cohort = phantom_cohort.cohort()
    if not 20 <= n_patients <= len(cohort):
        raise ParameterError(f"n_patients is {n_patients}; it must be from 20 to {len(cohort)}.")
    table = cohort.iloc[:n_patients]
    volumes = _made(phantom_cohort.patient, table.index, lungs, mm, "")
    train, test = split(table)
    features = phantom_cohort.features().loc[table.index]
    return Scans(table[list(TASKS)], features, volumes, train, test, "phantom")


def other_scanner_scans(n_patients: int, mm: float = QUICK_MM) -> dict[Any, Path]:
    """Volumes of infected phantoms of another site (see `phantom_cohort.other_scanner`)."""
    ids = pd.RangeIndex(1, n_patients + 1)
    return _made(phantom_cohort.other_scanner, ids, "refined", mm, "other-")


def volume_scans(data_root: str | Path) -> Scans:
    """A reader's scans, made ready by `covidmtl preprocess`.

    Raises:
        DataError: The folder is not one of preprocessed scans, a label is missing, or a class has
            no patient to train or to test on.
    """
    table = load_cohort("volumes", data_root)
    sides = split(table)
    for side, (task, classes) in product((0, 1), TASKS.items()):
        counts = table.loc[sides[side], task].value_counts()
        lost = [k for k in range(classes) if counts.get(k, 0) < 2]
        if lost:
            raise DataError(
                f"{data_root} has fewer than two {('training', 'test')[side]} patients of {task} "
                f"{lost[0]}: chapters need every class on both sides; set column `split` of the "
                "labels so."
            )
    _, features, volumes = store.load_preprocessed(data_root)
    made = store.load_settings(data_root)
    return Scans(table[list(TASKS)], features, dict(volumes), *sides, "volumes", made)


def _made(
    patient_of: Callable[[int], phantom.Patient], ids: pd.Index, lungs: str, mm: float, prefix: str
) -> dict[Any, Path]:
    sources = [
        Path(str(module.__file__)) for module in (phantom, phantom_cohort, segmentation, store)
    ]
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    root = book.results_root() / "phantoms" / f"{mm:g}mm-{lungs}-{code}"
    root.mkdir(parents=True, exist_ok=True)
    paths = {int(k): root / f"{prefix}{k}" for k in ids}
    with FileLock(root / ".lock"):
        missing = [k for k, path in paths.items() if not (path / "done").is_file()]
        Parallel(n_jobs=-1)(delayed(_make)(patient_of(k), lungs, mm, paths[k]) for k in missing)
    return paths


def _make(patient: phantom.Patient, lungs: str, mm: float, folder: Path) -> None:
    torch.set_num_threads(1)
    scan = _scanned(patient, mm)
    if lungs == "classical":
        mask = segmentation.segment_lungs(_scanned(patient, _CLASSICAL_MM).image, lungs, 1)
        mask = sitk.Resample(mask, scan.image, sitk.Transform(), sitk.sitkNearestNeighbor)
    else:
        mask = segmentation.segment_lungs(scan.image, lungs, 1)
    box = bounds(sitk.GetArrayViewFromImage(mask) > 0, 2)[::-1]
    for name, image in (("volume", scan.image), ("lungs", mask), ("lesions", scan.lesions)):
        store.write(image[box], folder / f"{name}.b2nd")
    (folder / "done").touch()


def _scanned(patient: phantom.Patient, mm: float) -> phantom.Phantom:
    return phantom.make_phantom(patient, [round(n / mm) for n in phantom.SIZE], mm)


@dataclass(frozen=True)
class Study:
    """Scans, and the recipe that the experiments on them share.

    Attributes:
        scans: To train and test on.
        settings: What is changed of `recipe.TrainConfig` in all experiments.
        folder: Where trainings are kept.
        classical: The same patients with lungs of the classical method, where there are any.
        device: As for `training.fit`.
    """

    scans: Scans
    settings: dict[str, Any]
    folder: Path
    classical: Callable[[], Scans] | None = None
    device: str | None = None

    @property
    def is_the_papers(self) -> bool:
        """Are these the paper's patients and its recipe, in all that may change the results?"""
        default, own = asdict(TrainConfig()), asdict(TrainConfig(**self.settings))
        changed = {name for name, value in own.items() if value != default[name]}
        halves = own["micro_batches"] <= 2  # the paper's two cards
        return self.scans.are_the_papers and changed <= _OF_THE_MACHINE and halves

    def config(self, name: str, seed: int) -> TrainConfig:
        """The recipe of an experiment.

        Raises:
            ParameterError: The name is not in `CATALOGUE`.
        """
        if name not in CATALOGUE:
            raise ParameterError(
                f"there is no experiment {name!r}; there are {', '.join(CATALOGUE)}."
            )
        changes = CATALOGUE[name]
        epochs = {}
        if changes.get("frozen_trunk"):  # the paper's 50 epochs after 80, or the same share
            whole = self.settings.get("epochs", TrainConfig.epochs)
            epochs = {"epochs": max(1, round(whole * 50 / 80))}
        return TrainConfig(**(self.settings | {"seed": seed} | epochs | changes))

    def train(self, name: str, seed: int = 0, progress: bool = True) -> Trained:
        """Train an experiment's network, or read it where it was trained before."""
        config = self.config(name, seed)
        scans = self._scans(name)
        start = self.train("diagnosis", seed, progress) if config.frozen_trunk else None
        self.folder.mkdir(parents=True, exist_ok=True)
        sides = [scans.patients(ids, config) for ids in (scans.train, scans.test)]
        with FileLock(self.folder / f".{name}-{seed}.lock"):  # whoever comes second reads
            return fit(
                config,
                sides[0],
                self.folder,
                validation=sides[1],
                keep_best=False,
                device=self.device,
                progress=progress,
                start=start,
            )

    def run(
        self, names: Iterable[str], seeds: Sequence[int] = (0,), progress: bool = True
    ) -> Results:
        """Train what is named, with each seed, and predict the test patients.

        Raises:
            ParameterError: A name or a setting cannot be used; said before anything is trained.
        """
        if isinstance(names, str):
            raise ParameterError(f"networks are {names!r}; give a list: -y 'networks: [{names}]'.")
        names = list(names)
        for name in names:
            self.config(name, 0)
            self._scans(name)
        predictions, histories, costs = {}, {}, {}
        for seed, name in product(seeds, names):
            if progress:
                print(f"{name}, seed {seed}", flush=True)
            trained = self.train(name, seed, progress)
            scans = self._scans(name)
            begun = time.perf_counter()
            found = predict(trained, scans.patients(scans.test, trained.config))
            seconds = time.perf_counter() - begun
            history = trained.history.set_index("epoch")
            predictions[name, seed] = found
            costs[name, seed] = {
                "training_seconds": history["seconds"].sum(),
                "inference_seconds": seconds,
                "gib": history["gib"].max(),
            }
            kept = history.filter(regex="loss|accuracy")
            kept.columns = kept.columns.str.replace("validation", "test")
            histories[name, seed] = kept
        levels = ["experiment", "seed"]
        columns = [f"{task}_{k}" for task, n in TASKS.items() for k in range(n)]
        return Results(
            self.scans.table.loc[self.scans.test],
            pd.concat(predictions, names=[*levels, "patient_id"])
            .reindex(columns=columns)
            .sort_index(),
            pd.concat(histories, names=[*levels, "epoch"]).sort_index(),
            pd.DataFrame(costs).T.rename_axis(levels),
        )

    def _scans(self, name: str) -> Scans:
        if not name.endswith(".classical"):
            return self.scans
        if self.classical is None:
            raise ParameterError(f"{name} needs scans with lungs of the classical method.")
        return self.classical()


def study(
    tier: str,
    n_patients: int,
    n_epochs: int,
    data_root: str | Path | None = None,
    classical_root: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    device: str | None = None,
) -> Study:
    """The study of a tier: the reader's scans in `volumes`, else phantoms.

    Args:
        tier: See `cohort.TIERS`.
        n_patients: Phantoms; of the reader's scans all are taken.
        n_epochs: Epochs of a training.
        data_root: Folder that `covidmtl preprocess` made, in tier `volumes`.
        classical_root: The same patients, made with `--method classical`.
        settings: What else is changed of `recipe.TrainConfig`: `{"micro_batches": 2}`.
        device: As for `training.fit`.

    Raises:
        ParameterError: A size, a setting or a folder cannot be used.
        DataError: A folder is not one of preprocessed scans.
    """
    check_tier(tier, data_root)
    folder = book.results_root() / tier / "trainings"
    if tier == "volumes":
        scans = volume_scans(str(data_root))
        found = Study(scans, {"epochs": n_epochs}, folder, None, device)
        if classical_root is not None:
            _, _, volumes = store.load_preprocessed(classical_root)
            lost = [patient for patient in scans.table.index if patient not in volumes]
            if lost:
                raise DataError(f"{classical_root} lacks {len(lost)} patients, first {lost[0]}.")
            found = replace(found, classical=lambda: replace(scans, volumes=volumes))
    else:
        found = phantom_study(n_patients, n_epochs, folder, device=device)
    check_settings(settings)
    changed = replace(found, settings=found.settings | (settings or {}))
    changed.config("covid_mtl", 0)
    return changed


def check_settings(settings: Any) -> None:
    """Reject what `study` cannot take as settings.

    Raises:
        ParameterError: They are not names of `recipe.TrainConfig` with values that it takes.
    """
    if settings is None:
        return
    if not isinstance(settings, dict):
        raise ParameterError(f"settings is {settings!r}; it must be like {{micro_batches: 2}}.")
    unknown = settings.keys() - TrainConfig.__dataclass_fields__
    if unknown:
        raise ParameterError(
            f"settings name {', '.join(map(str, unknown))}; there are "
            f"{', '.join(TrainConfig.__dataclass_fields__)}."
        )
    TrainConfig(**settings)


def phantom_study(
    n_patients: int,
    n_epochs: int,
    folder: Path,
    mm: float = QUICK_MM,
    device: str | None = None,
) -> Study:
    """A study of phantoms; arguments as for `study` and `phantom_scans`."""
    scale = QUICK_MM / mm
    settings = QUICK | {"epochs": n_epochs}
    for name in ("crop", "jitter"):
        settings[name] = tuple(round(n * scale) for n in QUICK[name])
    return Study(
        phantom_scans(n_patients, mm=mm),
        settings,
        folder,
        lambda: phantom_scans(n_patients, "classical", mm),
        device,
    )


def feature_study(tier: str, n_epochs: int, data_root: str | Path | None = None) -> Study:
    """A study of features alone: of the tier's whole cohort, without volumes.

    Raises:
        ParameterError: The tier is unknown, or its folder is not named.
        DataError: The tables cannot be had.
    """
    table, features = load_cohort(tier, data_root), load_features(tier, data_root)
    scans = Scans(table[list(TASKS)], features, {}, *split(table), tier)
    return Study(
        scans, {"epochs": n_epochs}, book.results_root() / tier / "trainings", device="cpu"
    )


# --- the whole grid, recorded -----------------------------------------------------------------


def grid(
    on: Study,
    names: Sequence[str] = tuple(CATALOGUE),
    seeds: Sequence[int] = (0,),
    minutes: float = float("inf"),
    n_jobs: int = 1,
) -> Results:
    """Many trainings, one seed after the other, in several processes; see also `Study.run`.

    Args:
        on: Scans and recipe.
        names: Of `CATALOGUE`.
        seeds: Of each.
        minutes: None is begun later.
        n_jobs: Trainings at once, on one thread each if there are several.
    """
    last = time.monotonic() + 60 * minutes
    jobs = [(name, seed) for seed in seeds for name in names]
    # First what others start from; last what takes long: deCoVNet, and finding classical lungs.
    slow = {name: name.endswith("classical") or name.startswith("decovnet") for name in names}
    jobs.sort(key=lambda job: (slow[job[0]], job[1], job[0] != "diagnosis"))
    done = Parallel(n_jobs=n_jobs, batch_size=1, pre_dispatch="n_jobs", return_as="generator")(
        delayed(_one)(on, name, seed, last, n_jobs != 1) for name, seed in jobs
    )
    found: list[Results] = []
    for (name, seed), result in zip(jobs, done, strict=True):
        if result is not None:
            found.append(result)
            print(f"{len(found)} of {len(jobs)}: {name}, seed {seed}", flush=True)
    if not found:
        raise ParameterError(f"minutes is {minutes}: not one training was begun.")
    tables = {name: pd.concat([getattr(r, name) for r in found]) for name in _TABLES[1:]}
    for name in ("predictions", "history"):
        tables[name] = tables[name].sort_index()
    return Results(found[0].truth, **tables)


def _one(on: Study, name: str, seed: int, last: float, alone: bool) -> Results | None:
    if time.monotonic() > last:
        return None
    if alone:
        torch.set_num_threads(1)
    return on.run([name], [seed], progress=False)


_TABLES = ("truth", "predictions", "history", "costs")
_RECORDED_WITH = ("device", "torch", "commit", "date")


def record(results: Results, on: Study, mm: float) -> Path:
    """Keep results of phantoms where `recorded` finds them, each training with its circumstances.

    Trainings that were recorded before, on the same phantoms with the same settings, stay.

    Raises:
        ParameterError: This package runs without the book's repository.
    """
    root = book.repository_folder()
    if root is None:
        raise ParameterError("results are kept in the book's repository: run from a copy of it.")
    name = "grid_gpu" if str(on.device).startswith("cuda") else "grid"
    patients = {"training": len(on.scans.train), "test": len(on.scans.test)}
    settings = json.loads(json.dumps(on.settings))
    circumstances = {"patients": patients, "mm": mm, "settings": settings}
    now = (
        book.device(on.device),
        metadata.version("torch"),
        book.commit(),
        time.strftime("%Y-%m-%d", time.gmtime()),
    )
    parts = {part: getattr(results, part) for part in _TABLES}
    parts["costs"] = parts["costs"].assign(**dict(zip(_RECORDED_WITH, now, strict=True)))
    before = recorded(name)
    if before is not None and before.circumstances == circumstances:
        for part in _TABLES[1:]:
            table: pd.DataFrame = getattr(before, part)
            done = pd.Index([key[:2] for key in table.index]).isin(results.costs.index)
            parts[part] = pd.concat([table[~done], parts[part]]).sort_index()
    folder = root / "book" / "recorded"
    for part, table in parts.items():
        packed = "" if part in ("truth", "costs") else ".xz"
        path = folder / f"{name}_{part}.csv{packed}"
        table.to_csv(path, float_format="%.8g", lineterminator="\n")
    target = folder / f"{name}.json"
    target.write_text(json.dumps(circumstances, indent=2) + "\n")
    return target


def recorded(name: str = "grid") -> Results | None:
    """The full grid on phantoms as it was recorded, or None without the repository.

    Args:
        name: `grid`, or `grid_gpu`.
    """
    circumstances, root = book.recorded(name), book.repository_folder()
    if circumstances is None or root is None:
        return None
    levels = {"truth": 1, "predictions": 3, "history": 3, "costs": 2}
    tables = {}
    for part in _TABLES:
        (path,) = (root / "book" / "recorded").glob(f"{name}_{part}.csv*")
        tables[part] = pd.read_csv(path, index_col=list(range(levels[part])))
    return Results(**tables, circumstances=circumstances)
