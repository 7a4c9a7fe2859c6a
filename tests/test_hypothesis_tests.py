import numpy as np
import pandas as pd
import pytest
from scipy import stats

from covidmtl_core import cohort, hypothesis_tests
from covidmtl_core.errors import ParameterError
from covidmtl_core.radiomics.names import TABLE_5_FEATURES


@pytest.fixture
def table() -> tuple[pd.DataFrame, pd.Series]:
    rng = np.random.default_rng(3)
    groups = pd.Series(np.repeat(["a", "b", "c"], [12, 30, 7]), name="group")
    spread = groups.map({"a": 1.0, "b": 4.0, "c": 0.5})
    values = {f"f{i}": rng.normal(loc=i * (groups == "b"), scale=spread) for i in range(4)}
    return pd.DataFrame(values), groups


def plain_welch(samples: list[np.ndarray]) -> tuple[float, int, float, float]:
    """Welch (1951), written from the definition."""
    k = len(samples)
    n = np.array([len(s) for s in samples])
    means = np.array([s.mean() for s in samples])
    weights = n / np.array([s.var(ddof=1) for s in samples])
    grand = (weights * means).sum() / weights.sum()
    h = ((1 - weights / weights.sum()) ** 2 / (n - 1)).sum()
    numerator = (weights * (means - grand) ** 2).sum() / (k - 1)
    statistic = numerator / (1 + 2 * (k - 2) / (k**2 - 1) * h)
    df2 = (k**2 - 1) / (3 * h)
    return statistic, k - 1, df2, stats.f.sf(statistic, k - 1, df2)


def samples_of(features: pd.DataFrame, groups: pd.Series, name: str) -> list[np.ndarray]:
    return [features.loc[groups == g, name].to_numpy() for g in sorted(groups.unique())]


def test_welch_equals_a_plain_implementation(table) -> None:  # type: ignore[no-untyped-def]
    features, groups = table
    result = hypothesis_tests.welch_anova(features, groups)
    assert list(result.columns) == ["statistic", "df1", "df2", "p"]
    assert list(result.index) == list(features.columns)
    for name in features:
        expected = plain_welch(samples_of(features, groups, name))
        np.testing.assert_allclose(result.loc[name].astype(float), expected, rtol=1e-10)


def test_welch_of_two_groups_is_welchs_t_test(table) -> None:  # type: ignore[no-untyped-def]
    features, groups = table
    two = groups != "c"
    result = hypothesis_tests.welch_anova(features[two], groups[two])
    for name in features:
        t = stats.ttest_ind(*samples_of(features[two], groups[two], name), equal_var=False)
        assert result.loc[name, "statistic"] == pytest.approx(t.statistic**2)
        assert result.loc[name, "df2"] == pytest.approx(t.df)
        assert result.loc[name, "p"] == pytest.approx(t.pvalue)


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("task", list(cohort.TASKS))
def test_table_5_on_released_data_equals_a_plain_implementation(task: str) -> None:
    features, groups = cohort.load_features()[list(TABLE_5_FEATURES)], cohort.load_cohort()[task]
    result = hypothesis_tests.welch_anova(features, groups)
    for name in features:
        expected = plain_welch(samples_of(features, groups, name))
        np.testing.assert_allclose(result.loc[name].astype(float), expected, rtol=1e-8, atol=1e-300)


def test_games_howell_equals_a_plain_implementation(table) -> None:  # type: ignore[no-untyped-def]
    features, groups = table
    result = hypothesis_tests.games_howell(features, groups, intervals=True)
    for name in features:
        for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
            x, y = features.loc[groups == a, name], features.loc[groups == b, name]
            vx, vy = x.var() / len(x), y.var() / len(y)
            df = (vx + vy) ** 2 / (vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1))
            scale = np.sqrt((vx + vy) / 2)
            difference = y.mean() - x.mean()
            p = stats.studentized_range.sf(abs(difference) / scale, 3, df)
            half = stats.studentized_range.ppf(0.95, 3, df) * scale
            row = result.loc[(name, a, b)]
            assert row["difference"] == pytest.approx(difference)
            assert row["p"] == pytest.approx(p, abs=1e-9)
            assert (row["low"], row["high"]) == pytest.approx(
                (difference - half, difference + half), rel=1e-6
            )
    short = hypothesis_tests.games_howell(features, groups)
    pd.testing.assert_frame_equal(short, result[["difference", "p"]])


def test_constant_feature_gives_nan_not_a_number_or_warning(table, recwarn) -> None:  # type: ignore[no-untyped-def]
    features, groups = table
    features = features.assign(constant=1.0, only_a=np.where(groups == "a", 1.0, features["f0"]))
    result = hypothesis_tests.welch_anova(features, groups)
    assert result.loc[["constant", "only_a"], ["statistic", "df2", "p"]].isna().all(axis=None)
    assert result.loc["f0"].notna().all()
    assert hypothesis_tests.games_howell(features, groups).loc["constant"].isna().all(axis=None)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_inputs_that_do_not_fit_are_named(table) -> None:  # type: ignore[no-untyped-def]
    features, groups = table
    for test in (hypothesis_tests.welch_anova, hypothesis_tests.games_howell):
        with pytest.raises(ParameterError, match="48"):
            test(features, groups.to_numpy()[1:])
        with pytest.raises(ParameterError, match="same order"):
            test(features, groups.iloc[::-1])
        with pytest.raises(ParameterError, match="missing"):
            test(features.mask(features["f0"] > 0), groups)
        with pytest.raises(ParameterError, match="missing"):
            test(features, groups.where(groups != "a"))
        with pytest.raises(ParameterError, match="infinite"):
            test(features.replace(features.iloc[0, 0], np.inf), groups)
        with pytest.raises(ParameterError, match="numbers"):
            test(features.assign(text="a"), groups)
        with pytest.raises(ParameterError, match="two patients"):
            test(features, groups.where(groups.index > 0, "single"))
        with pytest.raises(ParameterError, match="1 groups"):
            test(features, ["same"] * len(features))
