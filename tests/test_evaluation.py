import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from statsmodels.stats.contingency_tables import mcnemar

from covidmtl_core import evaluation
from covidmtl_core.errors import ParameterError


@pytest.fixture(params=[2, 3, 5])
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(request.param)
    k = request.param
    labels = np.concatenate([np.arange(k), rng.integers(0, k, 80)])
    logits = rng.normal(size=(len(labels), k)) + 1.2 * np.eye(k)[labels]
    probabilities = np.round(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 2)
    return labels, probabilities  # rounded, so that there are ties


def pairwise_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[truth][:, None], scores[~truth][None]
    return float(((positive > negative) + 0.5 * (positive == negative)).mean())


def test_exact_auc_is_the_share_of_ordered_pairs(case) -> None:  # type: ignore[no-untyped-def]
    labels, p = case
    expected = [pairwise_auc(labels == k, p[:, k]) for k in range(p.shape[1])]
    np.testing.assert_allclose(evaluation.one_vs_rest_aucs(labels, p), expected, atol=1e-12)


def test_weighted_aucs_are_those_of_repeated_patients(case) -> None:  # type: ignore[no-untyped-def]
    labels, p = case
    times = np.random.default_rng(0).integers(0, 4, (5, len(labels)))
    for k in range(p.shape[1]):
        found = evaluation._weighted_aucs(labels == k, p[:, k], times.astype(float))
        expected = [pairwise_auc(np.repeat(labels == k, n), np.repeat(p[:, k], n)) for n in times]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def plain_delong_p(truth: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """DeLong's test by its definition, pair by pair."""
    components = []
    for scores in (first, second):
        positive, negative = scores[truth][:, None], scores[~truth][None]
        kernel = (positive > negative) + 0.5 * (positive == negative)
        components.append((kernel.mean(1), kernel.mean(0), kernel.mean()))
    (v10a, v01a, a), (v10b, v01b, b) = components
    contrast = np.array([1, -1])
    s10, s01 = np.cov(v10a, v10b), np.cov(v01a, v01b)
    variance = contrast @ (s10 / truth.sum() + s01 / (~truth).sum()) @ contrast
    return float(2 * stats.norm.sf(abs(a - b) / np.sqrt(variance)))


def two_models(k: int, n: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(k)
    labels = np.concatenate([np.arange(k), np.arange(k), rng.integers(0, k, n)])
    shared = rng.normal(size=(len(labels), k)) + np.eye(k)[labels]
    logits = [shared + rng.normal(size=shared.shape) * s for s in (0.3, 1.2)]
    first, second = (np.round(np.exp(x) / np.exp(x).sum(1, keepdims=True), 2) for x in logits)
    return labels, first, second


def test_two_models_are_compared_by_mcnemar_and_delong() -> None:
    labels, first, second = two_models(2)
    second[:, 1] = 1 - second[:, 0]
    first[:, 1] = 1 - first[:, 0]
    found = evaluation.compare_models(labels, first, second)
    expected = plain_delong_p(labels == 1, first[:, 1], second[:, 1])
    assert found["auc_p"] == pytest.approx(expected, rel=1e-9)
    right = [p.argmax(1) == labels for p in (first, second)]
    only = [int((a & ~b).sum()) for a, b in (right, right[::-1])]
    assert found["accuracy_p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)
    assert found["auc_low"] < found["auc_difference"] < found["auc_high"]
    swapped = evaluation.compare_models(labels, second, first)
    assert swapped["auc_difference"] == pytest.approx(-found["auc_difference"])


def test_the_spread_of_three_classes_is_that_of_the_bootstrap() -> None:
    labels, first, second = two_models(3, 400)
    found = evaluation.compare_models(labels, first, second)
    rng, drawn = np.random.default_rng(1), []
    members = [np.flatnonzero(labels == k) for k in range(3)]
    for _ in range(400):
        pick = np.concatenate([rng.choice(ids, len(ids)) for ids in members])
        areas = [evaluation.one_vs_rest_aucs(labels[pick], p[pick]) for p in (first, second)]
        drawn.append(areas[0].mean() - areas[1].mean())
    width = found["auc_high"] - found["auc_low"]
    assert width == pytest.approx(2 * 1.96 * np.std(drawn), rel=0.12)


def test_equal_models_do_not_differ() -> None:
    labels, first, _ = two_models(3)
    found = evaluation.compare_models(labels, first, first)
    assert (found["accuracy_p"], found["auc_p"], found["auc_difference"]) == (1, 1, 0)
    with pytest.raises(ParameterError, match="cannot be compared"):
        evaluation.compare_models([0, 1, 2], np.eye(3), np.eye(3))


def test_holm_is_the_step_down_rule() -> None:
    p = pd.Series([0.04, 0.01, 0.03], ["a", "b", "c"])
    assert evaluation.holm(p).to_dict() == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})


def plain_interpolated_auc(truth: np.ndarray, scores: np.ndarray, points: int) -> float:
    thresholds = np.r_[np.inf, np.unique(scores)[::-1]]
    x = [(scores[~truth] >= t).mean() for t in thresholds]
    y = [(scores[truth] >= t).mean() for t in thresholds]
    area = 0.0
    grid = [i / (points - 1) for i in range(points)]
    heights = []
    for g in grid:
        right = next(i for i in range(len(x)) if x[i] > g) if g < 1 else len(x) - 1
        left = right - 1
        fraction = (g - x[left]) / (x[right] - x[left]) if x[right] > x[left] else 1.0
        heights.append(y[left] + fraction * (y[right] - y[left]))
    heights[0], heights[-1] = 0.0, 1.0
    for i in range(1, points):
        area += (grid[i] - grid[i - 1]) * (heights[i] + heights[i - 1]) / 2
    return area


@pytest.mark.parametrize("points", [11, 100])
def test_interpolated_auc_equals_a_plain_one(case, points: int) -> None:  # type: ignore[no-untyped-def]
    labels, p = case
    got = evaluation.interpolated_auc(labels == 0, p[:, 0], points)
    assert got == pytest.approx(plain_interpolated_auc(labels == 0, p[:, 0], points), abs=1e-9)


def test_interpolated_auc_tends_to_the_exact_one(case) -> None:  # type: ignore[no-untyped-def]
    labels, p = case
    exact = pairwise_auc(labels == 0, p[:, 0])
    assert evaluation.interpolated_auc(labels == 0, p[:, 0], 100_001) == pytest.approx(
        exact, abs=1e-4
    )


def test_limiting_cases() -> None:
    labels = np.array([0, 0, 1, 1])
    perfect = np.eye(2)[labels]
    metrics = evaluation.classification_metrics(labels, perfect)
    assert metrics["accuracy"] == metrics["exact_auc"] == metrics["f1"] == 1
    assert evaluation.classification_metrics(labels, 1 - perfect)["exact_auc"] == 0
    assert evaluation.classification_metrics(labels, np.full((4, 2), 0.5))["exact_auc"] == 0.5


def test_weighted_recall_is_accuracy_and_weights_are_class_sizes(case) -> None:  # type: ignore[no-untyped-def]
    labels, p = case
    metrics = evaluation.classification_metrics(labels, p)
    predicted = p.argmax(axis=1)
    assert metrics["recall"] == pytest.approx(metrics["accuracy"])
    precision = sum(
        (labels == k).mean() * (labels[predicted == k] == k).mean()
        for k in range(p.shape[1])
        if (predicted == k).any()
    )
    assert metrics["precision"] == pytest.approx(precision)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([0, 1, 1], np.ones((2, 2)), "shape"),
        ([0, 0, 0], np.ones((3, 2)), "every class"),
        ([0, 1, 2], np.ones((3, 2)), "every class"),
        ([[0, 1]], np.ones((2, 2)), "shape"),
    ],
)
def test_inputs_that_do_not_fit_are_named(labels, probabilities, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ParameterError, match=message):
        evaluation.classification_metrics(labels, probabilities)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        labels = np.repeat([0, 1], 60)
        correct = rng.random(120) < 0.8
        scores = np.where(correct, labels, 1 - labels) + rng.normal(scale=1e-3, size=120)
        p = np.column_stack([1 - scores, scores])
        interval = evaluation.bootstrap_metrics(labels, p, 200, seed=1).loc["accuracy"]
        hits += interval["low"] <= 0.8 <= interval["high"]
    assert 51 <= hits <= 60


