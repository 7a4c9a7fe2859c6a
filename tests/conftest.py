"""Shared fixtures: the released tables where they can be had, a cache of one's own where not."""

import os
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


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no mirror."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(folder))
    monkeypatch.delenv(fetch.MIRROR_VARIABLE, raising=False)
    return folder
