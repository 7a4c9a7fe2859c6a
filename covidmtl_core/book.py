"""What a chapter needs to be a chapter: parameters, paths, a banner, records, provenance."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from covidmtl_core import claims, fetch
from covidmtl_core.cohort import check_tier
from covidmtl_core.errors import ClaimError, DataError, DownloadError, ParameterError
from covidmtl_core.style import MODELS

RESULTS_VARIABLE = "COVIDMTL_RESULTS"

DRIVE = Path("/content/drive/MyDrive")
"""Where Colab mounts a reader's drive."""

BANNERS = {
    "phantom": (
        "Synthetic data",
        "This page was built on a seeded synthetic cohort. No computed number on it says anything "
        "about COVID-19, and none has a verdict.",
    ),
    "released": (
        "Released data",
        "Computed on the authors' released tables of 1,329 patients; no CT volume was used.",
    ),
    "volumes": (
        "CT volumes",
        "Computed on CT volumes supplied by the reader. Only on the paper's own 1,329 scans does a "
        "number have a verdict.",
    ),
}
PHANTOM_SCANS = (
    "Synthetic scans",
    "The CT scans on this page are phantoms. No number computed on them says anything about "
    "COVID-19, and none has a verdict.",
)
SIZES = {
    "n_trees": {"phantom": 100, "released": 1000, "volumes": 1000},
    "n_seeds": {"phantom": 10, "released": 10, "volumes": 10},
    "n_phantoms": {"phantom": 3, "released": 6, "volumes": 6},
    "n_scans": {"phantom": 8, "released": 24, "volumes": 24},
    "n_patients": {"phantom": 40, "released": 100, "volumes": 100},
    "n_epochs": {"phantom": 2, "released": 16, "volumes": 80},
    "n_epochs_features": {"phantom": 10, "released": 80, "volumes": 80},
    "n_runs": {"phantom": 2, "released": 10, "volumes": 10},
    "n_splits": {"phantom": 5, "released": 30, "volumes": 30},
    "n_rounds": {"phantom": 2, "released": 5, "volumes": 5},
    "n_repeats": {"phantom": 1, "released": 5, "volumes": 5},
    "n_bootstrap": {"phantom": 200, "released": 1000, "volumes": 1000},
}
"""What a size that a chapter leaves at None becomes: the paper's, or a quick one on phantoms."""

_COLOURS = {"phantom": "#D55E00", "released": "#009E73", "volumes": "#0072B2"}


def repository_folder() -> Path | None:
    """The working copy this package runs from, or None if it was installed without one."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "book" / "_toc.yml").is_file() else None


def results_root() -> Path:
    """`$COVIDMTL_RESULTS`, else `results` in the repository, else in the working folder.

    On Colab with a mounted drive, `covidmtl` on the drive: what is there survives a disconnect.
    """
    named = os.environ.get(RESULTS_VARIABLE)
    if named:
        return Path(named)
    if "google.colab" in sys.modules and DRIVE.is_dir():
        return DRIVE / "covidmtl"
    return (repository_folder() or Path.cwd()) / "results"


def results_folder(tier: str, chapter: str) -> Path:
    """Where a chapter's results for a tier are kept."""
    return results_root() / tier / chapter


def recorded(name: str) -> dict[str, Any] | None:
    """A figure measured once and kept in `book/recorded`, or None without the repository."""
    root = repository_folder()
    path = root / "book" / "recorded" / f"{name}.json" if root else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None


def upstream_table(tier: str, chapter: str, name: str, **parameters: Any) -> pd.DataFrame | None:
    """A table that another chapter saved with `Chapter.save_table`.

    Args:
        tier: The tier.
        chapter: The other chapter.
        name: The table.
        **parameters: What that chapter must have been run with.

    Returns:
        The table, or None if the chapter was not run, or with other parameters.
    """
    folder = results_folder(tier, chapter)
    path = folder / f"{name}.csv"
    if not (path.is_file() and (folder / "claims.json").is_file()):
        return None
    content = json.loads((folder / "claims.json").read_text(encoding="utf-8"))
    if parameters.items() <= content["provenance"]["parameters"].items():
        return pd.read_csv(path, index_col=0)
    return None


