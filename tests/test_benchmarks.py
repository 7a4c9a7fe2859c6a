"""What all benchmarks share: turns, ratios, and where a call's time goes."""

import sys
import time

import pandas as pd
import pytest
import torch

from covidmtl_core.benchmarks import recording


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def part() -> None:
    busy(0.06)


def whole() -> None:
    busy(0.02)
    part()


def test_calls_take_turns_after_one_that_is_not_counted() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = recording.rounds_of(cases, 2, warm="a")
    assert calls == list("aabab") and times.shape == (2, 2)


def test_ratios_are_of_the_same_round() -> None:
    times = pd.DataFrame({"plain": [1.0, 10.0, 2.0], "ours": [0.5, 5.0, 2.0]})
    assert recording.ratios(times, "plain").loc["ours"].tolist() == [0.5, 0.5, 0.75]


def test_a_share_is_that_of_the_part_and_leaves_it_as_it_was() -> None:
    here, before = sys.modules[__name__], part
    assert recording.share_of(whole, here, "part") == pytest.approx(0.75, abs=0.15)
    assert part is before


def test_convolutions_have_their_share(capfd: pytest.CaptureFixture[str]) -> None:
    x, layer = torch.randn(1, 8, 24, 24, 24), torch.nn.Conv3d(8, 8, 3)
    assert recording.convolutions_share(lambda: layer(x)) > 0.5
    assert recording.convolutions_share(lambda: x.exp()) == 0
    assert capfd.readouterr() == ("", "")
