import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from covidmtl_core import book, claims, fetch, pages
from covidmtl_core.claims import Record
from covidmtl_core.errors import ClaimError, DataError, DownloadError, ParameterError


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(book.RESULTS_VARIABLE, str(tmp_path / "results"))
    return tmp_path / "results"


def test_results_go_to_the_variable_else_to_the_repository(
    repository, results, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    assert book.results_folder("phantom", "cohort") == results / "phantom" / "cohort"
    monkeypatch.delenv(book.RESULTS_VARIABLE)
    assert book.results_root() == repository / "results"
    monkeypatch.setattr(book, "repository_folder", lambda: None)
    assert book.results_root() == Path.cwd() / "results"


def test_a_chapter_leaves_claims_tables_and_provenance(results: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    chapter = book.start("cohort", tier="phantom", seed=3, n_trees=5)
    chapter.record("cohort.studies", 350)
    shown = chapter.compare()
    assert shown.loc["studies", "verdict"] == "none (synthetic)"
    chapter.save_table("numbers", shown)
    line = chapter.finish().data
    content = json.loads((results / "phantom" / "cohort" / "claims.json").read_text())
    assert content["claims"][0]["verdict"] is None
    assert content["provenance"]["parameters"] == {"seed": 3, "n_trees": 5}
    assert content["provenance"]["commit"] in line and "seed 3" in line
    again = book.upstream_table("phantom", "cohort", "numbers")
    assert again is not None and list(again.index) == ["studies"]
    assert book.upstream_table("phantom", "cohort", "nothing") is None
    assert str(Path.home()) not in line


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tier": "real"}, "phantom, released, volumes"),
        ({"tier": "volumes"}, "released"),
        ({"tier": "phantom", "n_trees": 0}, "n_trees is 0"),
        ({"tier": "phantom", "n_seeds": "10"}, "n_seeds is '10'"),
        ({"tier": "phantom", "n_bootstrap": 1.5}, "n_bootstrap"),
        ({"tier": "phantom", "seed": -1}, "seed is -1"),
        ({"tier": "phantom", "n_top": True}, "n_top"),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        book.start("cohort", **parameters)


def test_a_wrong_record_is_refused_at_once(results: Path) -> None:
    chapter = book.start("cohort", tier="phantom")
    with pytest.raises(ClaimError, match=r"cohort\.typo"):
        chapter.record("cohort.typo", 1)
    chapter.record("cohort.studies", 1)
    with pytest.raises(ClaimError, match="twice"):
        chapter.record("cohort.studies", 2)


def test_missing_upstream_results_name_their_chapter(results: Path) -> None:
    with pytest.raises(DataError, match=r"diagnosis\.ipynb"):
        book.upstream_records("released", ["diagnosis"])
    assert book.upstream_records("phantom", ["diagnosis"]) == {}


def test_on_volumes_what_was_not_run_on_scans_counts_as_on_the_tables(results: Path) -> None:
    for tier, chapter, claim, value in (
        ("released", "cohort", "cohort.studies", 1329),
        ("released", "diagnosis", "table3.rf.ct.accuracy", 1),
        ("volumes", "diagnosis", "table3.rf.ct.accuracy", 2),
    ):
        record = Record(claim, tier, value)
        claims.save_records(results / tier / chapter / "claims.json", [record], {})
    found = book.upstream_records("volumes", ["cohort", "diagnosis", "severity"])
    assert {name: (r.data, r.value) for name, r in found.items()} == {
        "cohort.studies": ("released", 1329),
        "table3.rf.ct.accuracy": ("volumes", 2),
    }


@pytest.mark.parametrize(
    ("n", "verdict"), [(1, claims.TOO_FEW), (9, claims.TOO_FEW), (10, claims.AGREES)]
)
def test_seeds_are_recorded_with_their_spread(results: Path, n: int, verdict: str) -> None:
    chapter = book.start("diagnosis", tier="released")
    claim = claims.load_claims()["table3.covidmtl.ct.accuracy"]
    values = pd.Series([claim.value + 0.3 + k - n // 2 for k in range(n)])
    chapter.record_seeds(claim.id, values, correct=1.0)
    record = chapter.records[claim.id]
    assert record.seeds == n and record.value == pytest.approx(values.mean())
    assert (record.low is None) == (n == 1) and record.correct == 1
    if n > 1:
        assert (record.low, record.high) == tuple(np.quantile(values, [0.025, 0.975]))
    assert claims.verdict(claim, record) == verdict


def test_auto_is_phantom_without_data(empty_cache, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def offline(file_id: str, progressbar: bool = False) -> Path:
        raise DownloadError("no network")

    monkeypatch.setattr(fetch, "fetch", offline)
    assert book.resolve_tier("auto") == "phantom"
    with pytest.raises(DownloadError):
        book.resolve_tier("released")  # what was asked for is never replaced
    with pytest.raises(ParameterError, match="sythetic"):
        book.resolve_tier("sythetic")


@pytest.mark.usefixtures("released")
def test_auto_is_released_with_data() -> None:
    assert book.resolve_tier("auto") == "released"


def test_assembly_puts_the_banner_on_every_page(repository, results, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source, runs = repository / "book", tmp_path / "runs"
    target = pages.assemble(source, runs, "phantom")
    names = sorted(path.name for path in source.glob("*.md"))
    assert sorted(path.name for path in target.glob("*.md")) == names
    for name in names:
        assert 'data-tier="phantom"' in (target / name).read_text()
    for name in pages.chapters(source):
        text = (target / f"{name}.ipynb").read_text()
        assert "not executed in this build" in text
    executed = json.loads((source / "cohort.ipynb").read_text())
    executed["metadata"]["papermill"] = {"start_time": "2026-11-28T02:48:18", "duration": 3.4}
    (runs / "cohort.ipynb").write_text(json.dumps(executed))
    assert "not executed" in (pages.assemble(source, runs, "phantom") / "cohort.ipynb").read_text()
    (runs / "cohort.done").touch()
    target = pages.assemble(source, runs, "phantom")
    assert "not executed" not in (target / "cohort.ipynb").read_text()
    assert (
        "| [cohort](cohort.ipynb) | 2026-11-28 02:48 | 3 |"
        in (target / "executions.txt").read_text()
    )


def test_failures_say_where_to_look(tmp_path: Path) -> None:
    wanted = {"cohort": [], "diagnosis": [], "features": ["diagnosis"], "board": ["features"]}
    for finished in ("cohort", "board"):
        (tmp_path / f"{finished}.done").touch()
    (tmp_path / "features.ipynb").write_text("an old failure")
    lines = pages.failures(tmp_path, wanted)
    assert lines[0].startswith("diagnosis failed: see") and "diagnosis.log" in lines[0]
    assert [line.split(",")[0] for line in lines[1:]] == [
        "features was not run",
        "board was not run",
    ]


def test_auto_does_not_hide_a_wrong_mirror(empty_cache, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv(fetch.MIRROR_VARIABLE, "/no/such/folder")
    with pytest.raises(DataError, match="/no/such/folder"):
        book.resolve_tier("auto")
