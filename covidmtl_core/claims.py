"""The book's signature: every number of the paper, the book's own beside it, and a verdict.

`data_manifest/paper_claims.yml` holds the claims. A chapter records what it measured; a record on
released data or volumes gets a verdict, one on phantoms never does.
"""

import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from covidmtl_core.errors import ClaimError
from covidmtl_core.fetch import load_manifest

KINDS = ("result", "cohort", "setting")
NEEDS = ("released", "volumes", "masks", "external")
RELATIONS = ("=", "<", ">", ">=", "~")

BOUNDS = {"<": operator.lt, ">": operator.gt, ">=": operator.ge}

EXACT = "exact"
AGREES = "agrees"
DIFFERS = "differs"
TOO_FEW = "too few seeds"
CHECKED = "checked from print"
CONTRADICTED = "contradicted from print"
NEEDS_VOLUMES = "needs the CT volumes"
NOT_MEASURED = "not measured"
STATEMENT = "statement"
VERDICTS = (EXACT, AGREES, DIFFERS, TOO_FEW)
STATUSES = (*VERDICTS, CHECKED, CONTRADICTED, NEEDS_VOLUMES, NOT_MEASURED, STATEMENT)

MEASURED_ON = ("released", "volumes")
"""Data on which a value can have a verdict."""

MIN_SEEDS = 10
"""A stochastic result can agree only if so many training seeds were run."""


@dataclass(frozen=True)
class Claim:
    """One number that the paper states.

    Attributes:
        id: Unique name, `place.model.task.metric` where that applies.
        place: Sections and tables that state it.
        kind: `result` (of an experiment), `cohort` (counted in the data) or `setting`.
        metric: What the number is.
        value: The number as printed.
        precision: Decimals printed.
        unit: `%`, `mm`, ...; empty for a pure number.
        model: Model or method, where there is one.
        task: `ct`, `nat` or `severity`, where there is one.
        spread: Printed standard deviation, or None.
        relation: `=` states the value, `<`, `>` and `>=` bounds, `~` an approximation.
        needs: Data a measurement needs (`released`, `volumes`, `masks`, `external`); empty if no
            data can settle it.
        check: How the printed number can be checked without data, a rule of `PRINT_RULES`.
        note: What a reader should know about the printed number.
    """

    id: str
    place: tuple[str, ...]
    kind: str
    metric: str
    value: float
    precision: int = 0
    unit: str = ""
    model: str = ""
    task: str = ""
    spread: float | None = None
    relation: str = "="
    needs: tuple[str, ...] = ()
    check: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def printed(self) -> str:
        """The number as the paper prints it."""
        digits = f"{self.value:.{self.precision}f}"
        if 0 < abs(self.value) < 1e-4:
            digits = f"{self.value:g}"
        sign = {"=": "", "<": "< ", ">": "> ", ">=": "≥ ", "~": "about "}[self.relation]
        spread = f" ± {self.spread:.{self.precision}f}" if self.spread is not None else ""
        return f"{sign}{digits}{spread}{self.suffix}"

    @property
    def suffix(self) -> str:
        """The unit as it follows a number."""
        return self.unit if self.unit in ("", "%") else f" {self.unit}"

    @property
    def half_unit(self) -> float:
        """Half a unit of the last printed decimal."""
        return 0.5 * 10.0**-self.precision


@dataclass(frozen=True)
class Record:
    """What a chapter measured for one claim.

    Attributes:
        id: The claim's id.
        data: `phantom`, `released` or `volumes`: what the value was measured on.
        value: The number in the claim's unit, from the recipe as released.
        low: Lower end of the central 95 % over training seeds; None if nothing is drawn.
        high: Upper end.
        seeds: Number of training seeds behind `low` and `high`; 0 if nothing is drawn.
        patients_low: Lower end of the 95 % bootstrap interval over test patients; it is shown and
            decides nothing.
        patients_high: Upper end.
        correct: The value done right, where the released recipe is not.
        note: What a reader should know about the value.
    """

    id: str
    data: str
    value: float
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    patients_low: float | None = None
    patients_high: float | None = None
    correct: float | None = None
    note: str = ""


NUMBERS = ("value", "low", "high", "patients_low", "patients_high", "correct", "seeds")
"""The fields of a record that hold numbers."""


