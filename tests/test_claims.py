import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from covidmtl_core import claims
from covidmtl_core.claims import Claim, Record
from covidmtl_core.errors import ClaimError

KNOWN = claims.load_claims()
ACCURACY = KNOWN["table3.rf.ct.accuracy"]


def record(value: float, data: str = "released", **fields: object) -> Record:
    return Record(ACCURACY.id, data, value, **fields)  # type: ignore[arg-type]


def test_the_paper_is_covered() -> None:
    assert len(KNOWN) >= 150
    places = {place for claim in KNOWN.values() for place in claim.place}
    assert {"abstract", "Table 2", "Table 7", "Table 8", "section 8"} <= places
    assert {claim.kind for claim in KNOWN.values()} == set(claims.KINDS)
    assert sum("Table 7" in claim.place for claim in KNOWN.values()) == 30
    assert sum("Table 8" in claim.place for claim in KNOWN.values()) == 15
    assert sum("Table 2" in claim.place for claim in KNOWN.values()) == 16


def test_every_claim_prints_what_its_value_and_precision_say() -> None:
    for claim in KNOWN.values():
        assert round(claim.value, claim.precision) == claim.value, claim.id
    assert ACCURACY.printed == "86.47%"
    assert KNOWN["table4.covidmtl.severity.auc"].printed == "0.800 ± 0.020"
    assert KNOWN["significance.smallest_p"].printed == "1.12e-08"
    assert KNOWN["table5.largest_p.ct"].printed == "< 0.001"


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (record(86.4662), claims.EXACT),
        (record(86.4649), claims.DIFFERS),
        (record(86.0, low=85.5, high=87.0, seeds=10), claims.AGREES),
        (record(86.0, low=85.5, high=87.0, seeds=9), claims.TOO_FEW),
        (record(86.0, low=85.5, high=86.4, seeds=10), claims.DIFFERS),
        (record(86.0, patients_low=80.0, patients_high=90.0), claims.DIFFERS),
        (record(86.47, data="phantom"), None),
        (record(86.47, data="Phantom"), None),
    ],
)
def test_verdicts(measured: Record, expected: str | None) -> None:
    assert claims.verdict(ACCURACY, measured) == expected


def test_bounds_hold_or_not() -> None:
    bound = KNOWN["table5.largest_p.ct"]
    assert claims.verdict(bound, Record(bound.id, "released", 9e-4)) == claims.EXACT
    assert claims.verdict(bound, Record(bound.id, "released", 2e-3)) == claims.DIFFERS
    small = KNOWN["significance.smallest_p"]
    assert claims.verdict(small, Record(small.id, "volumes", 1.123e-8)) == claims.EXACT
    assert claims.verdict(small, Record(small.id, "volumes", 1.02e-8)) == claims.DIFFERS
    about = KNOWN["gain.shiftnet.nat.least"]
    assert claims.verdict(about, Record(about.id, "volumes", 4.3)) == claims.EXACT
    assert claims.verdict(about, Record(about.id, "volumes", 4.6)) == claims.DIFFERS


def test_status_without_a_measurement() -> None:
    assert claims.status(KNOWN["table7.uniform.ct.auc"]) == claims.NEEDS_VOLUMES
    assert claims.status(KNOWN["table7.uniform.ct.accuracy"]) == claims.CHECKED
    assert claims.status(KNOWN["setting.epochs"]) == claims.STATEMENT
    assert claims.status(KNOWN["table8.ct.auc"]) == claims.NOT_MEASURED
    assert claims.status(KNOWN["cohort.external_positive"]) == claims.NEEDS_VOLUMES
    phantom = record(86.47, data="phantom")
    assert claims.status(ACCURACY, phantom) == claims.CHECKED, "a phantom value decides nothing"


def test_all_that_can_be_checked_from_print_is() -> None:
    for claim in KNOWN.values():
        if claim.unit == "%" and claim.metric == "accuracy" and claim.kind == "result":
            assert claim.check["rule"] == "count", claim.id
        if claim.metric in ("recall", "jaccard"):
            assert claim.check, claim.id
        if claim.check:
            assert claims.check_from_print(claim).holds, claim.id


@pytest.mark.parametrize(
    ("claim_id", "value"),
    [
        ("table3.rf.ct.accuracy", 86.48),
        ("table3.covidmtl_features.positives", 92.55),
        ("table7.uniform.ct.recall", 0.889),
        ("table2.proposed.jaccard", 0.950),
        ("table2.proposed.jaccard", 0.990),
        ("table4.transfer.severity.auc", 0.815),
        ("cohort.suspected", 238),
        ("cohort.train_share", 71),
        ("gain.covidmtl.nat.shiftnet", 3.1),
        ("gain.covidmtl.ct.least", 2.0),
    ],
)
def test_a_misprint_is_found(claim_id: str, value: float) -> None:
    assert claims.status(replace(KNOWN[claim_id], value=value)) == claims.CONTRADICTED


