"""The phantom tier: a seeded cohort of synthetic scans with the labels' structure of the real one.

Its features were measured on phantom scans, each written as a DICOM series, read, segmented and
put through the extractor; they lie beside the registry as `phantom_features.csv.xz` and are made
again by `make phantoms`. No result on them says anything about COVID-19.
"""

import tempfile
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from covidmtl_core.radiomics.names import FEATURE_NAMES

if TYPE_CHECKING:
    from covidmtl_core.phantom import Patient

N_SOURCE = 345
SEED = 20220401

SCAN_MM = 2.5
"""Voxel size of the scans whose features the table holds; the paper's scans have 1 mm."""

TABLE = "phantom_features.csv.xz"

_LABORATORY = {
    "LY": (1.4, 0.3, -0.25),
    "NE": (3.5, 0.3, 0.15),
    "PLT": (210.0, 0.2, -0.05),
    "CRP": (4.0, 0.8, 0.7),
    "LDH": (200.0, 0.2, 0.2),
    "AST": (25.0, 0.3, 0.1),
    "ALB": (40.0, 0.1, -0.05),
    "CREA": (66.0, 0.2, 0.0),
    "DD": (0.4, 0.6, 0.3),
    "FIB": (3.5, 0.2, 0.1),
}
"""Median of the well, spread of the logarithm, its rise for each tenth of the lungs infected."""

_GEOMETRY = ("first_slice", "last_slice", "max_slice_area", "minimum", "maximum")


@cache
def source_table() -> pd.DataFrame:
    """Every phantom patient with labels, hospital and lesion `burden` (share of the lungs).

    Of 75 % CT positives 26 % are NAT negative, of the others 7 % are NAT positive; the largest
    burdens among NAT positives, 26 %, are severe, as in the released cohort.
    """
    rng = np.random.default_rng(SEED)
    n = N_SOURCE
    ct = rng.permutation(n) < round(0.75 * n)
    nat = np.zeros(n, bool)
    for group, share in ((ct, 0.74), (~ct, 0.07)):
        members = rng.permutation(np.flatnonzero(group))
        nat[members[: round(share * len(members))]] = True
    age = np.clip(rng.normal(54, 17, n), 1, 97).round().astype(int)
    burden = 0.035 * np.exp(0.85 * rng.normal(size=n) + 0.35 * nat + 0.008 * (age - 54))
    burden = np.where(ct, np.clip(burden, 0.004, 0.36), 0.0)
    severe = nat & (burden > np.quantile(burden[nat], 0.74))
    severity = np.where(severe, 2, nat.astype(int))
    morbidity = np.select(
        [~nat & ~ct, ~nat & ct, nat & ~ct, severity == 1],
        ["Control", "Suspected", "Mild", "Regular"],
        np.where(rng.random(n) < 0.17, "Critically ill", "Severe"),
    )
    return pd.DataFrame(
        {
            "ct": ct.astype(int),
            "nat": nat.astype(int),
            "severity": severity,
            "age": age,
            "sex": rng.choice(["Female", "Male"], n, p=[0.51, 0.49]),
            "hospital": rng.choice(["Phantom A", "Phantom B"], n, p=[0.7, 0.3]),
            "morbidity": morbidity,
            "enrolled": rng.random(n) < 0.87,
            "burden": burden,
        },
        index=pd.RangeIndex(1, n + 1, name="patient_id"),
    )


def source_cohort() -> pd.DataFrame:
    """Counterpart of `cohort.load_source_cohort`."""
    table = source_table()[["age", "sex", "hospital", "morbidity", "enrolled"]].copy()
    table["segmentation_failed"] = False
    return table


def cohort() -> pd.DataFrame:
    """Counterpart of `cohort.load_cohort`: 300 patients."""
    columns = ["ct", "nat", "severity", "age", "sex", "hospital", "morbidity"]
    return source_table().loc[source_table()["enrolled"], columns].copy()


