"""Are results still what this code, these packages and these data would give?"""

import json
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pooch

from covidmtl_core import book, claims, fetch
from covidmtl_core.errors import DataError

CURRENT, STALE, DAMAGED = "current", "stale", "damaged"


def verify(results: Path) -> pd.DataFrame:
    """Check every chapter's results below a folder, without computing any anew.

    A chapter is `damaged` if its records or tables are not as it left them, and `stale` if what it
    was computed with is not what there is now: its notebook, the core, the claims, the packages,
    the data files.

    Args:
        results: A folder of results, as `book.results_root`.

    Returns:
        A row a chapter: `results` (its folder, from `results`), `state` (current, stale, damaged)
        and `reasons`.

    Raises:
        DataError: There is no chapter's result below the folder.
    """
    paths = sorted(Path(results).rglob("claims.json"))
    if not paths:
        raise DataError(f"there is no claims.json below {results}: run a chapter first.")
    rows = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            wrong, old = _damage(path, content), _age(content["provenance"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            wrong, old = [f"claims.json cannot be read ({type(error).__name__})"], []
        state = DAMAGED if wrong else STALE if old else CURRENT
        folder = str(path.parent.relative_to(results))
        rows.append({"results": folder, "state": state, "reasons": "; ".join(wrong + old)})
    return pd.DataFrame(rows)


def _damage(path: Path, content: dict[str, Any]) -> list[str]:
    """What is not as the chapter left it."""
    found = []
    for name, digest in content["provenance"]["tables"].items():
        table = path.with_name(name)
        if not table.is_file():
            found.append(f"{name} is missing")
        elif pooch.file_hash(str(table), alg="sha256") != digest:
            found.append(f"{name} was changed")
    known, names = claims.load_claims(), {f.name for f in fields(claims.Record)}
    for row in content["claims"]:
        record = claims.Record(**{name: row[name] for name in names & row.keys()})
        if record.id not in known:
            found.append(f"{record.id} is no claim")
        elif claims.verdict(known[record.id], record) != row["verdict"]:
            found.append(f"the verdict on {record.id} does not follow from its numbers")
    return found


def _age(provenance: dict[str, Any]) -> list[str]:
    """What has changed since."""
    found = []
    changed = _changed_since(provenance["commit"], provenance["chapter"])
    if changed is None:
        found.append(f"its code, {provenance['commit']}, cannot be compared with this")
    elif changed:
        more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
        found.append(f"changed since {provenance['commit']}: {', '.join(changed[:2])}{more}")
    for name, version in book.versions().items():
        then = provenance["versions"].get(name, "missing")
        if then != version:
            found.append(f"{name} was {then} and is {version}")
    registered = {entry.file: entry.sha256 for entry in fetch.registry().values()}
    for name, digest in provenance["data"].items():
        if registered.get(name) not in (None, digest):
            found.append(f"{name} was another file")
    return found


def _changed_since(commit: str, chapter: str) -> list[str] | None:
    """Files a chapter rests on that differ from a commit; None if that cannot be told."""
    root = book.repository_folder()
    if root is None:
        return [] if commit == book.commit() else None
    if commit.endswith("-dirty"):
        return None
    of_chapter = ["covidmtl_core", "data_manifest", "book/recorded", f"book/{chapter}.ipynb"]
    command = ["git", "-C", str(root), "diff", "--name-only", commit, "--", *of_chapter]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.split()
