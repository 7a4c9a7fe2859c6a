"""The phantom tier: a seeded synthetic cohort with the columns and labels of the released tables.

Nothing here is patient data and no value has a physical unit. It exists so that every chapter runs
without network or download; no result on it says anything about COVID-19.
"""

from functools import cache

import numpy as np
import pandas as pd

from covidmtl_core.radiomics.names import FEATURE_NAMES

N_SOURCE = 400
SEED = 20220401


@cache
def _draw() -> pd.DataFrame:
    """The synthetic source cohort with its hidden lesion burden and body size."""
    rng = np.random.default_rng(SEED)
    n = N_SOURCE
    ct = rng.random(n) < 0.75
    nat = np.where(ct, rng.random(n) > 0.26, rng.random(n) < 0.07)
    age = np.clip(rng.normal(54, 17, n), 1, 97).round().astype(int)
    burden = np.where(ct, rng.lognormal(0.0, 0.6, n), 0.1) + 0.5 * nat + 0.01 * (age - 54)
    severe = nat & (burden > np.quantile(burden[nat], 0.74))
    severity = np.where(severe, 2, nat.astype(int))
    morbidity = np.select(
        [~nat & ~ct, ~nat & ct, nat & ~ct, severity == 1],
        ["Control", "Suspected", "Mild", "Regular"],
        np.where(rng.random(n) < 0.17, "Critically ill", "Severe"),
    )
    table = pd.DataFrame(
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
            "size": rng.normal(size=n),
        },
        index=pd.RangeIndex(1, n + 1, name="patient_id"),
    )
    return table


def synthetic_source_cohort() -> pd.DataFrame:
    """Counterpart of `cohort.load_source_cohort`."""
    table = _draw()[["age", "sex", "hospital", "morbidity", "enrolled"]].copy()
    table["segmentation_failed"] = False
    return table


def synthetic_cohort() -> pd.DataFrame:
    """Counterpart of `cohort.load_cohort`: about 350 patients."""
    columns = ["ct", "nat", "severity", "age", "sex", "hospital", "morbidity"]
    return _draw().loc[_draw()["enrolled"], columns].copy()


def synthetic_features(cohort: pd.DataFrame) -> pd.DataFrame:
    """Counterpart of `cohort.load_features`: features that follow lesion burden and body size."""
    rng = np.random.default_rng(SEED + 1)
    hidden = _draw().loc[cohort.index, ["burden", "size"]].to_numpy()
    loadings = rng.normal(scale=[[0.22], [0.6]], size=(2, len(FEATURE_NAMES)))
    values = hidden @ loadings + rng.normal(size=(len(cohort), len(FEATURE_NAMES)))
    features = pd.DataFrame(values, index=cohort.index, columns=list(FEATURE_NAMES))
    features["Minimum"] = 1.0
    features["TotalEnergy"] = features["Energy"]
    return features


def synthetic_geometry(cohort: pd.DataFrame) -> pd.DataFrame:
    """Counterpart of `cohort.load_geometry`, in the released volumes' size."""
    rng = np.random.default_rng(SEED + 2)
    n = len(cohort)
    first = rng.integers(10, 60, n)
    return pd.DataFrame(
        {
            "slices": 340,
            "height": 390,
            "width": 390,
            "first_slice": first,
            "last_slice": first + rng.integers(220, 280, n),
            "max_slice_area": rng.integers(15_000, 30_000, n),
            "minimum": 0,
            "maximum": rng.integers(1500, 4096, n),
        },
        index=cohort.index,
    )
