"""Tier `volumes` as a researcher meets it: DICOM, `covidmtl preprocess`, papermill, a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from covidmtl_core import book, cohort, fetch, phantom_cohort
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


SHELL = "a b'; touch ran; $(touch ran) \"c"
"""A folder's name that a shell must never be given unquoted."""


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few phantoms, each class in both splits."""
    source = tmp_path_factory.mktemp("dicom")
    table = phantom_cohort.cohort().sort_values(list(cohort.TASKS))[list(cohort.TASKS)].iloc[::11]
    table["path"] = [f"scan {patient}" for patient in table.index]
    table["split"] = ["test" if k % 3 == 0 else "train" for k in range(len(table))]
    for _, side in table.groupby("split"):
        assert all(side[task].nunique() == n for task, n in cohort.TASKS.items())
    for patient, path in table["path"].items():
        scan = make_phantom(phantom_cohort.patient(patient), [round(n / MM) for n in SIZE], MM)
        write_series(scan.image, source / path, f"phantom-{patient}")
    table.rename_axis("patient_id").to_csv(source / "labels.csv")
    return source


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dicom: Path) -> Path:
    """Where the whole chain goes, from DICOM to a book: `ready`, `results`, `_build`."""
    return tmp_path_factory.mktemp("chain") / SHELL


@pytest.fixture(scope="module")
def scans(whole: Path) -> Path:
    return whole / "ready"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def environment(results: Path, first: Path | None = None) -> dict[str, str]:
    folders = [str(first)] * (first is not None) + [str(Path(sys.executable).parent)]
    changes = {
        book.RESULTS_VARIABLE: str(results),
        "PATH": os.pathsep.join([*folders, os.environ["PATH"]]),
        "https_proxy": "http://127.0.0.1:9",
        fetch.CACHE_VARIABLE: str(results / "cache"),
    }
    return {k: v for k, v in os.environ.items() if k != fetch.MIRROR_VARIABLE} | changes


def workflow(
    repository: Path,
    dicom: Path,
    whole: Path,
    *words: str,
    profile: str = "local",
    first: Path | None = None,
) -> "subprocess.Popen[str]":
    """The workflow in tier volumes, with many jobs at once."""
    whole.mkdir(exist_ok=True)
    given = QUICK["diagnosis"] | {
        "tier": "volumes",
        "out": str(whole),
        "scans": str(dicom),
        "data_root": str(whole / "ready"),
        "batches": 3,
        "spacing": MM,
        "networks": ["covid_mtl", "shiftnet3d.ct"],
        "n_epochs": 3,
        "n_trainings": 2,
        "settings": yaml.safe_load(SMALL)["settings"],
    }
    (whole / "config.yml").write_text(yaml.safe_dump(given))
    engine = repository / "book"
    command = ["snakemake", f"--snakefile={engine / 'Snakefile'}", f"--directory={whole}"]
    command += [f"--profile={engine / 'profiles' / profile}", "--configfile=config.yml"]
    return subprocess.Popen(
        [*command, *words],
        cwd=whole,
        env=environment(whole / "results", first),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_chain_is_planned_before_anything_runs(
    repository: Path, dicom: Path, tmp_path: Path
) -> None:
    wanted = ("--dry-run", "--printshellcmds", "--config", "chapter=severity", "n_trainings=1")
    classical = ("networks=[transfer,covid_mtl.classical]", "classical_root=c")
    run = workflow(repository, dicom, tmp_path, *wanted, *classical, profile="slurm")
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 0, text
    order = [text.index(f"Training {name}, seed 11") for name in ("diagnosis", "transfer")]
    assert order == sorted(order) and order[1] < text.index("Executing severity")
    assert "experiment covid_mtl.classical" in text and "--classical c" in text
    for method in ("refined", "classical"):
        assert all(f"--method {method} --part {k}/3" in text for k in (1, 2, 3))


def test_the_whole_chain_from_dicom_to_the_book(repository: Path, dicom: Path, whole: Path) -> None:
    """Killed while it preprocesses and while it trains, many jobs at once, all in odd folders."""
    odd = whole.parent / f"raw {SHELL}"
    odd.symlink_to(dicom)
    many = ("--cores=4", "--resources=gpu=4", "--config", "chapter=diagnosis")
    for stage in ("Preprocessing, refined lungs: part 3", "Executing diagnosis"):
        run = workflow(repository, odd, whole, *many)
        assert run.stdout
        for line in run.stdout:
            if stage in line:
                break
        time.sleep(5)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    run = workflow(repository, odd, whole, *many)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    assert "Preprocessing" not in text and "Training" not in text, "what was done is kept"
    assert (whole / "_build" / "html" / "diagnosis.html").is_file()
    found = pd.read_csv(whole / "results" / "volumes" / "diagnosis" / "networks.csv")
    assert set(found["seed"]) == {11, 12}
    assert "epoch 1 of 3" not in (whole / "_runs" / "volumes" / "diagnosis.log").read_text()
    alone = whole / "alone"
    preprocess(odd, alone, MM, part=(1, 3))
    for path in alone.glob("scans/*/*.*"):
        assert (whole / "ready" / path.relative_to(alone)).read_bytes() == path.read_bytes()
    assert not list(whole.parent.rglob("ran")) and not Path("ran").exists()


def test_what_changed_is_done_again(repository: Path, dicom: Path, whole: Path) -> None:
    """Planned only, after the chain has run: nothing, then what each change asks for."""

    def planned(*more: str) -> str:
        options = ("--dry-run", "--config", "chapter=diagnosis", *more)
        run = workflow(repository, whole.parent / f"raw {SHELL}", whole, *options)
        text, _ = run.communicate(timeout=60)
        assert run.returncode == 0, text
        return text

    assert "Nothing to be done" in planned()
    assert "Preprocessing" in planned("spacing=5")
    file = next(dicom.glob("scan */*"))
    file.touch()
    text = planned()
    assert all(word in text for word in ("Preprocessing", "Training", "Executing", "Rendering"))
    text = planned("n_bootstrap=21")
    assert "Executing diagnosis" in text and "Rendering" in text
    (whole / "ready").rename(whole / "away")
    assert "Preprocessing" in planned()
    (whole / "away").rename(whole / "ready")


@pytest.mark.parametrize(
    ("config", "wanted", "submitted"),
    [
        ("batches=2", ["--mem 14000", "--cpus-per-task=4", "-t 720"], 2),
        ("scans=", ["--mem 32000", "--cpus-per-task=4", "--gpus=1"], 4),
    ],
)
def test_the_cluster_is_asked_for_what_a_step_needs(
    config: str,
    wanted: list[str],
    submitted: int,
    repository: Path,
    dicom: Path,
    scans: Path,
    tmp_path: Path,
) -> None:
    """A stand-in for sbatch notes what it is asked for, and refuses."""
    said = tmp_path / "said"
    (tmp_path / "bin").mkdir()
    for name, content in (
        ("sbatch", f'echo "$@" >> "{said}"; exit 1'),
        ("sacct", ""),
        ("sinfo", ""),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    out, stand_in = tmp_path / "out", tmp_path / "bin"
    (tmp_path / "ready").symlink_to(scans)
    more = ("--config", "chapter=diagnosis", config)
    if config == "scans=":
        more += (f"data_root={tmp_path / 'ready'}",)
    run = workflow(repository, dicom, out, *more, profile="slurm", first=stand_in)
    asked: list[str] = []
    deadline = time.monotonic() + 60
    while len(asked) < submitted and time.monotonic() < deadline:
        time.sleep(0.2)
        asked = said.read_text().splitlines() if said.exists() else []
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert len(asked) == submitted, asked
    assert all(word in line for word in wanted for line in asked), asked[0]
    assert all("_runs/slurm/rule_" in line for line in asked), "a log each"


def test_a_cluster_is_not_given_a_name_that_is_a_command(
    repository: Path, dicom: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "sacct", "sinfo"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\ntouch "{tmp_path}/{name}"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / SHELL).symlink_to(dicom)
    for config in (f"scans={tmp_path}/{SHELL}", "layer=$(touch ran)"):
        more = ("--config", "chapter=diagnosis", config)
        place = tmp_path / "out"
        run = workflow(repository, dicom, place, *more, profile="slurm", first=tmp_path / "bin")
        text, _ = run.communicate(timeout=60)
        assert run.returncode != 0 and "On a cluster" in text and "Traceback" not in text, text
    assert not (tmp_path / "sbatch").exists() and not list(tmp_path.rglob("ran"))


def test_the_chain_runs_on_a_cluster(repository: Path, dicom: Path, tmp_path: Path) -> None:
    """Wherever SLURM answers and nodes see the temporary folder; one node will do."""
    if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no SLURM answers here")
    watched = ("--slurm-status-command=squeue", "--slurm-init-seconds-before-status-checks=5")
    more = ("--config", "chapter=diagnosis", "n_trainings=1")
    run = workflow(repository, dicom, tmp_path, *watched, *more, profile="slurm")
    text, _ = run.communicate(timeout=600)
    assert run.returncode == 0, text
    assert (tmp_path / "_build" / "html" / "diagnosis.html").is_file()
    logs = {path.parents[1].name for path in tmp_path.glob("_runs/slurm/*/*/*.log")}
    assert logs == {f"rule_{name}" for name in ("batch", "ready", "training", "chapter")}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("networks=covid_mtl", "it must be a list of"),
        ("networks=[../../x]", "it must be a list of"),
        ("seed=x", "seed is 'x'"),
        ("batches=0", "batches is 0"),
        ("n_trainings=1.5", r"n_trainings is 1.5"),
        ("n_treees=4", "No chapter has a parameter 'n_treees'"),
        ("n_epochs=0", "n_epochs is 0"),
        ("settings={augmentation: {noise: 9}}", "augmentation's noise is '9'"),
        ("tier=phantom", "only tier volumes uses"),
        ("data_root=", "needs data_root"),
    ],
)
def test_a_wrong_option_of_the_chain_is_one_sentence(
    config: str, message: str, repository: Path, dicom: Path, tmp_path: Path
) -> None:
    run = workflow(repository, dicom, tmp_path, "--dry-run", "--config", config)
    text, _ = run.communicate(timeout=60)
    assert run.returncode != 0 and message in text and "Traceback" not in text


def papermill(repository: Path, scans: Path, folder: Path, chapter: str) -> subprocess.Popen:
    given = QUICK[chapter] | {"tier": "volumes", "data_root": scans, "n_epochs": 3}
    parameters = [word for name, value in given.items() for word in ("-p", name, str(value))]
    if chapter != "case_study":
        parameters += ["-y", "networks: [covid_mtl, shiftnet3d.ct]"]
    if chapter == "ablations":
        parameters += ["-p", "external_root", str(scans)]
    source = str(repository / "book" / f"{chapter}.ipynb")
    command = ["papermill", source, "out.ipynb", "-k", "python3", "--log-output", "-y", SMALL]
    return subprocess.Popen(
        [*command, *parameters],
        cwd=folder,
        env=environment(folder / "results"),
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
