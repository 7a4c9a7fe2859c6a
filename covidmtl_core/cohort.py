"""The cohort of section 3: patients, labels, features, the split, and what is wrong with them."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pooch
from sklearn.model_selection import train_test_split

from covidmtl_core import fetch, phantom_cohort
from covidmtl_core.errors import DataError, ParameterError

Tier = Literal["phantom", "released", "volumes"]
TIERS: tuple[Tier, ...] = ("phantom", "released", "volumes")

TASKS = {"ct": 2, "nat": 2, "severity": 3}
"""The three tasks and their numbers of classes."""

SEVERITY_OF_MORBIDITY = {
    "Control": 0,
    "Suspected": 0,
    "Mild": 1,
    "Regular": 1,
    "Severe": 2,
    "Critically ill": 2,
}
"""Physicians' assessment and the severity type it becomes (section 3)."""

_COHORT_COLUMNS = {
    "COVIDCT": "ct",
    "COVIDNC": "nat",
    "COVIDSeverity": "severity",
    "Age": "age",
    "Gender": "sex",
    "Hospital": "hospital",
    "Morbidity": "morbidity",
}
_GEOMETRY_COLUMNS = {
    "TotalSlice": "slices",
    "Height": "height",
    "Width": "width",
    "FirstSlice": "first_slice",
    "LastSlice": "last_slice",
    "MaxSliceArea": "max_slice_area",
    "MinValue": "minimum",
    "MaxValue": "maximum",
}


def check_tier(tier: str, data_root: str | os.PathLike[str] | None = None) -> None:
    """Reject a tier that does not exist, or `volumes` without a folder.

    Raises:
        ParameterError: The tier is unknown, or it is `volumes` and no folder is named.
    """
    if tier not in TIERS:
        raise ParameterError(f"tier is {tier!r}; it must be one of {', '.join(TIERS)}.")
    if tier == "volumes" and not data_root:
        raise ParameterError(
            "tier 'volumes' needs data_root, the folder that `covidmtl preprocess` made (-p tier "
            "volumes -p data_root DIR); a chapter without that parameter reads no volumes: run it "
            "with tier 'released' or 'phantom'."
        )


def load_cohort(
    tier: str = "released", data_root: str | os.PathLike[str] | None = None
) -> pd.DataFrame:
    """Labels and demographics of the enrolled patients.

    Args:
        tier: `released` (the authors' 1,329 patients), `phantom` (synthetic) or `volumes`.
        data_root: The folder that `covidmtl preprocess` made, in tier `volumes`.

    Returns:
        One row a patient in the file's order, indexed by `patient_id`: `ct`, `nat` (0 or 1),
        `severity` (0, 1 or 2), `age` (years), `sex` (Female or Male), `hospital`, `morbidity`; of a
        reader's scans the labels and `split`.

    Raises:
        ParameterError: The tier is unknown, or its folder is not named.
        DataError: The released table cannot be had, or a label of a reader's scan is missing.
    """
    check_tier(tier, data_root)
    if tier == "phantom":
        return phantom_cohort.cohort()
    if tier == "volumes":
        scans = _preprocessed(data_root)[0]
        lost = scans.index[scans[list(TASKS)].isna().any(axis=1)]
        if len(lost):
            raise DataError(
                f"{len(lost)} scans of {data_root} lack a label, the first is {lost[0]}: chapters "
                "need all labels; `covidmtl train` does not."
            )
        return scans.astype(dict.fromkeys(TASKS, int))
    return _patients()[list(_COHORT_COLUMNS)].rename(columns=_COHORT_COLUMNS)


def load_features(
    tier: str = "released", data_root: str | os.PathLike[str] | None = None
) -> pd.DataFrame:
    """The 375 lung features of the enrolled patients (section 4.1), raw values.

    Args:
        tier: As for `load_cohort`.
        data_root: As for `load_cohort`.

    Returns:
        float64, indexed by `patient_id` in the order of `load_cohort`; the columns are
        `radiomics.names.FEATURE_NAMES`.

    Raises:
        ParameterError: The tier is unknown, or its folder is not named.
        DataError: The table cannot be had.
    """
    check_tier(tier, data_root)
    if tier == "phantom":
        return phantom_cohort.features()
    if tier == "volumes":
        return _preprocessed(data_root)[1]
    return _indexed(fetch.read_pickled_table(fetch.fetch("features")))


