"""Which features a scanner or the resampling moves, and where a reader's own features lie.

Measured on phantoms, each scanned twice, the second time under a condition that leaves the body
alone; the intraclass correlations lie beside the registry as `feature_stability.csv` and are made
again by `make phantoms`.
"""

from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from covidmtl_core.errors import DataError
from covidmtl_core.radiomics.names import FEATURE_NAMES

if TYPE_CHECKING:
    from covidmtl_core.phantom import Patient

CONDITIONS = {
    "repeat": "the same scanner again",
    "noise": "1.5 times the noise",
    "kernel": "a softer kernel: a Gaussian of 0.8 mm in the slices",
    "slices": "slices of 2.5 mm, resampled to 1 mm",
}
"""How the second scan differs from the first; its noise is drawn anew in all of them."""

NOISE_HU = 50.0
"""Of the first scan, in every patient: scanners shall not differ where patients are compared."""

MORE_NOISE = 1.5
SOFT_KERNEL_MM = 0.8
THICK_MM = 2.5

TRUSTED_FROM = 0.75
"""Intraclass correlation from which reliability is called good (Koo and Li 2016)."""

N_PATIENTS = 12

TABLE = "feature_stability.csv"


def place(
    features: pd.Series, cohort: pd.DataFrame, spacing_mm: float = 1.0, cohort_mm: float = 1.0
) -> pd.DataFrame:
    """A reader's features among those of a cohort.

    Args:
        features: As from `extract_features`.
        cohort: A line a patient, the same columns: `cohort.load_features("released")`.
        spacing_mm: Of the voxels the reader's features were measured on.
        cohort_mm: Of the voxels the cohort's were; 1 mm for the released table.

    Returns:
        Indexed by feature: `value`; `percentile` within the cohort (0 to 100, ties half); `lowest`
        and `highest` of the cohort; `flag`: empty, or why the number is not to be trusted.

    Raises:
        DataError: Features are missing from either.
    """
    missing = [name for name in FEATURE_NAMES if name not in features or name not in cohort]
    if missing:
        raise DataError(
            f"{len(missing)} of the 375 features are missing, for example {missing[0]}."
        )
    from scipy.stats import percentileofscore

    table = pd.DataFrame(index=pd.Index(FEATURE_NAMES, name="feature"))
    table["value"] = features[list(FEATURE_NAMES)].astype(float)
    table["percentile"] = [
        percentileofscore(cohort[name], value, kind="mean") if np.isfinite(value) else np.nan
        for name, value in table["value"].items()
    ]
    table["lowest"], table["highest"] = cohort.min(), cohort.max()
    lowest, highest = table["lowest"], table["highest"]
    value = table["value"]
    beyond = value.notna() & ~value.between(lowest, highest)
    weak = (correlations() < TRUSTED_FROM).loc[list(FEATURE_NAMES)]
    moved = weak.apply(lambda row: ", ".join(row.index[row]), axis=1)
    other = f"measured at {spacing_mm:g} mm, the cohort at {cohort_mm:g} mm"
    table["flag"] = ""
    for rows, text in (
        (value.isna(), "not defined here"),
        (beyond, "outside the cohort"),
        (lowest == highest, "the same in the whole cohort"),
        (moved != "", "moved by " + moved),
        (pd.Series(abs(spacing_mm - cohort_mm) > 0.01, table.index), other),
    ):
        joint = np.where(rows & (table["flag"] != ""), "; ", "")
        table["flag"] = table["flag"] + joint + np.where(rows, text, "")
    return table


@cache
def _stored() -> pd.DataFrame:
    with resources.as_file(resources.files("covidmtl_core.data_manifest") / TABLE) as path:
        return pd.read_csv(path, index_col="feature")


def correlations(consistency: bool = False) -> pd.DataFrame:
    """Intraclass correlation of each feature (rows) under each of `CONDITIONS`, on phantoms.

    Args:
        consistency: ICC(C,1), which forgives a shift that all patients share, instead of ICC(A,1).

    Returns:
        NaN where a feature is the same in all scans.
    """
    suffix = "_consistency" if consistency else ""
    table = _stored()[[name + suffix for name in CONDITIONS]]
    return table.set_axis(list(CONDITIONS), axis=1)


