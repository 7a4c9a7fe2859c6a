import json
from pathlib import Path

import pandas as pd
import pytest

from covidmtl_core import book, fetch, verification
from covidmtl_core.errors import DataError


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(book.RESULTS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fetch, "USED", {"info.ppl": fetch.find_entry("patients").sha256})
    monkeypatch.setattr(verification, "_changed_since", lambda commit, chapter: [])
    chapter = book.start("cohort", tier="released")
    chapter.record("cohort.studies", 1329)
    chapter.save_table("numbers", pd.DataFrame({"patients": [1329]}))
    chapter.finish()
    return tmp_path


def state(results: Path) -> tuple[str, str]:
    (row,) = verification.verify(results).itertuples()
    assert row.results == "released/cohort"
    return row.state, row.reasons


def change(results: Path, **facts: object) -> None:
    path = results / "released" / "cohort" / "claims.json"
    content = json.loads(path.read_text())
    content["provenance"] |= facts
    path.write_text(json.dumps(content))


def test_results_just_made_are_current(results: Path) -> None:
    assert state(results) == ("current", "")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"versions": {"numpy": "0.1"}}, "numpy was 0.1"),
        ({"data": {"info.ppl": "0" * 64}}, "info.ppl was another file"),
    ],
)
def test_what_changed_since_makes_results_stale(results: Path, facts: dict, said: str) -> None:
    change(results, **facts)
    found, reasons = state(results)
    assert found == "stale" and said in reasons


def test_code_is_compared_with_the_commit(
    results: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.undo()
    assert verification._changed_since("0000000", "cohort") is None
    assert verification._changed_since("abc-dirty", "cohort") is None
    monkeypatch.setattr(book, "repository_folder", lambda: None)
    assert verification._changed_since(book.commit(), "cohort") == []
    assert verification._changed_since("another", "cohort") is None


def test_what_was_tampered_with_is_damaged(results: Path) -> None:
    folder = results / "released" / "cohort"
    path, table = folder / "claims.json", folder / "numbers.csv"
    whole, kept = path.read_text(), table.read_bytes()
    table.write_text("patients\n1330\n")
    assert state(results) == ("damaged", "numbers.csv was changed")
    table.unlink()
    assert state(results) == ("damaged", "numbers.csv is missing")
    table.write_bytes(kept)
    path.write_text(whole.replace('"exact"', '"agrees"'))
    assert "does not follow" in state(results)[1]
    path.write_text(whole[:-9])
    assert state(results) == ("damaged", "claims.json cannot be read (JSONDecodeError)")
    path.unlink()
    with pytest.raises(DataError, match="run a chapter first"):
        verification.verify(results)
