import subprocess
import sys
from pathlib import Path

import pytest

from covidmtl_core import claims, fetch
from covidmtl_core.claims import Record


def covidmtl(*arguments: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("covidmtl")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_fetch_lists_everything_and_fetches_nothing(empty_cache: Path) -> None:
    answer = covidmtl("fetch", "--list")
    assert answer.returncode == 0, answer.stderr
    shown = {line.split()[0] for line in answer.stdout.splitlines() if line.strip()}
    assert set(fetch.registry()) <= shown
    assert "closed" in answer.stdout
    assert not empty_cache.exists()


@pytest.fixture
def fetched() -> Path:
    return fetch.fetch("failed-segmentations")


@pytest.mark.usefixtures("released")
def test_fetch_brings_one_file(fetched: Path, empty_cache: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, str(fetched.parent))
    answer = covidmtl("fetch", "failed-segmentations")
    assert answer.returncode == 0, answer.stderr
    assert [p.name for p in empty_cache.iterdir()] == ["abnormalSeg.xlsx"]
    assert "present" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "lungs"], "'lungs'"),
        (["fetch", "segmented-volumes"], "closed"),
        (["claims", "diff", "/no/such/a", "/no/such/b"], "/no/such/a"),
        (["preprocess", "/no/such/folder", "/no/such/target"], "/no/such/folder"),
        (["experiment", "covid_mtl", "/no/such/folder"], "/no/such/folder"),
        (["predict", "/no/such/scan", "/tmp/report", "--tier", "phantom"], "/no/such/scan"),
        (["predict", "/no/such/scan", "/tmp/report", "--lungs", "/no/mask"], "/no/mask"),
        (["experiment", "covid_mtl", "/no/such/folder", "--set", "epoch=1"], "'epoch=1'"),
    ],
)
def test_a_mistake_is_one_message_without_traceback(empty_cache, arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    answer = covidmtl(*arguments)
    assert answer.returncode == 1
    assert message in answer.stderr and answer.stderr.startswith("covidmtl: ")
    assert "Traceback" not in answer.stderr + answer.stdout


def test_claims_diff_compares_two_runs(tmp_path: Path) -> None:
    for run, value in (("a", 1329), ("b", 1330)):
        path = tmp_path / run / "released" / "cohort" / "claims.json"
        claims.save_records(path, [Record("cohort.studies", "released", value)], {})
    same = covidmtl("claims", "diff", str(tmp_path / "a"), str(tmp_path / "a"))
    assert same.returncode == 0 and "same" in same.stdout
    changed = covidmtl("claims", "diff", str(tmp_path / "a"), str(tmp_path / "b"))
    assert changed.returncode == 1
    assert "cohort.studies" in changed.stdout and "differs" in changed.stdout


def test_check_lists_problems_and_fails_on_errors_only(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(
        "patient_id,path,ct,nat,severity\na,x.nii,1,,\nb,y.nii,3,,\n"
    )
    answer = covidmtl("check", "--quick", str(tmp_path))
    assert answer.returncode == 1
    assert "error: labels.csv, line 3: ct is '3'" in answer.stdout
    assert "x.nii does not exist" in answer.stdout and "3 errors" in answer.stdout
    (tmp_path / "labels.csv").write_text("patient_id,path,ct,nat,severity\na,x.nii,1,,\n")
    (tmp_path / "x.nii").touch()
    answer = covidmtl("check", "--quick", str(tmp_path))
    assert (answer.returncode, answer.stdout) == (0, "0 errors, 0 warnings.\n")


def test_preprocess_fails_only_if_every_scan_does(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("patient_id,path,ct,nat,severity\na,x.nii,1,,\n")
    answer = covidmtl("preprocess", str(tmp_path), str(tmp_path / "out"), "--jobs", "1")
    assert answer.returncode == 1 and "1 failed, reasons in scans.csv: a." in answer.stdout
    assert "x.nii does not exist" in (tmp_path / "out" / "scans.csv").read_text()
    assert "Traceback" not in answer.stderr