def laboratory() -> pd.DataFrame:
    """Counterpart of `cohort.load_laboratory`: a few tests, more often made in the infected."""
    table = source_table()
    rng = np.random.default_rng([SEED, 3])
    found = {}
    for name, (usual, spread, rise) in _LABORATORY.items():
        value = usual * np.exp(spread * rng.normal(size=len(table)) + rise * table["burden"] / 0.1)
        measured = rng.random(len(table)) < 0.5 + 0.3 * table["nat"]
        found[name] = value.where(measured)
    return pd.DataFrame(found)


def features() -> pd.DataFrame:
    """Counterpart of `cohort.load_features`, measured on the scans of `cohort`."""
    return _measured()[list(FEATURE_NAMES)].astype(float)


def geometry() -> pd.DataFrame:
    """Counterpart of `cohort.load_geometry`, in mm of the released volumes' size."""
    table = _measured()[list(_GEOMETRY)].astype(int)
    for column, size in (("width", 390), ("height", 390), ("slices", 340)):
        table.insert(0, column, size)
    return table


@cache
def _measured() -> pd.DataFrame:
    with resources.as_file(resources.files("covidmtl_core.data_manifest") / TABLE) as path:
        return pd.read_csv(path, index_col="patient_id")


def patient(patient_id: int) -> "Patient":
    """Body, disease and scanner of a phantom patient; the hospitals' scanners differ in noise."""
    from covidmtl_core.phantom import draw_patient

    burden, hospital = source_table()[["burden", "hospital"]].T[patient_id]
    drawn = draw_patient(SEED + patient_id, float(burden))
    return replace(drawn, noise=0.7 * drawn.noise) if hospital == "Phantom B" else drawn


def other_scanner(patient_id: int) -> "Patient":
    """A patient of another site: infected, with a noisier scanner and a smaller field of view.

    Args:
        patient_id: From 1; none of them is in `cohort`.
    """
    from covidmtl_core.phantom import draw_patient

    rng = np.random.default_rng([SEED, 2, patient_id])
    burden = float(np.clip(0.045 * np.exp(0.85 * rng.normal()), 0.004, 0.36))
    drawn = draw_patient(SEED + N_SOURCE + patient_id, burden)
    return replace(drawn, noise=90.0, field_of_view=350.0, padding=-2000)


def measure(patient_id: int) -> pd.Series:
    """Features and geometry of a patient's scan, through DICOM, reader and segmentation."""
    import SimpleITK as sitk

    from covidmtl_core.ct import read_ct
    from covidmtl_core.dicom import write_series
    from covidmtl_core.phantom import SIZE, make_phantom
    from covidmtl_core.radiomics.features import extract_features
    from covidmtl_core.segmentation import segment_lungs

    scan = make_phantom(patient(patient_id), [round(n / SCAN_MM) for n in SIZE], SCAN_MM)
    with tempfile.TemporaryDirectory() as folder:
        write_series(scan.image, Path(folder) / "series", f"phantom-{patient_id:04d}")
        image = read_ct(Path(folder) / "series")
    mask = segment_lungs(image)
    lungs = sitk.GetArrayViewFromImage(mask) > 0
    areas = lungs.sum(axis=(1, 2))
    slices = np.flatnonzero(areas)
    row = extract_features(image, mask, n_jobs=1)
    row["first_slice"], row["last_slice"] = slices[[0, -1]] * SCAN_MM
    row["max_slice_area"] = areas.max() * SCAN_MM**2
    row["minimum"], row["maximum"] = 0, row["Maximum"]
    return row.rename(patient_id)


def write_table() -> None:
    """Measure the whole cohort and write the table into the repository."""
    from joblib import Parallel, delayed

    patients = cohort().index
    rows = Parallel(n_jobs=-1, verbose=5)(delayed(measure)(int(i)) for i in patients)
    table = pd.DataFrame(rows).rename_axis("patient_id")
    target = Path(__file__).resolve().parents[1] / "data_manifest" / TABLE
    table.to_csv(target, float_format="%.8g", lineterminator="\n")
    print(f"{len(table)} patients written to {target}")
