"""A disk that is full or read-only, a download killed: nothing is lost, and the next run ends."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from covidmtl_core import fetch
from covidmtl_core.dicom import write_series
from covidmtl_core.phantom import draw_patient, make_phantom

pytestmark = pytest.mark.slow

SIZE, SPACING = (57, 65, 65), 6.0
Disk = Callable[..., Path]


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
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60 if fails else 300)
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


CONTENT = bytes(range(256)) * 400


class Slow(BaseHTTPRequestHandler):
    """Gives the file in pieces, for about a second."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        try:
            for k in range(0, len(CONTENT), 4096):
                self.wfile.write(CONTENT[k : k + 4096])
                self.wfile.flush()
                time.sleep(0.04)
        except OSError:  # who asked is dead
            return

    def log_message(self, *arguments: object) -> None:
        pass


FETCHING = """
from covidmtl_core import fetch
entry = fetch.RegistryEntry(
    "table", "table.bin", ("http://127.0.0.1:{port}/",), "none", "none", "a test",
    bytes={size}, sha256="{sha256}",
)
fetch.registry = lambda: dict(table=entry)
print("begins", flush=True)
fetch.fetch("table")
"""


def test_a_download_killed_at_random_points_ends_with_the_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    draw = random.Random(5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        facts = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
        program = FETCHING.format(port=http.server_port, **facts)
        for kill in (True,) * 6 + (False,):
            run = subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | {fetch.CACHE_VARIABLE: str(cache)},
                stdout=subprocess.PIPE,
            )
            assert run.stdout and run.stdout.readline() == b"begins\n"
            if kill:
                time.sleep(draw.uniform(0, 0.9))
                run.send_signal(signal.SIGKILL)
            run.communicate(timeout=60)
            assert (run.returncode == 0) != kill
            assert (cache / "table.bin").exists() != kill, "no part of a file has its name"
        http.shutdown()
    assert (cache / "table.bin").read_bytes() == CONTENT