def test_bootstrap_depends_on_its_seed_alone(case) -> None:  # type: ignore[no-untyped-def]
    one, same, other = (evaluation.bootstrap_metrics(*case, 50, seed=s) for s in (1, 1, 2))
    assert one.equals(same) and not one.equals(other)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (345, 399), (399, 399)])
def test_exact_interval_is_the_beta_quantile(k: int, n: int) -> None:
    low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0
    high = stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1
    assert evaluation.exact_interval(k, n) == pytest.approx((low, high), abs=1e-9)


def test_hanley_mcneil_gives_the_articles_example() -> None:
    # Hanley and McNeil 1982: area 0.893 from 51 abnormal and 58 normal images, SE 0.032.
    low, high = evaluation.hanley_mcneil_interval(0.893, 51, 58)
    assert (high - low) / (2 * 1.959964) == pytest.approx(0.032, abs=0.001)
    assert evaluation.hanley_mcneil_interval(1.0, 5, 5) == (1.0, 1.0)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ParameterError, match="10 and 5"):
        evaluation.mcnemar_bounds(10, 5, 9)
    with pytest.raises(ParameterError, match=r"1\.2"):
        evaluation.hanley_mcneil_interval(1.2, 5, 5)


@pytest.mark.parametrize(("a", "b", "n"), [(7, 5, 9), (9, 9, 9), (4, 8, 10), (0, 3, 12)])
def test_mcnemar_bounds_hold_all_possible_tables(a: int, b: int, n: int) -> None:
    values = []
    for both in range(min(a, b) + 1):
        neither = n - a - b + both
        if neither >= 0:
            table = [[both, a - both], [b - both, neither]]
            values.append(mcnemar(table, exact=True).pvalue if a + b > 2 * both else 1.0)
    assert evaluation.mcnemar_bounds(a, b, n) == pytest.approx((min(values), max(values)))


