"""Tests between patient groups of unequal variance (paper sections 4.4 and 5.5, Table 5)."""

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from covidmtl_core.errors import MissingDependencyError, ParameterError


def welch_anova(features: pd.DataFrame, groups: ArrayLike) -> pd.DataFrame:
    """Welch's analysis of variance of each feature between groups.

    Source: Welch, Biometrika 38 (1951) 330-336, as computed by statsmodels. With two groups it is
    the square of Welch's t-test.

    Args:
        features: One row a patient, one numeric column a feature.
        groups: One label a patient, in the rows' order; a Series with other labels than the rows
            is rejected rather than aligned.

    Returns:
        Indexed by feature: `statistic` (asymptotically F distributed), `df1`, `df2`, `p`. All NaN
        but df1 where a group's values are all the same, since its variance is then zero.

    Raises:
        ParameterError: Lengths differ, values are missing, or a group has fewer than two patients.
        MissingDependencyError: statsmodels is not installed.
    """
    try:
        from statsmodels.stats.oneway import anova_oneway
    except ImportError as error:
        raise MissingDependencyError(
            "Welch's ANOVA needs statsmodels: pip install statsmodels."
        ) from error
    members = _members(features, groups)
    rows = {}
    for name in features.columns:
        samples = [features[name].to_numpy(float)[ids] for ids in members.values()]
        if any(np.ptp(sample) == 0 for sample in samples):
            rows[name] = (np.nan, len(samples) - 1, np.nan, np.nan)
            continue
        result = anova_oneway(samples, use_var="unequal", welch_correction=True)
        rows[name] = (result.statistic, result.df_num, result.df_denom, result.pvalue)
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["statistic", "df1", "df2", "p"]
    ).rename_axis("feature")


def games_howell(
    features: pd.DataFrame, groups: ArrayLike, intervals: bool = False
) -> pd.DataFrame:
    """Games-Howell comparison of every pair of groups, feature by feature.

    Source: Games and Howell, Journal of Educational Statistics 1 (1976) 113-125, as computed by
    SciPy.

    Args:
        features: As for `welch_anova`.
        groups: As for `welch_anova`.
        intervals: Add the simultaneous 95 % interval of each difference (about a second each).

    Returns:
        Indexed by `feature`, `group_a`, `group_b`: `difference` of means (b minus a), its interval
        `low` and `high` if asked for, and the adjusted `p` (below about 1e-13 it is rounding, and
        may be 0). NaN where a group's values are all the same.

    Raises:
        ParameterError: Lengths differ, values are missing, or a group has fewer than two patients.
    """
    members = _members(features, groups)
    rows = []
    for name in features.columns:
        samples = [features[name].to_numpy(float)[ids] for ids in members.values()]
        k = len(samples)
        difference = low = high = p = np.full((k, k), np.nan)
        if all(np.ptp(sample) > 0 for sample in samples):
            result = stats.tukey_hsd(*samples, equal_var=False)
            difference, p = result.statistic, result.pvalue
            if intervals:
                low, high = result.confidence_interval()
        for (a, label_a), (b, label_b) in combinations(enumerate(members), 2):
            values = difference[b, a], low[b, a], high[b, a], p[b, a]
            rows.append((name, label_a, label_b, *values))
    columns = ["feature", "group_a", "group_b", "difference", "low", "high", "p"]
    table = pd.DataFrame(rows, columns=columns).set_index(columns[:3])
    return table if intervals else table.drop(columns=["low", "high"])


def _members(features: pd.DataFrame, groups: ArrayLike) -> dict:
    """Row numbers of each group, by sorted label."""
    if isinstance(groups, pd.Series) and not groups.index.equals(features.index):
        raise ParameterError("features and groups are not for the same patients in the same order.")
    labels = pd.Series(np.asarray(groups))
    if len(labels) != len(features):
        raise ParameterError(f"{len(features)} rows of features but {len(labels)} group labels.")
    if not all(pd.api.types.is_numeric_dtype(kind) for kind in features.dtypes):
        raise ParameterError("features must be numbers: drop the other columns first.")
    if labels.isna().any() or not np.isfinite(features.to_numpy(float)).all():
        raise ParameterError("features or groups have missing or infinite values: drop them first.")
    if not features.columns.is_unique:
        raise ParameterError("two features have the same name: rename one.")
    members = {label: ids.to_numpy() for label, ids in labels.groupby(labels).groups.items()}
    small = [str(label) for label, ids in members.items() if len(ids) < 2]
    if small or len(members) < 2:
        raise ParameterError(
            f"at least two groups of two patients are needed; there are {len(members)} groups"
            + (f", too small: {', '.join(small)}." if small else ".")
        )
    return members
