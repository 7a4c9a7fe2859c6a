"""A disk that is full or read-only, for real: one sentence, nothing lost, and the next run ends."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from covidmtl_core import fetch
from covidmtl_core.dicom import write_series
from covidmtl_core.phantom import draw_patient, make_phantom

pytestmark = pytest.mark.slow

SIZE, SPACING = (57, 65, 65), 6.0
Disk = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mounts a disk of so many kB, or changes it; needs the rights to."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if os.path.ismount(place) else ["-o", options]
        answer = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(place)])
        if answer.returncode:
            pytest.skip("mounting a small disk needs root")
        return place

    yield mount
    subprocess.run(["umount", str(place)], stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    lines = ["patient_id,path,ct,nat,severity,split"]
    for k in range(4):
        write_series(make_phantom(draw_patient(k, 0.1), SIZE, SPACING).image, folder / f"s{k}")
        lines.append(f"p{k},s{k},{k % 2},{k % 2},{(0, 1, 0, 2)[k]},{'train' if k < 2 else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def ready(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("ready")
    covidmtl("preprocess", scans, target, "--spacing", SPACING, "--jobs", 1)
    return target


def covidmtl(*words: object, fails: bool = False) -> str:
    command = [sys.executable, "-m", "covidmtl_core.cli", *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert bool(answer.returncode) == fails, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr, answer.stderr
    return answer.stderr


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_preprocessing_ends_after_the_disk_was_full(disk: Disk, scans: Path, ready: Path) -> None:
    command = ("preprocess", scans, disk("size=300k"), "--spacing", SPACING, "--jobs", 1)
    assert "No space left" in covidmtl(*command, fails=True)
    disk("size=50m")
    covidmtl(*command)
    assert contents(disk("size=50m")) == contents(ready)


def test_training_goes_on_after_the_disk_was_full(disk: Disk, ready: Path, tmp_path: Path) -> None:
    recipe = ("epochs=2", "tasks={ct: 2}", "use_volume=no", "use_features=yes", "batch_size=2")
    words = [word for setting in recipe for word in ("--set", setting)]
    said = covidmtl("train", ready, disk("size=64k"), *words, fails=True)
    assert "last.pt cannot be written" in said and "is the disk full?" in said
    covidmtl("train", ready, disk("size=50m"), *words)
    covidmtl("train", ready, tmp_path / "whole", *words)
    tables = [
        pd.read_csv(next(folder.rglob("predictions.csv")))
        for folder in (disk("size=50m"), tmp_path / "whole")
    ]
    pd.testing.assert_frame_equal(*tables)


def test_a_target_that_cannot_be_written_is_named(disk: Disk, scans: Path, ready: Path) -> None:
    place = disk("size=50m,ro")
    for command in (
        ("preprocess", scans, place / "ready", "--spacing", SPACING),
        ("train", ready, place / "runs", "--set", "epochs=1"),
    ):
        said = covidmtl(*command, fails=True)
        assert "Read-only file system" in said and str(place) in said


@pytest.mark.usefixtures("released")
def test_a_full_cache_keeps_no_part_of_a_file(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fetch.fetch("patients")
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, str(source.parent))
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(disk("size=64k")))
    said = covidmtl("fetch", "patients", fails=True)
    assert "No space left" in said and not contents(disk("size=64k"))
    disk("size=5m")
    covidmtl("fetch", "patients")
    assert contents(disk("size=5m")) == {source.name: source.read_bytes()}