def upstream_records(tier: str, chapters: Iterable[str]) -> dict[str, claims.Record]:
    """What other chapters measured on real data; nothing in the phantom tier.

    In tier `volumes` a chapter that was not run on the reader's scans counts as it was run on the
    released tables, if it was.

    Raises:
        DataError: A chapter was not run in this tier.
    """
    records: dict[str, claims.Record] = {}
    for name in chapters if tier != "phantom" else ():
        path = results_folder(tier, name) / "claims.json"
        if tier == "volumes" and not path.is_file():
            path = results_folder("released", name) / "claims.json"
            if not path.is_file():
                continue
        elif not path.is_file():
            raise DataError(
                f"The results of the chapter {name} are missing: run book/{name}.ipynb with "
                f"tier {tier!r} first (or `make book`)."
            )
        records |= claims.load_records(path)
    return records


def resolve_tier(tier: str) -> str:
    """The tier to build with, its files fetched: `auto` is `released` if it can be had.

    Raises:
        ParameterError: The tier is unknown or has no tables.
        DownloadError: `released` was asked for and its tables cannot be had.
        DataError: A file or folder is there, but wrong.
    """
    if tier != "auto":
        check_tier(tier)
    if tier == "phantom":
        return tier
    try:
        for file_id in fetch.released_ids():
            fetch.fetch(file_id)
    except DownloadError as error:
        if tier == "released":
            raise
        print(f"No released data, so the book is built on phantoms. {error}", file=sys.stderr)
        return "phantom"
    return "released"


@dataclass
class Chapter:
    """A running chapter. Made by `start`; closed by `finish`.

    `comparable` is set to False where the data turn out not to be the paper's: nothing is recorded
    then.
    """

    name: str
    tier: str
    parameters: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    records: dict[str, claims.Record] = field(default_factory=dict)
    comparable: bool = True
    tables: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The parameters `n_...` in the order given to `start`, with None filled in."""
        return tuple(value for key, value in self.parameters.items() if key.startswith("n_"))

    @property
    def folder(self) -> Path:
        """Where this chapter's results go."""
        return results_folder(self.tier, self.name)

    def show_banner(self, data: str) -> None:
        """Where a section works on phantoms in a chapter that does not, say so there.

        Args:
            data: What the section works on: `phantom`, `released` or `volumes`.
        """
        from IPython.display import display

        if data == "phantom" != self.tier:
            display(_html(banner_html(data, phantom_scans=True)))

    def record(self, claim_id: str, value: float, **fields: Any) -> None:
        """Note what was measured for a claim; `fields` are those of `claims.Record`.

        Raises:
            ClaimError: There is no such claim, it was recorded before, or a number is not finite.
        """
        if not self.comparable:
            return
        if claim_id in self.records:
            raise ClaimError(f"{claim_id} was recorded twice.")
        record = claims.Record(claim_id, self.tier, float(value), **fields)
        claims.check_record(record)
        self.records[claim_id] = record

    def record_seeds(self, claim_id: str, values: "pd.Series[float]", **fields: Any) -> None:
        """Note the mean over training seeds; if there are several, with its central 95 %.

        Args:
            claim_id: As for `record`.
            values: One a seed.
            **fields: As for `record`.
        """
        if len(values) > 1:
            fields |= {"low": values.quantile(0.025), "high": values.quantile(0.975)}
        self.record(claim_id, values.mean(), seeds=len(values), **fields)

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Keep a tidy table as `NAME.csv` among the chapter's results."""
        content = table.to_csv(lineterminator="\n").encode()
        claims.write_atomically(self.folder / f"{name}.csv", content)
        self.tables[f"{name}.csv"] = hashlib.sha256(content).hexdigest()

    def compare(self) -> pd.DataFrame:
        """Paper against book for everything recorded so far, by model and what is measured."""
        if not self.records:
            return pd.DataFrame({"verdict": []}).rename_axis("nothing to compare: other scans")
        board = claims.scoreboard(self.records).loc[list(self.records)]
        known = claims.load_claims()
        rows = {}
        for claim_id, row in board.iterrows():
            claim, record = known[str(claim_id)], self.records[str(claim_id)]
            rows[_claim_words(row)] = {
                "paper": row["paper"],
                "book": row["book"],
                "95% of seeds": claims.printed_range(claim, record.low, record.high),
                "95% of patients": claims.printed_range(
                    claim, record.patients_low, record.patients_high
                ),
                "done right": ""
                if record.correct is None
                else claims.printed_like(claim, record.correct),
                "verdict": claims.verdict(claim, record) or "none (synthetic)",
            }
        table = pd.DataFrame(list(rows.values()), pd.MultiIndex.from_tuples(rows))
        models = {model for model, _ in rows}
        if len(models) == 1:
            table = table.droplevel(0)
        elif "" in models:
            table.index = pd.Index([", ".join(filter(None, words)) for words in rows])
        return table.loc[:, (table != "").any()]

    def finish(self) -> Any:
        """Write `claims.json` and show the provenance line."""
        facts = provenance(self)
        claims.save_records(self.folder / "claims.json", self.records.values(), facts)
        data = "; ".join(f"{name} {value[:12]}" for name, value in facts["data"].items())
        data = data or "results of other chapters"
        packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        parameters = ", ".join(f"{name} {value}" for name, value in self.parameters.items())
        parameters = parameters or "none"
        return _html(
            f'<small id="provenance" data-commit="{facts["commit"]}"><b>Provenance.</b> '
            f"Commit {facts['commit']}; {packages}; data: {data}; "
            f"parameters: {parameters}; {facts['device']}; {facts['seconds']} s.</small>"
        )


