"""Keeping what a benchmark measured, with what it was measured on."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from covidmtl_core import book

WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def with_warm_allocator() -> None:
    """Start this program again with glibc keeping freed memory, unless it does.

    By default it gives large blocks back to the system at once, and every operation then mostly
    pays for fresh pages.
    """
    if any(os.environ.get(name) != value for name, value in WARM.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WARM)


def rounds_of(
    cases: dict[str, Callable[[], Any]], rounds: int, warm: Collection[str] | None = None
) -> pd.DataFrame:
    """Seconds of each call (columns) in each round, in turns, after one that is not counted.

    Args:
        cases: Name to call.
        rounds: How often each is timed.
        warm: Those that have the uncounted call; None for all.
    """
    for name in cases if warm is None else warm:
        cases[name]()
    times: list[dict[str, float]] = []
    for _ in range(rounds):
        row = {}
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            row[name] = time.perf_counter() - start
        times.append(row)
    return pd.DataFrame(times)


def interleaved(
    cases: dict[str, Callable[[], Any]], rounds: int, warm: Collection[str] | None = None
) -> dict[str, float]:
    """Median seconds of each call; see `rounds_of`."""
    return rounds_of(cases, rounds, warm).median().to_dict()


def ratios(times: pd.DataFrame, base: str) -> pd.DataFrame:
    """Times against those of one call in the same round.

    Args:
        times: From `rounds_of`.
        base: The call compared with.

    Returns:
        A line for each other call: `ratio`, the median over rounds, and `low` and `high`, its
        quartiles.
    """
    shares = times.drop(columns=base).div(times[base], axis=0)
    found = shares.quantile([0.5, 0.25, 0.75]).T
    return found.set_axis(["ratio", "low", "high"], axis=1)


def record(name: str, figures: dict[str, Any], packages: tuple[str, ...], device: str = "") -> None:
    """Write figures and their circumstances to `book/recorded/NAME.json`."""
    circumstances = {
        "device": device or f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {package: metadata.version(package) for package in packages},
        "commit": book.commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    target = Path(__file__).parents[2] / "book" / "recorded" / f"{name}.json"
    target.write_text(json.dumps(figures | circumstances, indent=2) + "\n")
    print(target.read_text())