@cache
def load_claims() -> dict[str, Claim]:
    """The claims by id, roughly in the paper's order.

    Raises:
        ClaimError: The file breaks a rule: the message names the claim.
    """
    claims: dict[str, Claim] = {}
    row: Any = None
    try:
        for row in load_manifest("paper_claims.yml"):
            for name in ("place", "needs"):
                row[name] = tuple(row.get(name, ()))
            claim = Claim(**row)
            _validate(claim, claims)
            claims[claim.id] = claim
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        which = row.get("id", row) if isinstance(row, dict) else row
        raise ClaimError(f"paper_claims.yml: {which}: {error}.") from error
    for claim in claims.values():
        missing = [i for i in _operands(claim) if i not in claims]
        if missing:
            raise ClaimError(f"paper_claims.yml: {claim.id} checks against unknown {missing}.")
    return claims


def _validate(claim: Claim, earlier: Mapping[str, Claim]) -> None:
    problems = [
        (claim.id in earlier, "the id occurs twice"),
        (claim.kind not in KINDS, f"kind must be one of {KINDS}"),
        (claim.relation not in RELATIONS, f"relation must be one of {RELATIONS}"),
        (not set(claim.needs) <= set(NEEDS), f"needs must be among {NEEDS}"),
        (not claim.place, "place is empty"),
        (bool(claim.check) and claim.check.get("rule") not in PRINT_RULES, "unknown check rule"),
        (not all(isinstance(name, str) for name in _operands(claim)), "check names no claims"),
        (not math.isfinite(claim.value), "value is not a number"),
    ]
    for wrong, reason in problems:
        if wrong:
            raise ClaimError(f"paper_claims.yml: {claim.id}: {reason}.")


# --- verdicts -------------------------------------------------------------------------------


def verdict(claim: Claim, record: Record) -> str | None:
    """How the book's number compares with the paper's.

    `exact`: equal at the printed precision (or the stated bound holds). `agrees`: the paper's
    number lies within the central 95 % of at least ten training seeds. `too few seeds`: it is not
    exact, and there were fewer. `differs`: none of these.

    Returns:
        The verdict, or None for a phantom value.
    """
    if record.data not in MEASURED_ON:
        return None
    if holds(claim, record.value):
        return EXACT
    if record.seeds >= MIN_SEEDS and record.low is not None and record.high is not None:
        if record.low <= claim.value <= record.high:
            return AGREES
    return TOO_FEW if 0 < record.seeds < MIN_SEEDS else DIFFERS


def holds(claim: Claim, value: float, slack: float = 0.0) -> bool:
    """Whether a value is what the claim says: its bound, about it (10%), or equal as printed.

    Args:
        claim: The claim.
        value: A number in the claim's unit.
        slack: Added to half a unit of the last printed decimal.
    """
    if claim.relation in BOUNDS:
        return bool(BOUNDS[claim.relation](value, claim.value))
    if claim.relation == "~":
        return abs(value - claim.value) <= 0.1 * abs(claim.value)
    return abs(value - claim.value) <= (claim.half_unit + slack) * (1 + 1e-6)


def status(claim: Claim, record: Record | None = None) -> str:
    """A claim's line on the scoreboard: its verdict, else what can be said without one."""
    measured = verdict(claim, record) if record else None
    if measured:
        return measured
    if claim.check:
        return CHECKED if check_from_print(claim).holds else CONTRADICTED
    if {"volumes", "external"} & set(claim.needs):
        return NEEDS_VOLUMES
    return NOT_MEASURED if claim.needs else STATEMENT


# --- checks that need no data ---------------------------------------------------------------


@dataclass(frozen=True)
class PrintCheck:
    """Outcome of checking a printed number against other printed numbers."""

    holds: bool
    reason: str


def check_from_print(claim: Claim) -> PrintCheck:
    """Check a claim by its rule.

    Raises:
        ClaimError: The claim has no rule.
    """
    if not claim.check:
        raise ClaimError(f"{claim.id} has no rule to check it from print.")
    return PRINT_RULES[claim.check["rule"]](claim)


def counts_behind(claim: Claim) -> list[int]:
    """The counts k of n that print as this percentage; n stands in the claim's `count` rule."""
    n = claim.check["n"]
    return [k for k in range(n + 1) if holds(claim, 100 * k / n)]


def _operands(claim: Claim) -> list[str]:
    return list(claim.check.get("of", ()))


def _values(claim: Claim) -> list[Claim]:
    return [load_claims()[i] for i in _operands(claim)]


