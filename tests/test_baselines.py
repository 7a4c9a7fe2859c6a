import numpy as np
import pytest

from covidmtl_core import baselines, cohort, evaluation
from covidmtl_core.errors import ParameterError


@pytest.fixture(scope="module")
def phantom():  # type: ignore[no-untyped-def]
    patients, features = cohort.load_cohort("phantom"), cohort.load_features("phantom")
    return features, patients["ct"], *cohort.split(patients)


@pytest.mark.parametrize("model", baselines.MODELS)
def test_predictions_are_probabilities_and_repeatable(phantom, model: str) -> None:  # type: ignore[no-untyped-def]
    one, same = (baselines.fit_predict(model, *phantom, n_trees=20) for _ in range(2))
    assert one.probabilities.shape == (len(phantom[3]), 2)
    np.testing.assert_allclose(one.probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(one.probabilities, same.probabilities)
    assert list(one.importances.index) == list(phantom[0].columns)
    assert one.importances["Minimum"] == 0, "a constant feature cannot be important"


def test_only_the_forest_has_a_seed(phantom) -> None:  # type: ignore[no-untyped-def]
    def moved(model: str) -> bool:
        a, b = (baselines.fit_predict(model, *phantom, n_trees=20, seed=s) for s in (1, 2))
        return bool((a.probabilities != b.probabilities).any())

    assert moved("RF") and not moved("LGBM")


def test_scaling_on_training_patients_ignores_the_test_patients(phantom) -> None:  # type: ignore[no-untyped-def]
    features, labels, train, test = phantom
    extreme = features.copy()
    extreme.loc[test[0]] *= 1e6
    results = [
        baselines.fit_predict("RF", f, labels, train, test, n_trees=20, scale_on="training")
        for f in (features, extreme)
    ]
    np.testing.assert_array_equal(results[0].probabilities[1:], results[1].probabilities[1:])


@pytest.mark.parametrize(
    ("name", "value"), [("model", "SVM"), ("scale_on", "test"), ("n_trees", 0), ("n_trees", 2.5)]
)
def test_wrong_arguments_are_named(phantom, name: str, value: object) -> None:  # type: ignore[no-untyped-def]
    arguments = {"model": "RF"} | {name: value}
    model = arguments.pop("model")
    with pytest.raises(ParameterError, match=name):
        baselines.fit_predict(model, *phantom, **arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("released")
@pytest.mark.parametrize(
    ("task", "accuracy", "area"), [("ct", 86.47, 0.913), ("nat", 73.93, 0.819)]
)
def test_forest_gives_the_printed_numbers(task: str, accuracy: float, area: float) -> None:
    patients, features = cohort.load_cohort(), cohort.load_features()
    train, test = cohort.split(patients)
    result = baselines.fit_predict("RF", features, patients[task], train, test)
    metrics = evaluation.classification_metrics(patients.loc[test, task], result.probabilities)
    assert round(100 * metrics["accuracy"], 2) == accuracy
    assert round(metrics["auc"], 3) == area
