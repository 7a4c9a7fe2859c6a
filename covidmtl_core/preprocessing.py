"""A folder of scans made ready: lungs, cropped volumes, features and a quality page each.

The target holds `settings.json`, a folder `scans/<patient_id>/` for each scan (`volume.b2nd` in
HU, `lungs.b2nd`, `scan.json`, `quality.png`), and for all of them `scans.csv`, `features.csv` and
`quality.html`. A scan's folder appears whole or not at all, so that a run may be killed at any
time; the next one does what is missing. A scan whose files were changed since is made again.
Folders of patients who are no longer listed stay, but are in no table.

Runs on several machines share the work as parts 1 of n to n of n, each with its own lock, and write
no tables; a whole run thereafter does.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import SimpleITK as sitk
from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed

from covidmtl_core import quality, store
from covidmtl_core.boxes import bounds
from covidmtl_core.claims import write_atomically
from covidmtl_core.ct import read_ct, resample
from covidmtl_core.data_folder import load_index, worker_loss_named
from covidmtl_core.errors import CovidMTLError, DataError, ParameterError
from covidmtl_core.radiomics.features import extract_features
from covidmtl_core.radiomics.names import FEATURE_NAMES
from covidmtl_core.segmentation import METHODS, Segmenter, segment_lungs

MARGIN_MM = 10.0
"""Around the lungs, in the cropped volumes."""

FILES = ("volume.b2nd", "lungs.b2nd", "quality.png", "scan.json")

PATIENCE_S = 10
"""How long a part waits for others to begin."""

GIB_A_SCAN = 3.0
"""Memory that a scan at 1 mm takes while it is worked on."""


@dataclass(frozen=True)
class Preprocessed:
    """A scan made ready.

    Attributes:
        volume: int16 HU, cropped to the lungs with a margin.
        lungs: uint8, 1 right and 2 left lung, in the same grid.
        features: The 375 features.
        measures: Volumes in ml, HU inside the lungs, sizes in voxels and mm (see `quality`).
    """

    volume: sitk.Image
    lungs: sitk.Image
    features: pd.Series
    measures: dict[str, Any]


def preprocess_scan(
    path: str | os.PathLike[str],
    spacing_mm: float = 1.0,
    method: str | Segmenter = "refined",
    n_jobs: int = 1,
) -> Preprocessed:
    """Read a scan, resample it, find its lungs, crop it and measure its features.

    Args:
        path: As for `ct.read_ct`.
        spacing_mm: Of the voxels wanted; the paper's is 1 mm.
        method: As for `segmentation.segment_lungs`.
        n_jobs: Processes and threads it may use.

    Returns:
        Volume, lungs, features and measures.

    Raises:
        DataError: The scan cannot be read, or no lungs are found in it.
        ParameterError: Spacing or method cannot be used.
    """
    raw = read_ct(path)
    image = resample(sitk.DICOMOrient(raw, "LPS"), spacing_mm)
    lungs = segment_lungs(image, method, n_jobs)
    features = extract_features(image, lungs, n_jobs=n_jobs)
    measures = quality.measure(image, lungs, raw)
    margins = [int(np.ceil(MARGIN_MM / s)) for s in lungs.GetSpacing()[::-1]]
    box = bounds(sitk.GetArrayViewFromImage(lungs) > 0, margins)[::-1]
    volume = image[box]
    if volume.GetPixelID() != sitk.sitkInt16:
        volume = sitk.Cast(sitk.Round(volume), sitk.sitkInt16)
    return Preprocessed(volume, lungs[box], features, measures)


def preprocess(
    source: Path,
    target: Path,
    spacing_mm: float = 1.0,
    method: str = "refined",
    n_jobs: int | None = None,
    progress: bool = False,
    part: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """Make every scan of a folder ready; scans that are ready already are left as they are.

    Args:
        source: See `data_folder`.
        target: See the module; made if it is not there.
        spacing_mm: Of the voxels wanted.
        method: As for `segmentation.segment_lungs`.
        n_jobs: Scans worked on at once; None takes a core each, and 3 GiB of memory at 1 mm.
        progress: Whether a progress bar is shown.
        part: (k, n) makes only every n-th scan ready, from the k-th, and writes no table.

    Returns:
        The table `scans.csv`: a line a patient with labels, split, `state` (ready or failed),
        `reason` of a failure, and measures. Failed scans are tried again by the next run.

    Raises:
        DataError: The labels cannot be used, or another run works on the target.
        ParameterError: Spacing, method or part cannot be used; or spacing and method are not
            those of the target; or the target holds something else, or the scans.
    """
    source, target = Path(source), Path(target)
    k, n = part or (1, 1)
    if not 1 <= k <= n:
        raise ParameterError(f"part is {k}/{n}; it must be from 1/{n} to {n}/{n}.")
    if method not in METHODS:
        raise ParameterError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if not (np.isfinite(spacing_mm) and 0.3 <= spacing_mm <= 10):
        raise ParameterError(f"spacing is {spacing_mm} mm; it must be from 0.3 to 10 mm.")
    index = load_index(source)
    within = [path for path in index["path"] if _is_within(path, target)]
    if _is_within(str(source), target) or within:
        which = within[0] if within else source
        raise ParameterError(f"{which} lies in {target}: write to a folder without scans.")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _claimed(target, part, spacing_mm, method):
            own = index.iloc[k - 1 :: n]
            partial = target / ".partial" / (f"{k}-of-{n}" if part else "")
            jobs = n_jobs or _jobs(spacing_mm)
            work = _work(own, source, target, partial, spacing_mm, method, jobs, progress)
            scans, features = _tables(own, target, dict(work))
            if part is None:
                for name, table in (("scans.csv", scans), ("features.csv", features)):
                    write_atomically(target / name, table.to_csv(lineterminator="\n"))
                write_atomically(target / "quality.html", quality.overview(scans))
            return scans
    except Timeout:
        raise DataError(f"Another run is working on {target}: wait until it has ended.") from None
    except OSError as error:
        what = error.strerror or error
        raise DataError(f"{target} cannot be written ({what}); what is done is kept.") from error


def _is_within(path: str, folder: Path) -> bool:
    real, root = os.path.realpath(path), os.path.realpath(folder)
    return real == root or real.startswith(f"{root}{os.sep}")


def _jobs(spacing_mm: float) -> int:
    need = max(0.5, GIB_A_SCAN / spacing_mm**3)
    return max(1, min(cpu_count(), int(psutil.virtual_memory().available / 2**30 / need)))


def state_of(source: Path) -> str:
    """A hash of a folder's labels, and of names, sizes and times of its scans' files.

    Raises:
        DataError: The folder or its labels cannot be used.
    """
    index = load_index(Path(source))
    prints = [_fingerprint(path) for path in index["path"]]
    return hashlib.sha256("\n".join([index.to_csv(), *prints]).encode()).hexdigest()


@contextmanager
def _claimed(
    target: Path, part: tuple[int, int] | None, spacing_mm: float, method: str
) -> Iterator[None]:
    """Alone on a target that has its settings; a part, alone but for the others of its division.

    A whole run holds the target's lock and those of parts to its end, a part its own; it takes the
    target's only to begin. Who comes second for a part waits, and finds it done: on a cluster a
    step may outlive the run that submitted it.
    """
    while True:
        with FileLock(target / ".lock", timeout=PATIENCE_S if part else 0):
            others = [
                path
                for path in target.glob(".lock-*")
                if part is None or not path.name.endswith(f"-of-{part[1]}")
            ]
            with ExitStack() as locks:
                for path in others:
                    locks.enter_context(FileLock(path, timeout=0))
                _settle_settings(target, spacing_mm, method)
                if part is None:
                    yield
            for path in others:
                path.unlink()
            if part is None:
                return
            own = FileLock(target / f".lock-{part[0]}-of-{part[1]}", timeout=0)
            with suppress(Timeout):
                own.acquire()
        if own.is_locked:
            break
        time.sleep(1)
    try:
        yield
    finally:
        own.release()


def _settle_settings(target: Path, spacing_mm: float, method: str) -> None:
    """Write the settings; or refuse if the target was made with others."""
    settings = {
        "spacing_mm": float(spacing_mm),
        "method": method,
        "covidmtl_core": metadata.version("covidmtl-core"),
    }
    path = target / "settings.json"
    if not path.exists():
        if any(not entry.name.startswith(".lock") for entry in target.iterdir()):
            raise ParameterError(f"{target} holds other things: name an empty or a new folder.")
        write_atomically(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        made = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError):
        raise DataError(f"{path} is damaged: delete {target} or name another folder.") from None
    other = [f"{k} {made.get(k)!r} (now {v!r})" for k, v in settings.items() if made.get(k) != v]
    if other:
        raise ParameterError(f"{target} was made with {', '.join(other)}: name another folder.")


def _work(
    index: pd.DataFrame,
    source: Path,
    target: Path,
    partial: Path,
    spacing_mm: float,
    method: str,
    jobs: int,
    progress: bool,
) -> Iterator[tuple[str, str]]:
    """Make the missing scans ready; patient and reason of each failure.

    `partial` is emptied of what a run that was killed left there.
    """
    from tqdm import tqdm

    shutil.rmtree(partial, ignore_errors=True)
    within, ready = partial / uuid.uuid4().hex, target / "scans"
    for folder in (within, ready):
        folder.mkdir(parents=True, exist_ok=True)
    missing = []
    for patient_id, path in index["path"].items():
        origin = {"source": os.path.relpath(path, source), "fingerprint": _fingerprint(path)}
        if not _is_whole(ready / str(patient_id), origin):
            missing.append((str(patient_id), path, origin))
    work = Parallel(n_jobs=max(1, min(jobs, len(missing))), return_as="generator_unordered")(
        delayed(_try_scan)(within, *scan, spacing_mm, method) for scan in missing
    )
    bar = tqdm(
        work,
        total=len(index),
        initial=len(index) - len(missing),
        desc="preprocessing",
        unit="scan",
        disable=not progress,
    )
    with worker_loss_named("a scan was preprocessed"):
        for patient_id, reason in bar:
            # Only here, under the lock, does a scan's folder appear or go.
            if (ready / patient_id).exists():
                (ready / patient_id).replace(within / f"old-{patient_id}")
            if not reason:
                (within / patient_id).replace(ready / patient_id)
                continue
            reason = reason.replace(f"{source}{os.sep}", "")
            if progress:
                bar.write(f"patient {patient_id} failed: {reason}")
            yield patient_id, reason
    shutil.rmtree(partial, ignore_errors=True)


def _fingerprint(path: str) -> str:
    """Names, sizes and times of a scan's files: another if one of them was changed."""
    files = sorted(p for p in Path(path).rglob("*") if p.is_file()) or [Path(path)]
    try:
        stats = [(p.relative_to(path).as_posix(), p.stat()) for p in files]
    except OSError:
        return ""
    text = "\n".join(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(folder: Path, origin: dict[str, str]) -> bool:
    """Whether a scan's folder has all its files and was made from that scan."""
    try:
        record = json.loads((folder / "scan.json").read_text(encoding="utf-8"))
        made_from = {name: record[name] for name in origin}
        return (
            made_from == origin
            and set(record["features"]) == set(FEATURE_NAMES)
            and all((folder / name).stat().st_size for name in FILES)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _try_scan(
    partial: Path,
    patient_id: str,
    path: str,
    origin: dict[str, str],
    spacing_mm: float,
    method: str,
) -> tuple[str, str]:
    """Write a scan's files into `partial`; the patient and the reason of a failure, if any."""
    try:
        made = preprocess_scan(path, spacing_mm, method)
        picture = quality.draw(made.volume, made.lungs, patient_id, made.measures)
    except CovidMTLError as error:
        return patient_id, str(error)
    except Exception as error:  # the rest of the cohort goes on
        return patient_id, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
    part = partial / patient_id
    part.mkdir()
    for name, image in (("volume", made.volume), ("lungs", made.lungs)):
        store.write(image, part / f"{name}.b2nd")
    (part / "quality.png").write_bytes(picture)
    record = {**origin, **made.measures, "features": made.features.to_dict()}
    (part / "scan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return patient_id, ""


def _tables(
    index: pd.DataFrame, target: Path, failures: dict[str, str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of all scans, and of the features of those that are ready."""
    rows, features = [], {}
    for patient_id in index.index:
        row = {"state": "failed", "reason": failures.get(str(patient_id), "")}
        if str(patient_id) not in failures:
            path = target / "scans" / str(patient_id) / "scan.json"
            record = json.loads(path.read_text(encoding="utf-8"))
            features[patient_id] = record.pop("features")
            del record["fingerprint"]
            row = {"state": "ready", "reason": "", **record}
        rows.append(row)
    states = pd.DataFrame(rows or {"state": [], "reason": []}, index=index.index)
    scans = index.drop(columns="path").join(states).convert_dtypes()
    return scans, pd.DataFrame.from_dict(features, orient="index").rename_axis("patient_id")