def _count(claim: Claim) -> PrintCheck:
    n, found = claim.check["n"], counts_behind(claim)
    text = " or ".join(str(k) for k in found) if found else "no count"
    return PrintCheck(bool(found), f"{text} of {n} prints as {claim.printed}")


def _same(claim: Claim) -> PrintCheck:
    (other,) = _values(claim)
    scale = 100 if other.unit == "%" and claim.unit != "%" else 1
    equal = holds(claim, other.value / scale, other.half_unit / scale)
    return PrintCheck(equal, f"weighted recall is accuracy: {claim.printed} and {other.printed}")


def _jaccard(claim: Claim) -> PrintCheck:
    # J = D / (2 - D) is convex, so a mean of J lies between J(mean D) and mean D.
    (dice,) = _values(claim)
    low = dice.value - dice.half_unit
    lowest, highest = low / (2 - low), dice.value + dice.half_unit
    possible = lowest - claim.half_unit <= claim.value <= highest + claim.half_unit
    return PrintCheck(
        possible, f"a mean Dice of {dice.printed} allows {lowest:.3f} to {highest:.3f}"
    )


def _mean(claim: Claim) -> PrintCheck:
    others = _values(claim)
    values = pd.Series([other.value for other in others])
    mean, spread = values.mean(), values.std(ddof=0)
    slack = max(other.half_unit for other in others)
    equal = holds(claim, mean, slack)
    if claim.spread is not None:
        equal &= holds(replace(claim, value=claim.spread), spread, slack)
    listed = ", ".join(other.printed for other in others)
    return PrintCheck(
        equal, f"{listed} have mean {mean:.4f}, population standard deviation {spread:.4f}"
    )


def _difference(claim: Claim) -> PrintCheck:
    first, second = _values(claim)
    difference = first.value - second.value
    slack = first.half_unit + second.half_unit if claim.precision else 0.0
    return PrintCheck(
        holds(claim, difference, slack), f"{first.printed} - {second.printed} = {difference:g}"
    )


def _share(claim: Claim) -> PrintCheck:
    part, whole = _values(claim)
    share = 100 * part.value / whole.value
    return PrintCheck(holds(claim, share), f"{part.printed} of {whole.printed} is {share:.2f}%")


PRINT_RULES: dict[str, Callable[[Claim], PrintCheck]] = {
    "count": _count,
    "same": _same,
    "jaccard": _jaccard,
    "mean": _mean,
    "difference": _difference,
    "share": _share,
}


# --- records --------------------------------------------------------------------------------