def intraclass_correlation(
    one: pd.DataFrame, other: pd.DataFrame, consistency: bool = False
) -> pd.Series:
    """ICC of two measurements, single, two-way random (McGraw and Wong 1996).

    Args:
        one: (patients, features), two patients at least.
        other: The same patients and features, measured again.
        consistency: ICC(C,1); else ICC(A,1), absolute agreement.

    Returns:
        By feature: 1 if both measurements agree, about 0 if they have nothing in common, negative
        if they contradict each other; NaN where all values are equal.
    """
    both = np.stack([one.to_numpy(float), other[one.columns].to_numpy(float)])
    n = both.shape[1]
    grand = both.mean(axis=(0, 1))
    rows = 2 * ((both.mean(axis=0) - grand) ** 2).sum(axis=0) / (n - 1)
    columns = n * ((both.mean(axis=1) - grand) ** 2).sum(axis=0)
    rest = both - both.mean(axis=0) - both.mean(axis=1, keepdims=True) + grand
    error = (rest**2).sum(axis=(0, 1)) / (n - 1)
    scale = rows + error + (0 if consistency else 2 / n * (columns - error))
    with np.errstate(invalid="ignore"):
        return pd.Series(np.where(scale > 0, (rows - error) / scale, np.nan), one.columns)


def scan(patient: "Patient", condition: str | None, spacing_mm: float = 1.0) -> sitk.Image:
    """A phantom patient's first scan, or the second one under a condition; HU at `spacing_mm`.

    Thicker slices collect more photons: their noise is less by the root of the thickness.
    """
    from covidmtl_core.ct import resample
    from covidmtl_core.phantom import SIZE, make_phantom

    size = [round(n / spacing_mm) for n in SIZE]
    number = [None, *CONDITIONS].index(condition)
    patient = replace(patient, noise=NOISE_HU, repeat=number)
    if condition == "noise":
        patient = replace(patient, noise=MORE_NOISE * NOISE_HU)
    if condition == "slices":
        thick = [round(SIZE[0] / THICK_MM), *size[1:]]
        patient = replace(patient, noise=NOISE_HU * (spacing_mm / THICK_MM) ** 0.5)
        image = make_phantom(patient, thick, (THICK_MM, spacing_mm, spacing_mm)).image
        return resample(image, spacing_mm)
    image = make_phantom(patient, size, spacing_mm).image
    if condition == "kernel":
        sigma = SOFT_KERNEL_MM / spacing_mm
        voxels = sitk.GetArrayFromImage(image).astype(np.float32)
        soft = sitk.GetImageFromArray(np.rint(gaussian_filter(voxels, (0, sigma, sigma))))
        soft.CopyInformation(image)
        return sitk.Cast(soft, sitk.sitkInt16)
    return image


def measure(patients: int = N_PATIENTS, spacing_mm: float = 1.0) -> pd.DataFrame:
    """The stored table, measured anew: ten minutes on two cores.

    Returns:
        A line a feature, a column for each of `CONDITIONS` with ICC(A,1), and one with
        `_consistency` behind its name with ICC(C,1). Lungs are found anew in each scan.
    """
    from joblib import Parallel, delayed

    from covidmtl_core import phantom_cohort

    ids = phantom_cohort.cohort().index[:patients]
    sets = {}
    for condition in (None, *CONDITIONS):
        rows = Parallel(n_jobs=-1)(delayed(_features)(int(i), condition, spacing_mm) for i in ids)
        sets[condition] = pd.DataFrame(rows)
    return pd.DataFrame(
        {
            name + suffix: intraclass_correlation(sets[None], sets[name], bool(suffix))
            for suffix in ("", "_consistency")
            for name in CONDITIONS
        }
    ).rename_axis("feature")


def _features(patient_id: int, condition: str | None, spacing_mm: float) -> pd.Series:
    from covidmtl_core import phantom_cohort
    from covidmtl_core.radiomics.features import extract_features
    from covidmtl_core.segmentation import segment_lungs

    image = scan(phantom_cohort.patient(patient_id), condition, spacing_mm)
    return extract_features(image, segment_lungs(image, n_jobs=1), n_jobs=1)


def write_table() -> None:
    """Measure, and write the table into the repository."""
    target = Path(__file__).resolve().parents[2] / "data_manifest" / TABLE
    measure().to_csv(target, float_format="%.4f", lineterminator="\n")
    print(f"{target} written")
