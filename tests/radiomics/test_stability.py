import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf

from covidmtl_core import phantom_cohort
from covidmtl_core.errors import DataError
from covidmtl_core.radiomics import stability
from covidmtl_core.radiomics.names import FEATURE_NAMES


def measurements(
    rng: np.random.Generator, n: int, shift: float, noise: float
) -> list[pd.DataFrame]:
    truth = rng.normal(size=n)
    columns = [truth, truth + shift + rng.normal(scale=noise, size=n)]
    return [pd.DataFrame({"a": column}) for column in columns]


def test_intraclass_correlation_equals_its_mean_squares() -> None:
    one, other = measurements(np.random.default_rng(4), 30, 0.4, 0.5)
    n = len(one)
    long = pd.DataFrame(
        {
            "y": np.concatenate([one["a"], other["a"]]),
            "patient": np.tile(np.arange(n), 2),
            "time": np.repeat([0, 1], n),
        }
    )
    from statsmodels.stats.anova import anova_lm

    squares = anova_lm(smf.ols("y ~ C(patient) + C(time)", long).fit())["mean_sq"]
    rows, columns, error = squares["C(patient)"], squares["C(time)"], squares["Residual"]
    expected = (rows - error) / (rows + error + 2 / n * (columns - error))
    assert stability.intraclass_correlation(one, other)["a"] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("shift", "noise", "low", "high"), [(0, 0, 1, 1), (9, 0, 0, 0.1), (0, 1, 0.5, 0.8)]
)
def test_agreement_falls_with_shift_and_noise(
    shift: float, noise: float, low: float, high: float
) -> None:
    found = stability.intraclass_correlation(
        *measurements(np.random.default_rng(1), 2000, shift, noise)
    )
    assert low - 1e-9 <= found["a"] <= high + 1e-9


def test_the_stored_correlations_cover_all_features() -> None:
    table = stability.correlations()
    assert list(table.columns) == list(stability.CONDITIONS)
    assert set(table.index) == set(FEATURE_NAMES) and (table.max() <= 1).all()
    assert table.index[table.isna().any(axis=1)].isin(["Minimum"]).all()


def test_a_patient_of_the_cohort_lies_inside_it() -> None:
    cohort = phantom_cohort.features()
    found = stability.place(cohort.iloc[5], cohort)
    assert tuple(found.index) == FEATURE_NAMES and found["percentile"].between(0, 100).all()
    assert not found["flag"].str.contains("outside").any()
    rank = (cohort["Mean"] < cohort["Mean"].iloc[5]).mean() + 0.5 / len(cohort)
    assert found.loc["Mean", "percentile"] == pytest.approx(100 * rank)


def test_flags_name_what_is_wrong() -> None:
    cohort = phantom_cohort.features()
    cohort["Minimum"] = 1.0
    mine = cohort.iloc[0].copy()
    mine["Mean"], mine["Imc1"] = 1e6, np.nan
    found = stability.place(mine, cohort, spacing_mm=2.0)
    assert found["flag"].str.contains("measured at 2 mm, the cohort at 1 mm").all()
    assert found.loc["Mean", "flag"].startswith("outside the cohort")
    assert found.loc["Mean", "percentile"] == 100
    assert found.loc["Imc1", "flag"].startswith("not defined here")
    assert found.loc["Minimum", "flag"].startswith("the same in the whole cohort")
    least = stability.correlations().min(axis=1)
    trusted = stability.place(cohort.iloc[0], cohort)["flag"].str.contains("moved by")
    assert (trusted == ~(least >= stability.TRUSTED_FROM)[trusted.index]).all()
    with pytest.raises(DataError, match="missing"):
        stability.place(mine.drop("Mean"), cohort)


def test_noise_moves_entropy_more_than_volume_or_mean() -> None:
    found = stability.measure(patients=4, spacing_mm=6.0)
    assert found.loc["Entropy", "noise"] < found.loc["Mean", "noise"]
    assert found.loc["Mean", "noise"] > 0.8
