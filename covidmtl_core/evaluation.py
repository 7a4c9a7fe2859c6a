"""Classification and overlap measures as the paper reports them, done right, with intervals."""

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    auc,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

from covidmtl_core.errors import ParameterError

METRICS = ("precision", "recall", "f1", "accuracy", "auc")


def one_vs_rest_aucs(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """Exact area under the ROC curve of each class against the others.

    Args:
        labels: (n,) classes 0..k-1.
        probabilities: (n, k).

    Returns:
        (k,) areas. With two classes both are the same.

    Raises:
        ParameterError: The shapes do not fit, or a class does not occur.
    """
    return _per_class(roc_auc_score, labels, probabilities)


def interpolated_auc(truth: ArrayLike, scores: ArrayLike, points: int = 100) -> float:
    """Area under a ROC curve resampled at evenly spaced false-positive rates.

    The released code reports this instead of the exact area (it is the usual recipe for averaging
    curves). The curve starts at the origin even where the first true positives cost nothing.

    Args:
        truth: (n,) boolean, True for the positive class.
        scores: (n,) larger for more likely positive.
        points: Number of false-positive rates between 0 and 1.
    """
    false_positive, true_positive, _ = roc_curve(truth, scores)
    grid = np.linspace(0, 1, points)
    resampled = np.interp(grid, false_positive, true_positive)
    resampled[0], resampled[-1] = 0.0, 1.0
    return float(auc(grid, resampled))


def interpolated_aucs(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.float64]:
    """`interpolated_auc` of each class against the others; arguments as `one_vs_rest_aucs`."""
    return _per_class(interpolated_auc, labels, probabilities)


def _per_class(
    area: Callable[..., float], labels: ArrayLike, probabilities: ArrayLike
) -> NDArray[np.float64]:
    y, p = _checked(labels, probabilities)
    return np.array([area(y == k, p[:, k]) for k in range(p.shape[1])])


def classification_metrics(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """The measures of Tables 3 and 4.

    Args:
        labels: (n,) classes 0..k-1.
        probabilities: (n, k); the class with the largest is the prediction.

    Returns:
        `precision`, `recall`, `f1` (weighted by class size, as released), `accuracy` (fractions),
        `auc` and `auc_spread` as released (interpolated, mean and population standard deviation
        over the classes), `exact_auc` and `exact_auc_spread` done right.

    Raises:
        ParameterError: The shapes do not fit, or a class does not occur.
    """
    y, p = _checked(labels, probabilities)
    predicted = p.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        y, predicted, average="weighted", zero_division=0
    )
    released, exact = interpolated_aucs(y, p), one_vs_rest_aucs(y, p)
    return {
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "accuracy": float(accuracy_score(y, predicted)),
        "auc": float(released.mean()),
        "auc_spread": float(released.std()),
        "exact_auc": float(exact.mean()),
        "exact_auc_spread": float(exact.std()),
    }


def bootstrap_metrics(
    labels: ArrayLike, probabilities: ArrayLike, n_resamples: int, seed: int
) -> pd.DataFrame:
    """Percentile intervals over test patients, resampled within each class.

    Resampling within classes keeps every class present and the class sizes fixed, so intervals
    are conditional on the test set's class balance.

    Args:
        labels: (n,) classes 0..k-1.
        probabilities: (n, k).
        n_resamples: Number of bootstrap samples.
        seed: Seed of the draws.

    Returns:
        Indexed by metric (`accuracy`, `exact_auc`): `low` and `high`, central 95 %.

    Raises:
        ParameterError: The shapes do not fit, or a class does not occur.
    """
    y, p = _checked(labels, probabilities)
    rng = np.random.default_rng(seed)
    times = np.empty((n_resamples, len(y)))  # how often each patient is drawn
    for k in range(p.shape[1]):
        members = np.flatnonzero(y == k)
        even = np.full(len(members), 1 / len(members))
        times[:, members] = rng.multinomial(len(members), even, n_resamples)
    accuracies = times @ (p.argmax(axis=1) == y) / len(y)
    areas = [_weighted_aucs(y == k, p[:, k], times) for k in range(p.shape[1])]
    draws = np.stack([accuracies, np.mean(areas, axis=0)], axis=1)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return pd.DataFrame({"low": low, "high": high}, index=["accuracy", "exact_auc"])


def _weighted_aucs(truth: NDArray, scores: NDArray, times: NDArray) -> NDArray[np.float64]:
    """Exact AUC of each row of `times` (m, n), which says how often a patient occurs."""
    order = np.argsort(scores, kind="stable")
    firsts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    positive, negative = (
        np.add.reduceat(times[:, order] * side[order], firsts, axis=1) for side in (truth, ~truth)
    )
    below = negative.cumsum(axis=1) - negative / 2  # ties count half
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    areas: NDArray[np.float64] = (positive * below).sum(axis=1) / pairs
    return areas


def compare_models(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """Two models on the same patients: do accuracy and AUC differ?

    Accuracies are compared by McNemar's exact test. AUCs (exact; of several classes the mean of
    one against the rest) are compared by DeLong's test, its variance taken within each class, which
    for two classes is DeLong's own.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837-845.

    Args:
        labels: (n,) classes 0..k-1, each at least twice.
        first: (n, k) probabilities of one model.
        second: (n, k) of the other.

    Returns:
        `accuracy_difference` and `auc_difference` (first minus second), `accuracy_p`, `auc_p`, and
        the AUC difference's 95 % interval, `auc_low` and `auc_high`.

    Raises:
        ParameterError: The shapes do not fit, or a class occurs less than twice.
    """
    from statsmodels.stats.contingency_tables import mcnemar

    y, p = _checked(labels, first)
    _, q = _checked(labels, second)
    if p.shape != q.shape or np.bincount(y).min() < 2:
        raise ParameterError(
            f"probabilities of shapes {p.shape} and {q.shape} and classes of {np.bincount(y)} "
            "patients cannot be compared: shapes must be equal, and classes at least of two."
        )
    right = p.argmax(axis=1) == y, q.argmax(axis=1) == y
    table = pd.crosstab(*right).reindex(index=[False, True], columns=[False, True], fill_value=0)
    difference = one_vs_rest_aucs(y, p).mean() - one_vs_rest_aucs(y, q).mean()
    influence = _auc_influence(y, p) - _auc_influence(y, q)
    variance = sum(
        np.var(influence[y == k], ddof=1) * np.count_nonzero(y == k) for k in range(p.shape[1])
    )
    error = float(np.sqrt(variance))
    half = stats.norm.ppf(0.975) * error
    return {
        "accuracy_difference": float(right[0].mean() - right[1].mean()),
        "accuracy_p": float(mcnemar(table, exact=True).pvalue),
        "auc_difference": float(difference),
        "auc_low": float(difference - half),
        "auc_high": float(difference + half),
        "auc_p": float(2 * stats.norm.sf(abs(difference) / error)) if error else 1.0,
    }


def _auc_influence(y: NDArray, p: NDArray) -> NDArray[np.float64]:
    """(n,) what each patient adds to the mean one-against-the-rest AUC: placement by class size."""
    found = np.zeros(len(y))
    for k in range(p.shape[1]):
        inside = y == k
        scores = p[:, k]
        for group, others, sign in ((inside, ~inside, 1), (~inside, inside, -1)):
            above = stats.rankdata(np.r_[scores[group], scores[others]])[: group.sum()]
            within = stats.rankdata(scores[group])
            placement = (above - within) / others.sum()  # share of the others below, ties half
            found[group] += sign * placement / group.sum() / p.shape[1]
    return found


def holm(p_values: "pd.Series[float]") -> "pd.Series[float]":
    """P values corrected for their number, by Holm's step-down method."""
    from statsmodels.stats.multitest import multipletests

    corrected = multipletests(p_values.to_numpy(), method="holm")[1]
    return pd.Series(corrected, p_values.index, name="holm")


def exact_interval(successes: int, n: int) -> tuple[float, float]:
    """Clopper-Pearson 95 % interval of a proportion."""
    interval = stats.binomtest(successes, n).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def hanley_mcneil_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Approximate 95 % interval of an AUC of which only value and class sizes are known.

    Source: Hanley and McNeil, Radiology 143 (1982) 29-36, equation 1.

    Args:
        area: The AUC, between 0 and 1.
        positives: Number of positive cases.
        negatives: Number of negative cases.

    Returns:
        Lower and upper bound, cut to [0, 1].

    Raises:
        ParameterError: The area is outside [0, 1], or a class is empty.
    """
    if not 0 <= area <= 1 or positives < 1 or negatives < 1:
        raise ParameterError(
            f"an AUC of {area} with {positives} and {negatives} cases is impossible."
        )
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
    ) / (positives * negatives)
    half = stats.norm.ppf(0.975) * np.sqrt(variance)
    return max(0.0, area - half), min(1.0, area + half)


def mcnemar_bounds(correct_a: int, correct_b: int, n: int) -> tuple[float, float]:
    """Smallest and largest two-sided exact P that McNemar's test can have given.

    Only the numbers of correct answers of two models on the same patients are known, not how often
    they disagree. P is smallest if the better model is right wherever the other is, and largest if
    they disagree as often as the counts allow.

    Args:
        correct_a: Correct answers of one model.
        correct_b: Correct answers of the other.
        n: Number of patients.

    Returns:
        Smallest and largest P.

    Raises:
        ParameterError: A count is below 0 or above n.
    """
    worse, better = sorted((correct_a, correct_b))
    if not 0 <= worse <= better <= n:
        raise ParameterError(f"{correct_a} and {correct_b} correct answers of {n} are impossible.")
    only_better_at_most = min(better, n - worse)

    def p_value(only_better: int) -> float:
        discordant = 2 * only_better - (better - worse)
        return float(stats.binomtest(only_better, discordant).pvalue) if discordant else 1.0

    return p_value(better - worse), p_value(only_better_at_most)


def _checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray, NDArray]:
    y, p = np.asarray(labels), np.asarray(probabilities, dtype=float)
    if y.ndim != 1 or p.ndim != 2 or len(y) != len(p):
        raise ParameterError(
            f"labels of shape {y.shape} do not fit probabilities of shape {p.shape}."
        )
    if set(np.unique(y)) != set(range(p.shape[1])):
        raise ParameterError(
            f"labels hold the classes {np.unique(y).tolist()}, but there are probabilities for "
            f"classes 0 to {p.shape[1] - 1}: every class must occur, and no other."
        )
    return y, p


def overlap_metrics(predicted: ArrayLike, truth: ArrayLike) -> dict[str, float]:
    """The measures of Table 2 for a segmentation mask (section 4.1).

    Args:
        predicted: Mask of any shape; above 0 is inside.
        truth: Mask of the same shape.

    Returns:
        `dice`, `jaccard`, `mcc` (Matthews correlation) and `precision`, fractions; `recall` beside
        them. All are 1 where both masks are empty, and 0 where only one is; where one mask is
        full, `mcc` is 1 if both are, else 0.

    Raises:
        ParameterError: The shapes differ.
    """
    p, t = np.asarray(predicted) > 0, np.asarray(truth) > 0
    if p.shape != t.shape:
        raise ParameterError(f"The masks have shapes {p.shape} and {t.shape}; they must be equal.")
    both, found, there = (float(np.count_nonzero(m)) for m in (p & t, p, t))
    size = float(p.size)
    if not found or not there:
        return dict.fromkeys(
            ("dice", "jaccard", "mcc", "precision", "recall"), float(found == there)
        )
    neither = size - found - there + both
    spread = np.sqrt(found * there * (size - found) * (size - there))
    correlation = (
        (both * neither - (found - both) * (there - both)) / spread
        if spread
        else float(both == size)
    )
    return {
        "dice": 2 * both / (found + there),
        "jaccard": both / (found + there - both),
        "mcc": float(correlation),
        "precision": both / found,
        "recall": both / there,
    }
