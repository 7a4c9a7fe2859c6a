"""Keeping what a benchmark measured, with what it was measured on."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pandas as pd
import torch

from covidmtl_core import book

WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


_CPU = torch.profiler.ProfilerActivity.CPU


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


def share_of(call: Callable[[], Any], module: ModuleType, name: str) -> float:
    """The share of a call's processor time that a function below it takes, all threads together.

    Args:
        call: What to run, once, after one run that is not counted.
        module: Where the function is.
        name: Of the function; it must neither call itself nor run twice at the same time.
    """
    function, spent = getattr(module, name), 0.0

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.process_time()
        try:
            return function(*given, **options)
        finally:
            spent += time.process_time() - start

    call()
    with mock.patch.object(module, name, timed):
        start = time.process_time()
        call()
        return spent / (time.process_time() - start)


def convolutions_share(call: Callable[[], Any]) -> float:
    """The share of a call's processor time that PyTorch spends in convolutions."""
    call()
    with _without_stderr(), torch.profiler.profile(activities=[_CPU]) as profiler:
        call()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(t for key, t in times.items() if "conv" in key) / sum(times.values())


@contextmanager
def _without_stderr() -> Iterator[None]:
    """PyTorch's profiler announces itself there, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
