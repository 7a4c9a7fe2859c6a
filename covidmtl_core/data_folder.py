"""A reader's folder of scans: who is in it, and everything that is wrong with it.

The folder holds `labels.csv`, a line a patient: `patient_id`, `path` (from the folder), `ct`, `nat`
(0 or 1), `severity` (0, 1 or 2), and perhaps `split` (train or test). A blank label means that the
patient takes no part in that task. Or it holds the source site's archives, `Patient 1.zip` and so
on, whose labels and split are those of the released tables.
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import SimpleITK as sitk
from joblib import Parallel, delayed

from covidmtl_core import cohort
from covidmtl_core.ct import read_ct
from covidmtl_core.errors import CovidMTLError, DataError

LABELS = {"ct": (0, 1), "nat": (0, 1), "severity": (0, 1, 2)}
COLUMNS = ("patient_id", "path", *LABELS)
SPLITS = ("train", "test")

_ARCHIVE = re.compile(r"Patient (\d+)\.zip", re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)

Problems = list[tuple[str, str, str]]


def load_index(folder: Path) -> pd.DataFrame:
    """Patients of a folder.

    Returns:
        Indexed by `patient_id` (text): `path` of the scan, `ct`, `nat`, `severity` (Int64, missing
        where masked), `split` (missing where none is given).

    Raises:
        DataError: The folder or its labels cannot be used; the message lists every problem.
    """
    index, problems = _index(Path(folder))
    errors = [f"{where}: {what}" for level, where, what in problems if level == "error"]
    if errors:
        raise DataError("\n".join(errors))
    return index


def check(
    folder: Path, read: bool = True, n_jobs: int | None = None, progress: bool = False
) -> pd.DataFrame:
    """Everything that is wrong with a folder of scans; nothing is written.

    Args:
        folder: See the module.
        read: Whether every scan is read, which takes about a second each.
        n_jobs: Processes that read; None takes one for each core.
        progress: Whether a progress bar is shown.

    Returns:
        A line a problem: `level` (error or warning), `where`, `problem`. An error in the labels
        keeps `preprocess` from starting; one in a scan only leaves that scan out.
    """
    index, problems = _index(Path(folder))
    there = []
    for patient_id, path in index["path"].items():
        if path and _exists(path):
            there.append((str(patient_id), path))
        elif path:
            what = f"{path} does not exist: correct the path."
            problems.append(("error", f"patient {patient_id}", what))
    if read and len(there):
        from tqdm import tqdm

        work = Parallel(n_jobs=n_jobs or -1, return_as="generator")(
            delayed(_fingerprint)(path) for _, path in there
        )
        bar = tqdm(work, total=len(there), desc="reading", unit="scan", disable=not progress)
        seen: dict[str, str] = {}
        with worker_loss_named("a scan was read"):
            for (patient_id, _), (print_, failure) in zip(there, bar, strict=True):
                if failure:
                    problems.append(("error", f"patient {patient_id}", failure))
                elif print_ in seen:
                    what = f"the scan equals that of patient {seen[print_]}, voxel by voxel."
                    problems.append(("warning", f"patient {patient_id}", what))
                else:
                    seen[print_] = patient_id
    return pd.DataFrame(problems, columns=["level", "where", "problem"])


@contextmanager
def worker_loss_named(when: str) -> Iterator[None]:
    """Say in one sentence that a worker process was killed.

    Raises:
        CovidMTLError: It was.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("TerminatedWorkerError", "BrokenProcessPool"):
            raise
        raise CovidMTLError(
            f"A worker process was killed while {when}, most likely for want of memory: run again "
            "with fewer --jobs; what is done is kept."
        ) from error


def _fingerprint(path: str) -> tuple[str, str]:
    """Hash of a scan's voxels; or why it cannot be read."""
    try:
        voxels = sitk.GetArrayFromImage(read_ct(path))
    except CovidMTLError as error:
        return "", str(error)
    except Exception as error:
        return "", f"{path} cannot be read ({type(error).__name__}: {error})."
    return hashlib.sha256(voxels.tobytes()).hexdigest(), ""


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long, a folder without permission
        return False


def _index(folder: Path) -> tuple[pd.DataFrame, Problems]:
    empty = pd.DataFrame(columns=["path", *LABELS, "split"])
    try:
        names = sorted(folder.iterdir())
    except OSError:
        return empty, [("error", str(folder), "this is not a folder that can be opened.")]
    labels = folder / "labels.csv"
    archives = {int(m[1]): p for p in names if (m := _ARCHIVE.fullmatch(p.name))}
    if labels.is_file():
        index, problems = _from_labels(labels, empty)
        if archives:
            what = "labels.csv is here, so the 'Patient N.zip' files are left out."
            problems.append(("warning", str(folder), what))
        return index, problems
    if archives:
        return _from_archives(folder, archives, empty)
    what = "it holds neither labels.csv (patient_id, path, ct, nat, severity) nor 'Patient N.zip'."
    return empty, [("error", str(folder), what)]


