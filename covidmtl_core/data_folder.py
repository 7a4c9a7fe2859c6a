"""A reader's folder of scans: who is in it, and everything that is wrong with it.

The folder holds `labels.csv`, a line a patient: `patient_id`, `path` (from the folder), `ct`, `nat`
(0 or 1), `severity` (0, 1 or 2), and perhaps `split` (train or test). A blank label means that the
patient takes no part in that task. Or it holds the source site's archives, `Patient 1.zip` and so
on, whose labels and split are those of the released tables.
"""

import hashlib
import re
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
    there = pd.Series({i: path for i, path in index["path"].items() if Path(path).exists()})
    problems += [
        ("error", f"patient {i}", f"{path} does not exist: correct the path.")
        for i, path in index["path"].items()
        if i not in there.index
    ]
    if read and len(there):
        from tqdm.auto import tqdm

        work = Parallel(n_jobs=n_jobs or -1, return_as="generator")(
            delayed(_fingerprint)(path) for path in there
        )
        bar = tqdm(work, total=len(there), desc="reading", unit="scan", disable=not progress)
        seen: dict[str, str] = {}
        for patient_id, (print_, failure) in zip(there.index, bar, strict=True):
            if failure:
                problems.append(("error", f"patient {patient_id}", failure))
            elif print_ in seen:
                what = f"the scan equals that of patient {seen[print_]}, voxel by voxel."
                problems.append(("warning", f"patient {patient_id}", what))
            else:
                seen[print_] = str(patient_id)
    return pd.DataFrame(problems, columns=["level", "where", "problem"])


def _fingerprint(path: str) -> tuple[str, str]:
    """Hash of a scan's voxels; or why it cannot be read."""
    try:
        voxels = sitk.GetArrayViewFromImage(read_ct(path))
    except CovidMTLError as error:
        return "", str(error)
    except Exception as error:
        return "", f"{path} cannot be read ({type(error).__name__}: {error})."
    return hashlib.sha256(voxels.tobytes()).hexdigest(), ""


def _index(folder: Path) -> tuple[pd.DataFrame, Problems]:
    empty = pd.DataFrame(columns=["path", *LABELS, "split"])
    if not folder.is_dir():
        return empty, [("error", str(folder), "this is not a folder.")]
    labels = folder / "labels.csv"
    if labels.is_file():
        return _from_labels(labels, empty)
    archives = {int(m[1]): p for p in folder.iterdir() if (m := _ARCHIVE.fullmatch(p.name))}
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
    train, _ = cohort.split(patients)
    index = patients.loc[patients.index.isin(list(archives)), list(LABELS)].astype("Int64")
    index.insert(0, "path", [str(archives[int(i)]) for i in index.index])
    index["split"] = ["train" if i in set(train) else "test" for i in index.index]
    strangers = sorted(set(archives) - set(patients.index))
    missing = len(patients) - len(index)
    problems: Problems = []
    if strangers:
        what = f"not among the {len(patients)} patients of the study, left out: {strangers}."
        problems.append(("warning", str(folder), what))
    if missing:
        what = f"{missing} of the {len(patients)} patients of the study have no archive here."
        problems.append(("warning", str(folder), what))
    return index.set_axis(index.index.astype(str), axis=0), problems


def _from_labels(path: Path, empty: pd.DataFrame) -> tuple[pd.DataFrame, Problems]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        return empty, [("error", path.name, f"it cannot be read as a table ({error}).")]
    table.columns = table.columns.str.strip().str.lower()
    table = table.apply(lambda column: column.str.strip())
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
            named = f"{path.name}, line {int(str(line)) + 2}"
            problems.append(("error", named, what.format(**row)))

    ids = table["patient_id"]
    report(~ids.str.fullmatch(_ID), "patient_id is '{patient_id}'; letters, digits, '.', '_', '-'.")
    report(ids.str.lower().duplicated(), "patient_id '{patient_id}' occurs before.")
    report(table["path"] == "", "patient '{patient_id}' has no path.")
    named = (table["path"] != "") & table["path"].duplicated()
    report(named, "the path '{path}' occurs before.")
    index = pd.DataFrame({"path": [str(path.parent / Path(p).expanduser()) for p in table["path"]]})
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
