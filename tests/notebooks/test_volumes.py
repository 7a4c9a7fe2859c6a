"""Tier `volumes` as a researcher meets it: DICOM, `covidmtl preprocess`, papermill, a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from covidmtl_core import book, cohort, phantom_cohort
from covidmtl_core.dicom import write_series
from covidmtl_core.phantom import SIZE, make_phantom
from covidmtl_core.preprocessing import preprocess

pytestmark = pytest.mark.slow

MM = 6.0
SMALL = "settings: {crop: [44, 36, 44], jitter: [3, 3, 3], refresh_norms: true}"
QUICK = {
    "diagnosis": {"n_trees": 20, "n_seeds": 2, "n_bootstrap": 20},
    "severity": {"n_trees": 20, "n_seeds": 2, "n_bootstrap": 20},
    "ablations": {"n_seeds": 2, "n_runs": 2, "n_epochs_features": 2, "n_bootstrap": 20},
    "case_study": {},
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few phantoms from DICOM to lungs, volumes and features."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("dicom", "ready"))
    table = phantom_cohort.cohort().sort_values(list(cohort.TASKS))[list(cohort.TASKS)].iloc[::11]
    table["path"] = [f"scan {patient}" for patient in table.index]
    table["split"] = ["test" if k % 3 == 0 else "train" for k in range(len(table))]
    for _, side in table.groupby("split"):
        assert all(side[task].nunique() == n for task, n in cohort.TASKS.items())
    for patient, path in table["path"].items():
        scan = make_phantom(phantom_cohort.patient(patient), [round(n / MM) for n in SIZE], MM)
        write_series(scan.image, source / path, f"phantom-{patient}")
    table.rename_axis("patient_id").to_csv(source / "labels.csv")
    preprocess(source, target, MM)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def papermill(repository: Path, scans: Path, folder: Path, chapter: str) -> subprocess.Popen:
    given = QUICK[chapter] | {"tier": "volumes", "data_root": scans, "n_epochs": 3}
    parameters = [word for name, value in given.items() for word in ("-p", name, str(value))]
    if chapter != "case_study":
        parameters += ["-y", "networks: [covid_mtl, shiftnet3d.ct]"]
    if chapter == "ablations":
        parameters += ["-p", "external_root", str(scans)]
    source = str(repository / "book" / f"{chapter}.ipynb")
    command = ["papermill", source, "out.ipynb", "-k", "python3", "--log-output", "-y", SMALL]
    changes = {
        book.RESULTS_VARIABLE: str(folder / "results"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [*command, *parameters],
        cwd=folder,
        env=os.environ | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("chapter", QUICK)
def test_a_chapter_trains_on_a_readers_scans(
    chapter: str, scans: Path, folder: Path, repository: Path
) -> None:
    if chapter == "diagnosis":  # the first: killed after an epoch, it goes on where it was
        run = papermill(repository, scans, folder, chapter)
        assert run.stdout
        said = []
        for line in run.stdout:
            said.append(line)
            if "epoch 1 of 3" in line:
                break
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        assert "epoch 1 of 3" in said[-1], "".join(said)
    run = papermill(repository, scans, folder, chapter)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    if chapter == "diagnosis":
        of_the_first = text[text.index("covid_mtl, seed 11") : text.index("shiftnet3d.ct, seed 11")]
        assert "epoch 3 of 3" in of_the_first and "epoch 1 of 3" not in of_the_first
    results = folder / "results" / "volumes" / chapter
    assert json.loads((results / "claims.json").read_text())["claims"] == []
    assert 'data-tier=\\"volumes\\"' in (folder / "out.ipynb").read_text()
    if chapter in ("diagnosis", "ablations"):
        found = pd.read_csv(results / "networks.csv")
        assert {"ct", "nat"} <= set(found["task"]) and found["exact_auc"].between(0, 1).all()
