import pandas as pd
import pytest

from covidmtl_core import baselines, cohort, evaluation, phantom


def test_same_tables_every_time() -> None:
    first = phantom.synthetic_cohort()
    phantom._draw.cache_clear()
    pd.testing.assert_frame_equal(first, phantom.synthetic_cohort())
    pd.testing.assert_frame_equal(
        phantom.synthetic_features(first), phantom.synthetic_features(first)
    )


def test_labels_are_structured_like_the_released_ones() -> None:
    patients = cohort.load_cohort("phantom")
    assert (patients["severity"] == patients["morbidity"].map(cohort.SEVERITY_OF_MORBIDITY)).all()
    assert ((patients["severity"] == 0) == (patients["nat"] == 0)).all()
    assert 0.7 < patients["ct"].mean() < 0.8
    positive, negative = patients[patients["ct"] == 1], patients[patients["ct"] == 0]
    assert 0.18 < (positive["nat"] == 0).mean() < 0.34
    assert 0.01 < (negative["nat"] == 1).mean() < 0.15


@pytest.mark.parametrize("task", list(cohort.TASKS))
def test_features_tell_something_but_not_all(task: str) -> None:
    patients, features = cohort.load_cohort("phantom"), cohort.load_features("phantom")
    train, test = cohort.split(patients)
    result = baselines.fit_predict("RF", features, patients[task], train, test, n_trees=50)
    areas = evaluation.one_vs_rest_aucs(patients.loc[test, task], result.probabilities)
    assert 0.6 < areas.mean() < 0.97