def load_laboratory(tier: str = "released") -> pd.DataFrame:
    """Laboratory values of the source cohort's patients.

    Returns:
        Indexed by `patient_id`, one column a test by its abbreviation, NaN where not measured.
        Units and normal ranges stand in the file `laboratory-definitions`. The phantoms have a few
        of the tests.

    Raises:
        ParameterError: The tier is unknown or has no tables.
        DataError: The table cannot be had.
    """
    check_tier(tier)
    if tier == "phantom":
        return phantom_cohort.laboratory()
    sheets = pd.read_excel(fetch.fetch("laboratory"), sheet_name=None)
    panels = [_indexed(sheet.drop(columns="Unnamed: 0")) for sheet in sheets.values()]
    return pd.concat(panels, axis=1)


def load_source_cohort(tier: str = "released") -> pd.DataFrame:
    """All patients of the source cohort, enrolled or not.

    Returns:
        Indexed by `patient_id`: `age`, `sex`, `hospital`, `morbidity`, `enrolled` (is the patient
        among the paper's 1,329) and `segmentation_failed` (is the patient on the authors' list).

    Raises:
        ParameterError: The tier is unknown or has no tables.
        DataError: A released table cannot be had.
    """
    check_tier(tier)
    if tier == "phantom":
        return phantom_cohort.source_cohort()
    table = pd.read_excel(fetch.fetch("source-patients"))
    table["PID"] = table["Patient"].str.removeprefix("Patient ").astype(int)
    table = _indexed(table).rename(columns=_COHORT_COLUMNS)
    table = table[["age", "sex", "hospital", "morbidity"]]
    failed = pd.read_excel(fetch.fetch("failed-segmentations")).iloc[:, 0]
    table["enrolled"] = table.index.isin(_patients().index)
    table["segmentation_failed"] = table.index.isin(failed)
    return table


def load_geometry(tier: str = "released") -> pd.DataFrame:
    """Geometry and intensity range (HU + 1024) of each patient's segmented volume.

    Returns:
        Indexed by `patient_id`: `slices`, `height`, `width`, `first_slice`, `last_slice`,
        `max_slice_area` (pixels of 1 mm), `minimum`, `maximum`.

    Raises:
        ParameterError: The tier is unknown or has no tables.
        DataError: The released table cannot be had.
    """
    check_tier(tier)
    if tier == "phantom":
        return phantom_cohort.geometry()
    return _patients()[list(_GEOMETRY_COLUMNS)].rename(columns=_GEOMETRY_COLUMNS)


def split(cohort: pd.DataFrame) -> tuple[pd.Index, pd.Index]:
    """Patients to train on and to test on: by the column `split`, else the paper's way.

    That is 30 % for testing, stratified by NAT, with the authors' seed (section 3).

    Args:
        cohort: As returned by `load_cohort`, in its order (the draw depends on the order).

    Returns:
        Patient ids for training and for testing; 930 and 399 on the released cohort.

    Raises:
        DataError: Some patients have a split and others not, one side is empty, or there is no
            split and a NAT label is missing.
    """
    given = cohort.get("split", pd.Series(index=cohort.index, dtype=object))
    if given.notna().any():
        train, test = (cohort.index[given == side] for side in ("train", "test"))
        if len(train) + len(test) < len(cohort) or train.empty or test.empty:
            raise DataError(
                f"of {len(cohort)} scans {len(train)} are for training and {len(test)} for "
                "testing: give every patient `train` or `test` in the column `split`, and both to "
                "somebody."
            )
        return train, test
    if cohort["nat"].isna().any():
        raise DataError("scans without a split need every NAT label: add a column `split`.")
    train, test = train_test_split(
        cohort.index, stratify=cohort["nat"], test_size=0.30, random_state=11, shuffle=True
    )
    return train, test


