"""Shared fixtures: the released tables where they can be had, a cache of one's own where not."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from covidmtl_core import book, fetch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def released() -> None:
    """Skip without the released tables; where they must be there, fail instead."""
    if book.resolve_tier("auto") != "released":
        reason = "the released tables cannot be had: no network and no COVIDMTL_DATA_MIRROR"
        if os.environ.get("COVIDMTL_REQUIRE_DATA"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def ct_folder() -> Path:
    """The folder of real scans; skip without it, or fail where it must be there."""
    named = os.environ.get("COVIDMTL_TEST_CT", "")
    if named and Path(named).is_dir():
        return Path(named)
    reason = "there are no real scans: COVIDMTL_TEST_CT names no folder"
    if os.environ.get("COVIDMTL_REQUIRE_DATA"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no mirror."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(folder))
    monkeypatch.delenv(fetch.MIRROR_VARIABLE, raising=False)
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk with such options of tmpfs, or changes it; needs the rights to."""
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