def test_a_misprinted_spread_is_found() -> None:
    claim = KNOWN["table4.transfer.severity.auc"]
    assert not claims.check_from_print(replace(claim, spread=0.026)).holds


def test_counts_are_those_that_print_so() -> None:
    assert claims.counts_behind(ACCURACY) == [345]
    assert round(100 * 345 / 399, 2) == 86.47


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fact"}, "kind"),
        ({"needs": ["money"]}, "needs"),
        ({"relation": "!"}, "relation"),
        ({"check": {"rule": "guess"}}, "rule"),
        ({"check": {"rule": "same", "of": ["nothing"]}}, "nothing"),
        ({"value": float("nan")}, "number"),
        ({"place": []}, "place"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_broken_claims_file_names_the_claim(monkeypatch, change: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    row = {"id": "a.claim", "place": ["x"], "kind": "result", "metric": "m", "value": 1.0}
    monkeypatch.setattr(claims, "load_manifest", lambda name: [row | change])
    claims.load_claims.cache_clear()
    try:
        with pytest.raises(ClaimError, match=rf"a\.claim.*{message}"):
            claims.load_claims()
    finally:
        claims.load_claims.cache_clear()


def test_saved_records_come_back_with_their_verdicts(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    first = record(86.4662, low=86.0, high=87.0, seeds=10, correct=86.33, note="so")
    claims.save_records(path, [first], {"commit": "abc"})
    content = json.loads(path.read_text())
    assert content["claims"][0]["verdict"] == "exact"
    assert {"id", "data", "value", "low", "high", "seeds"} <= set(content["claims"][0])
    assert claims.load_records(path) == {first.id: first} == claims.load_records(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["claims.json"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Record("no.claim", "released", 1.0)], "no.claim"),
        ([record(1.0), record(2.0)], "twice"),
        ([record(float("nan"))], "nan"),
        ([record(1.0, low=float("inf"))], "low is inf"),
        ([record(1.0, data="Phantom")], "'Phantom'"),
        ([record("86")], "'86'"),  # type: ignore[arg-type]
    ],
)
def test_bad_records_are_refused_and_the_old_file_stays(tmp_path, rows, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "claims.json"
    claims.save_records(path, [record(1.0)], {})
    before = path.read_bytes()
    with pytest.raises(ClaimError, match=message):
        claims.save_records(path, rows, {})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{}", '{"claims": [{"id": 1}]}', "[]"])
def test_damaged_records_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "claims.json"
    path.write_text(content)
    with pytest.raises(ClaimError, match=r"claims\.json"):
        claims.load_records(path)


def test_a_folder_without_records_says_so(tmp_path: Path) -> None:
    with pytest.raises(ClaimError, match="run a chapter first"):
        claims.load_records(tmp_path)


def test_diff_shows_what_changed_and_nothing_else() -> None:
    other = "table3.rf.nat.accuracy"
    a = {ACCURACY.id: record(86.4662), other: Record(other, "released", 73.93)}
    b = {ACCURACY.id: record(85.0), other: Record(other, "released", 73.93)}
    table = claims.diff(a, b)
    assert list(table.index) == [ACCURACY.id]
    assert table.loc[ACCURACY.id, ["verdict_a", "verdict_b"]].tolist() == ["exact", "differs"]
    assert table.loc[ACCURACY.id, "change"] == pytest.approx(-1.4662)
    assert list(claims.diff(a, {}).index) == [ACCURACY.id, other]
    assert claims.diff(a, a).empty


def test_scoreboard_holds_every_claim_once() -> None:
    board = claims.scoreboard({ACCURACY.id: record(86.0)})
    assert list(board.index) == list(KNOWN)
    assert board.loc[ACCURACY.id, "status"] == "differs"
    assert board.loc[ACCURACY.id, "reason"].startswith("−0.47 percentage points")
    assert set(board["status"]) <= set(claims.STATUSES)


def test_verdicts_of_the_built_book_are_recomputed(repository: Path) -> None:
    files = list((repository / "results").glob("*/*/claims.json"))
    if not files:
        assert not os.environ.get("COVIDMTL_REQUIRE_DATA"), "`make book` comes before `make test`"
        pytest.skip("no results: run `make book` first")
    for path in files:
        rows = json.loads(path.read_text())["claims"]
        for row in rows:
            stored = row.pop("verdict")
            measured = Record(**row)
            assert measured.data == path.parts[-3]
            assert stored == claims.verdict(KNOWN[measured.id], measured), measured.id
            assert measured.data != "phantom" or stored is None


@pytest.mark.parametrize("value", [0.0000000112, 0.02, 12.0])
def test_values_print_like_the_claim(value: float) -> None:
    claim = Claim("x", ("p",), "result", "m", value=0.5, precision=2)
    text = claims.printed_like(claim, value)
    assert float(text) == pytest.approx(value, rel=0.05)