def claim_title(row: "pd.Series[Any]") -> str:
    """A short name of a scoreboard's row: model, task and metric."""
    return ", ".join(filter(None, _claim_words(row)))


def _claim_words(row: "pd.Series[Any]") -> tuple[str, str]:
    task = row["task"].upper() if row["task"] in ("ct", "nat") else row["task"]
    metric = row["metric"].replace("auc", "AUC").replace("f1", "F1")
    return MODELS.get(row["model"], row["model"]), ", ".join(filter(None, [task, metric]))


def start(name: str, tier: str, phantom_scans: bool = False, **parameters: Any) -> Chapter:
    """Open a chapter: check its parameters and show the banner that names the data.

    Args:
        name: The chapter's file name without `.ipynb`.
        tier: `phantom`, `released` or `volumes`.
        phantom_scans: Does the chapter work on synthetic scans in every tier?
        **parameters: The chapter's other parameters; `seed` must be a whole number, a size
            (`n_...`) at least 1, or None for the tier's default in `SIZES`; `data_root` is the
            folder of tier `volumes`.

    Raises:
        ParameterError: A parameter cannot be used; the message names it.
    """
    parameters = checked(tier, parameters)
    from IPython.display import display

    display(_html(banner_html(tier, phantom_scans)))
    return Chapter(name, tier, parameters)


def checked(tier: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with sizes that are None filled in; errors as for `start`."""
    check_tier(tier, parameters.get("data_root"))
    filled = dict(parameters)
    for key, value in parameters.items():
        if value is None and key in SIZES:
            value = filled[key] = SIZES[key][tier]
        least = 0 if key == "seed" else 1
        if key == "seed" or key.startswith("n_"):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ParameterError(
                    f"{key} is {value!r}; it must be a whole number of at least {least}."
                )
    return filled


def banner_html(tier: str, phantom_scans: bool = False) -> str:
    """The banner that tells which data a page was computed on."""
    title, text = PHANTOM_SCANS if phantom_scans else BANNERS[tier]
    colour = _COLOURS["phantom" if phantom_scans else tier]
    return (
        f'<div class="data-banner" data-tier="{tier}" style="border-left:0.4rem solid '
        f'{colour};padding:0.4rem 0.8rem;margin:0.5rem 0"><b>{title}.</b> {text}</div>'
    )


def provenance(chapter: Chapter) -> dict[str, Any]:
    """What a result came from: commit, versions, data, tables, parameters, device, time."""
    if chapter.tier == "phantom":
        from covidmtl_core.phantom_cohort import SEED

        data = {"phantom cohort, seed": str(SEED)}
    else:
        data = dict(fetch.USED)
    return {
        "chapter": chapter.name,
        "tier": chapter.tier,
        "commit": commit(),
        "versions": versions(),
        "data": data,
        "tables": chapter.tables,
        "parameters": chapter.parameters,
        "device": device() + (f"; {device('cuda')}" if _has_card() else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(time.monotonic() - chapter.started),
    }


def device(name: str | None = None) -> str:
    """In words; None or `cpu` for the processor, `cuda` for the card."""
    if name is not None and name.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(name))
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def _has_card() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on, as far as they are installed."""
    found = {"Python": platform.python_version()}
    packages = ("numpy", "pandas", "scikit-learn", "lightgbm", "scipy", "statsmodels")
    for package in (*packages, "torch", "SimpleITK", "scikit-image"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit this package runs from, `-dirty` if files were changed since."""
    root = repository_folder()
    if root is None:
        return f"covidmtl-core {metadata.version('covidmtl-core')}"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def _html(text: str) -> Any:
    from IPython.display import HTML

    return HTML(text)