def test_overlap_by_hand() -> None:
    predicted, truth = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    found = evaluation.overlap_metrics(predicted, truth)
    assert found["dice"] == pytest.approx(4 / 6) and found["jaccard"] == pytest.approx(2 / 4)
    assert found["precision"] == found["recall"] == pytest.approx(2 / 3)
    assert found["mcc"] == pytest.approx(matthews_corrcoef(truth, predicted))
    assert found["jaccard"] == pytest.approx(found["dice"] / (2 - found["dice"]))


@pytest.mark.parametrize(("predicted", "value"), [([0, 0], 1.0), ([0, 1], 0.0)])
def test_overlap_with_an_empty_truth(predicted: list[int], value: float) -> None:
    assert set(evaluation.overlap_metrics(predicted, [0, 0]).values()) == {value}


def test_overlap_of_a_full_mask() -> None:
    found = evaluation.overlap_metrics([1, 1, 1, 1], [1, 1, 0, 0])
    assert found["mcc"] == 0 and found["precision"] == 0.5 and found["recall"] == 1
    assert set(evaluation.overlap_metrics([1, 1], [1, 1]).values()) == {1.0}


def test_overlap_of_other_shapes_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"\(2,\) and \(3,\)"):
        evaluation.overlap_metrics([0, 1], [0, 1, 1])