def identical_scans(features: pd.DataFrame, decimals: int | None = None) -> list[tuple[int, ...]]:
    """Groups of patients whose features are all the same, as two different scans never are.

    Args:
        features: One row a patient.
        decimals: Compare after rounding to so many decimals; None compares every bit.

    Returns:
        Patient ids of each group, smallest first.
    """
    values = features if decimals is None else features.round(decimals)
    keys = pd.util.hash_pandas_object(values, index=False)
    repeated = keys[keys.duplicated(keep=False)]
    groups = (tuple(sorted(ids)) for ids in repeated.groupby(repeated).groups.values())
    return sorted(groups)


def leaked(features: pd.DataFrame, train: pd.Index, test: pd.Index) -> tuple[int, ...]:
    """Test patients whose scan, to 6 decimals of every feature, was also trained on.

    Args:
        features: As returned by `load_features`.
        train: Patient ids for training.
        test: Patient ids for testing.
    """
    groups = identical_scans(features, decimals=6)
    return tuple(
        patient
        for group in groups
        if train.isin(group).any()
        for patient in group
        if patient in test
    )


def check(cohort: pd.DataFrame, features: pd.DataFrame, geometry: pd.DataFrame) -> pd.DataFrame:
    """Everything in the tables that a careful reader would ask about.

    Args:
        cohort: As returned by `load_cohort`.
        features: As returned by `load_features`.
        geometry: As returned by `load_geometry`.

    Returns:
        One row a check: `check`, `finding` (a sentence), `count` (patients or features concerned,
        0 if all is well) and `ids` (their patient ids or names).
    """
    twins = identical_scans(features)
    near = [pair for pair in identical_scans(features, decimals=6) if pair not in twins]
    expected = cohort["morbidity"].map(SEVERITY_OF_MORBIDITY)
    disagree = cohort["ct"] != cohort["nat"]
    constant = features.columns[features.min() == features.max()]
    rows = [
        ("identical scans", "patients sharing all features to the last bit", sum(twins, ())),
        ("identical scans", "patients sharing all features to 6 decimals only", sum(near, ())),
        ("split", "test patients whose scan is in training", leaked(features, *split(cohort))),
        (
            "labels",
            "severity does not match morbidity",
            _ids(cohort["severity"] != expected),
        ),
        (
            "labels",
            "severity 0 but NAT positive, or the reverse",
            _ids((cohort["severity"] == 0) != (cohort["nat"] == 0)),
        ),
        ("labels", "CT positive, NAT negative", _ids(disagree & (cohort["ct"] == 1))),
        ("labels", "CT negative, NAT positive", _ids(disagree & (cohort["ct"] == 0))),
        (
            "values",
            "features missing or infinite",
            tuple(features.index[~np.isfinite(features.to_numpy()).all(axis=1)]),
        ),
        ("values", "largest lung area below zero", _ids(geometry["max_slice_area"] < 0)),
        ("values", "brightest voxel above 4095", _ids(features["Maximum"] > 4095)),
        ("values", "feature is the same for everybody", tuple(constant)),
        (
            "values",
            "TotalEnergy only repeats Energy",
            ("TotalEnergy",) if features["TotalEnergy"].equals(features["Energy"]) else (),
        ),
    ]
    table = pd.DataFrame(rows, columns=["check", "finding", "ids"])
    table.insert(2, "count", table["ids"].map(len))
    return table


def _ids(flags: pd.Series) -> tuple[int, ...]:
    return tuple(flags.index[flags])


def _indexed(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("PID").rename_axis("patient_id")


def _preprocessed(data_root: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    from covidmtl_core.store import load_preprocessed, load_settings

    scans, features, _ = load_preprocessed(data_root)
    load_settings(data_root)
    for name in ("scans.csv", "features.csv", "settings.json"):
        fetch.USED[name] = pooch.file_hash(str(Path(data_root) / name), alg="sha256")
    return scans, features.loc[scans.index]


def _patients() -> pd.DataFrame:
    return _indexed(fetch.read_pickled_table(fetch.fetch("patients")))
