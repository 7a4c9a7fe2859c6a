"""Keeping what a benchmark measured, with what it was measured on."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

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


def interleaved(
    cases: dict[str, Callable[[], Any]], rounds: int, warm: Collection[str] | None = None
) -> dict[str, float]:
    """Median seconds of each call, in turns, after one that is not counted.

    Args:
        cases: Name to call.
        rounds: How often each is timed.
        warm: Those that have the uncounted call; None for all.
    """
    for name in cases if warm is None else warm:
        cases[name]()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


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