def save_records(path: Path, records: Iterable[Record], provenance: Mapping[str, Any]) -> None:
    """Write a chapter's records, with their verdicts, in one step.

    Raises:
        ClaimError: A record breaks a rule of `check_record`, or is given twice.
    """
    known, rows = load_claims(), {}
    for record in records:
        if record.id in rows:
            raise ClaimError(f"{record.id} was recorded twice.")
        check_record(record)
        rows[record.id] = asdict(record) | {"verdict": verdict(known[record.id], record)}
    content = {"provenance": dict(provenance), "claims": list(rows.values())}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def check_record(record: Record) -> None:
    """Refuse a record that no verdict can rest on.

    Raises:
        ClaimError: It names no claim, its data is unknown, or a number in it is not finite.
    """
    if not isinstance(record.id, str) or record.id not in load_claims():
        raise ClaimError(f"{record.id!r} is not a claim of paper_claims.yml.")
    if record.data not in ("phantom", *MEASURED_ON):
        raise ClaimError(f"{record.id} was recorded on {record.data!r}, which is no data tier.")
    for name in NUMBERS:
        number = getattr(record, name)
        optional = number is None and name not in ("value", "seeds")
        if not optional and not (isinstance(number, int | float) and math.isfinite(number)):
            raise ClaimError(f"{record.id}: {name} is {number!r}; a finite number is needed.")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_records(source: Path) -> dict[str, Record]:
    """Records by claim id.

    Args:
        source: A `claims.json`, or a folder: all `claims.json` below it.

    Raises:
        ClaimError: There is none, one cannot be read, or two files record one claim.
    """
    paths = sorted(source.rglob("claims.json")) if source.is_dir() else [source]
    records: dict[str, Record] = {}
    for path in paths:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["claims"]
            names = {f.name for f in fields(Record)}
            found = [Record(**{k: v for k, v in row.items() if k in names}) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClaimError(
                f"{path} is not a file of recorded claims ({type(error).__name__}: {error}); "
                "run its chapter again."
            ) from error
        for record in found:
            check_record(record)
            if record.id in records:
                raise ClaimError(
                    f"{record.id} is recorded twice below {source}, again in {path}: name the "
                    "folder of one tier."
                )
            records[record.id] = record
    if not paths:
        raise ClaimError(f"There is no claims.json below {source}: run a chapter first.")
    return records


def scoreboard(records: Mapping[str, Record]) -> pd.DataFrame:
    """Every claim with the book's number and its status, in the paper's order.

    Returns:
        Indexed by claim id: `place`, `kind`, `model`, `task`, `metric`, `paper` (as printed),
        `book` (at the printed precision), `status`, `reason`, and the numbers `value`,
        `paper_value`, `low`, `high`, `patients_low`, `patients_high`, `correct`, `seeds`.
    """
    rows = []
    for claim in load_claims().values():
        record = records.get(claim.id)
        state = status(claim, record)
        rows.append(
            {
                "id": claim.id,
                "place": ", ".join(claim.place),
                "kind": claim.kind,
                "model": claim.model,
                "task": claim.task,
                "metric": claim.metric,
                "paper": claim.printed,
                "book": printed_like(claim, record.value) if record else "",
                "status": state,
                "reason": _reason(claim, record, state),
                "paper_value": claim.value,
                **{name: getattr(record, name) if record else None for name in NUMBERS},
            }
        )
    return pd.DataFrame(rows).set_index("id")


def printed_like(claim: Claim, value: float) -> str:
    """A value at the precision and in the unit of the claim."""
    digits = f"{value:.{claim.precision}f}"
    if value and abs(value) < claim.half_unit:
        digits = f"{value:.2g}"
    return digits + claim.suffix


def _reason(claim: Claim, record: Record | None, state: str) -> str:
    if state == DIFFERS and record:
        change = f"{record.value - claim.value:+.{claim.precision}f}".replace("-", "−")
        unit = " percentage points" if claim.unit == "%" else claim.suffix
        return f"{change}{unit} against the paper. {record.note}".strip()
    if state == AGREES and record:
        span = printed_range(claim, record.low, record.high)
        return f"{record.seeds} seeds span {span}. {record.note}".strip()
    if state == EXACT and record:
        return record.note or "equal as printed"
    return check_from_print(claim).reason if claim.check else claim.note


def diff(a: Mapping[str, Record], b: Mapping[str, Record]) -> pd.DataFrame:
    """Claims whose value, data or verdict is not the same in two runs.

    Returns:
        Indexed by claim id: `value_a`, `value_b`, `change`, `verdict_a`, `verdict_b`; NaN and None
        where a run has no record of the claim.
    """
    known = load_claims()
    rows = {}
    for claim_id in [i for i in known if i in a or i in b]:
        left, right = a.get(claim_id), b.get(claim_id)
        if left and right and (left.value, left.data) == (right.value, right.data):
            if verdict(known[claim_id], left) == verdict(known[claim_id], right):
                continue
        rows[claim_id] = {
            "value_a": left.value if left else math.nan,
            "value_b": right.value if right else math.nan,
            "change": right.value - left.value if left and right else math.nan,
            "verdict_a": verdict(known[claim_id], left) if left else None,
            "verdict_b": verdict(known[claim_id], right) if right else None,
        }
    columns = ["value_a", "value_b", "change", "verdict_a", "verdict_b"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("id")


def confidence(claim: Claim, record: Record | None) -> str:
    """A few words on how sure a claim's status is."""
    if record and record.data in MEASURED_ON:
        seeds = printed_range(claim, record.low, record.high)
        patients = printed_range(claim, record.patients_low, record.patients_high)
        parts = [f"{record.seeds} seeds: {seeds}"] if seeds else []
        parts += [f"other patients: {patients}"] if patients else []
        return "; ".join(parts) or "counted"
    if claim.check.get("rule") == "count" and counts_behind(claim):
        from covidmtl_core.evaluation import exact_interval  # scikit-learn takes half a second

        low, high = exact_interval(counts_behind(claim)[0], claim.check["n"])
        interval = printed_range(claim, 100 * low, 100 * high)
        return f"not measured; {_count(claim).reason.split(' prints')[0]}: {interval}"
    return "not measured"


def printed_range(claim: Claim, low: float | None, high: float | None) -> str:
    """An interval at the precision of the claim; empty without one."""
    if low is None or high is None:
        return ""
    return f"{low:.{claim.precision}f} to {high:.{claim.precision}f}"
