"""A book that is killed, and whose disk is full: the next run ends, as if nothing had been."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_engine import command, environment, snakemake

pytestmark = pytest.mark.slow

WANTED = ("tier=phantom", "chapter=cohort")


def start(source: Path, place: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(source, place, *WANTED),
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def results(folder: Path) -> dict[str, object]:
    """What the chapters measured and saved, without where, when and how fast."""
    found: dict[str, object] = {}
    for path in sorted((folder / "results").glob("phantom/*/*")):
        if path.name == "claims.json":
            found[str(path.relative_to(folder))] = json.loads(path.read_text())["claims"]
        elif path.suffix == ".csv":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def test_killed_and_out_of_room_it_ends_as_if_nothing_had_been(
    disk: Callable[[str], Path], tmp_path: Path, repository: Path
) -> None:
    source = repository / "book"
    place = disk("size=1m")
    full = snakemake(source, place, *WANTED, timeout=60)
    said = full.stdout + full.stderr
    assert full.returncode != 0 and "less than 50 MB left" in said and "Traceback" not in said
    disk("size=100m")
    draw = random.Random(1)
    for stage in ("Executing", "Executing", "Executing", "Rendering"):
        run = start(source, place)
        assert run.stdout and any(stage in line for line in run.stdout)
        time.sleep(draw.uniform(0, 2))
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    run = start(source, place)
    assert run.stdout
    for line in run.stdout:
        if "Executing" in line or "Rendering" in line:
            break
    filler = place / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0 and "Traceback" not in said
    assert "No space left" in said, said
    filler.unlink()
    ended = snakemake(source, place, *WANTED)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    whole = tmp_path / "whole"
    undisturbed = snakemake(source, whole, *WANTED)
    assert undisturbed.returncode == 0
    assert results(place) == results(whole) and results(whole)
    for folder in (place, whole):
        assert (folder / "_build" / "html" / "cohort.html").is_file()
