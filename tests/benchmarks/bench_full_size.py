"""The paper's whole path at the paper's size: DICOM, `covidmtl preprocess`, Table 3 by papermill.

Run: python tests/benchmarks/bench_full_size.py FOLDER. A dozen phantoms of 1 mm, one epoch of all
ten networks; about 3 GB in FOLDER, 20 GB of memory, a quarter of an hour on 2 cores.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed

from covidmtl_core import book, cohort, experiments, phantom_cohort
from covidmtl_core.benchmarks.recording import record
from covidmtl_core.dicom import write_series
from covidmtl_core.phantom import SIZE, make_phantom

TASKS = list(cohort.TASKS)


def patients() -> pd.DataFrame:
    """Four of each severity, by the phantoms' labels; of four two to train on and two to test."""
    table = phantom_cohort.cohort().sort_values(TASKS)[TASKS]
    chosen = []
    for _, alike in table.groupby("severity"):
        few = alike.iloc[[0, 1, len(alike) // 2, -1]].copy()
        few["split"] = ["train", "test", "train", "test"]
        chosen.append(few)
    found = pd.concat(chosen).rename_axis("patient_id")
    return found.assign(path=[f"scan-{patient}" for patient in found.index])


def scan(patient: int, folder: Path) -> None:
    made = make_phantom(phantom_cohort.patient(patient), SIZE, 1.0)
    write_series(made.image, folder, f"phantom-{patient}")


def timed(*command: str, **environment: str) -> float:
    start = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | environment)
    return round(time.monotonic() - start)


def main(folder: Path) -> None:
    raw, ready, results = folder / "dicom", folder / "ready", folder / "results"
    raw.mkdir(parents=True, exist_ok=True)
    table = patients()
    Parallel(n_jobs=2)(delayed(scan)(p, raw / path) for p, path in table["path"].items())
    table.to_csv(raw / "labels.csv")
    preprocessing = timed("covidmtl", "preprocess", str(raw), str(ready), "--jobs", "2")
    notebook = book.repository_folder() / "book" / "diagnosis.ipynb"  # type: ignore[operator]
    command = ["papermill", str(notebook), str(folder / "out.ipynb"), "-k", "python3"]
    parameters = ["-p", "tier", "volumes", "-p", "data_root", str(ready), "-p", "n_epochs", "1"]
    chapter = timed(*command, *parameters, COVIDMTL_RESULTS=str(results))
    os.environ["COVIDMTL_RESULTS"] = str(results)
    study = experiments.study("volumes", 0, 1, ready)
    measured = pd.read_csv(results / "volumes" / "diagnosis" / "networks.csv")
    speed, gib = {}, 0.0
    for name in measured["experiment"].unique():
        history = study.train(name, 11, progress=False).history
        speed[experiments.title(name)] = round(1 / history["samples_per_second"].iloc[0], 2)
        gib = max(gib, history["gib"].iloc[0])
    figures = {
        "patients": {"training": len(study.scans.train), "test": len(study.scans.test)},
        "voxels of a scan": list(SIZE),
        "seconds to preprocess all": preprocessing,
        "seconds of the chapter": chapter,
        "seconds a patient of an epoch": speed,
        "peak memory, GiB": round(gib, 1),
    }
    record("full_size", figures, ("torch", "SimpleITK"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