def _from_archives(
    folder: Path, archives: dict[int, Path], empty: pd.DataFrame
) -> tuple[pd.DataFrame, Problems]:
    try:
        patients = cohort.load_cohort("released")
    except CovidMTLError as error:
        return empty, [("error", str(folder), f"the archives need the released labels. {error}")]
    train = set(cohort.split(patients)[0])
    index = patients.loc[patients.index.isin(list(archives)), list(LABELS)].astype("Int64")
    index.insert(0, "path", [str(archives[int(i)]) for i in index.index])
    index["split"] = ["train" if i in train else "test" for i in index.index]
    strangers = sorted(set(archives) - set(patients.index))
    missing = len(patients) - len(index)
    problems: Problems = []
    if strangers:
        what = f"not among the {len(patients)} patients of the study, left out: {strangers}."
        problems.append(("warning", str(folder), what))
    if not len(index):
        problems.append(("error", str(folder), "no archive is of a patient of the study."))
    elif missing:
        what = f"{missing} of the {len(patients)} patients of the study have no archive here."
        problems.append(("warning", str(folder), what))
    return index.set_axis(index.index.astype(str), axis=0), problems


def _read_table(path: Path) -> pd.DataFrame:
    """The cells as text, stripped, by line number; empty lines left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    lines = [(number, row) for number, row in lines if any(row)]
    if not lines:
        raise ValueError("it is empty")
    header = [name.lower() for name in lines[0][1]]
    width = len(header)
    numbers = [number for number, _ in lines[1:]]
    cells = [(row + [""] * width)[:width] for _, row in lines[1:]]
    table = pd.DataFrame(cells, numbers, header, dtype=str)
    # Empty cells beyond the last column are what spreadsheets leave behind.
    table["cells"] = [min(0, len(r) - width) + len("".join(r[width:])) for _, r in lines[1:]]
    return table


def _from_labels(path: Path, empty: pd.DataFrame) -> tuple[pd.DataFrame, Problems]:
    try:
        table = _read_table(path)
    except (OSError, ValueError, csv.Error) as error:
        what = f"it cannot be read as a table ({error}): save it as CSV in UTF-8."
        return empty, [("error", path.name, what)]
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        what = f"it has no column {', '.join(lacking)}; columns are separated by commas."
        return empty, [("error", path.name, what)]
    if table.columns.has_duplicates:
        return empty, [("error", path.name, "a column occurs twice.")]
    if table.empty:
        return empty, [("error", path.name, "it lists no patient.")]
    problems: Problems = []

    def report(bad: "pd.Series[bool]", what: str) -> None:
        for line, row in table[bad].iterrows():
            problems.append(("error", f"{path.name}, line {line}", what.format(**row)))

    report(table["cells"] > 0, "it has more cells than the first line.")
    report(table["cells"] < 0, "it has fewer cells than the first line.")
    ids = table["patient_id"]
    report(
        ~ids.str.fullmatch(_ID),
        "patient_id is '{patient_id}'; use up to 64 letters and digits, after the first '._-' too.",
    )
    report(ids.str.lower().duplicated(), "patient_id '{patient_id}' occurs before.")
    report(table["path"] == "", "patient '{patient_id}' has no path.")
    index = pd.DataFrame(index=table.index)
    # Unlike Path.expanduser, it leaves the home of an unknown user as it is.
    home = os.path.expanduser
    index["path"] = [str(path.parent / home(cell)) if cell else "" for cell in table["path"]]
    same = index["path"].map(os.path.realpath).duplicated() & (index["path"] != "")
    report(same, "the scan '{path}' occurs before.")
    for name, allowed in LABELS.items():
        numbers = pd.to_numeric(table[name], errors="coerce")
        wrong = (table[name] != "") & ~numbers.isin(allowed)
        choices = ", ".join(map(str, allowed))
        report(wrong, f"{name} is '{{{name}}}'; it must be {choices}, or blank for unknown.")
        index[name] = numbers.where(~wrong).astype("Int64")
    both = index["nat"].notna() & index["severity"].notna()
    odd = both & ((index["nat"] == 0) != (index["severity"] == 0))
    report(
        odd.astype(bool),
        "severity is '{severity}' and nat '{nat}'; severity 0 is for NAT negatives (section 3).",
    )
    index["split"] = table["split"].str.lower() if "split" in table else ""
    used = bool((index["split"] != "").any())
    choice = "split is '{split}'; it must be train or test, in every line or in none."
    report(~index["split"].isin(SPLITS) & used, choice)
    index["split"] = index["split"].where(index["split"] != "", None)
    return index.set_axis(pd.Index(ids, name="patient_id"), axis=0), problems
