"""The two feature models of Tables 3 and 4: random forest and LightGBM (paper section 5.1)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import MinMaxScaler

from covidmtl_core.errors import MissingDependencyError, ParameterError

MODELS = ("RF", "LGBM")


@dataclass(frozen=True)
class Prediction:
    """What one trained model says.

    Attributes:
        probabilities: (n_test, n_classes).
        importances: One value a feature: mean decrease in impurity (forest), number of splits
            (LightGBM).
    """

    probabilities: NDArray[np.float64]
    importances: pd.Series


def fit_predict(
    model: str,
    features: pd.DataFrame,
    labels: pd.Series,
    train: pd.Index,
    test: pd.Index,
    *,
    n_trees: int = 1000,
    seed: int = 11,
    scale_on: str = "everyone",
    n_jobs: int = -1,
) -> Prediction:
    """Train one model on the training patients and predict the test patients.

    Args:
        model: `RF` or `LGBM`.
        features: One row a patient, raw values.
        labels: Classes 0..k-1, on the same index.
        train: Patient ids to learn from.
        test: Patient ids to predict.
        n_trees: Trees of the forest, or boosting rounds (the paper's 1000 estimators).
        seed: Seed of the forest; LightGBM's defaults draw nothing, so it has no effect there.
        scale_on: Whose minimum and maximum scale the features to [0, 1]: `everyone` as released
            (training and test patients together, a leak) or `training`, which is right.
        n_jobs: Threads; the results do not depend on it.

    Raises:
        ParameterError: An unknown model or scaling, or no whole number of trees.
        MissingDependencyError: LightGBM is asked for and not installed.
    """
    if model not in MODELS:
        raise ParameterError(f"model is {model!r}; it must be one of {', '.join(MODELS)}.")
    if scale_on not in ("everyone", "training"):
        raise ParameterError(f"scale_on is {scale_on!r}; it must be 'everyone' or 'training'.")
    if not isinstance(n_trees, int) or n_trees < 1:
        raise ParameterError(f"n_trees is {n_trees!r}; it must be a whole number of at least 1.")
    reference = features if scale_on == "everyone" else features.loc[train]
    scaler = MinMaxScaler().fit(reference.to_numpy())
    x_train = scaler.transform(features.loc[train].to_numpy())
    x_test = scaler.transform(features.loc[test].to_numpy())
    if model == "RF":
        estimator = RandomForestClassifier(n_trees, random_state=seed, n_jobs=n_jobs)
    else:
        estimator = _lightgbm(n_trees, seed, n_jobs)
    estimator.fit(x_train, labels.loc[train].to_numpy())
    importances = pd.Series(estimator.feature_importances_, features.columns, dtype=float)
    return Prediction(np.asarray(estimator.predict_proba(x_test)), importances)


def _lightgbm(n_trees: int, seed: int, n_jobs: int):  # type: ignore[no-untyped-def]
    try:
        from lightgbm import LGBMClassifier
    except ImportError as error:
        raise MissingDependencyError(
            "The LGBM model needs LightGBM: pip install lightgbm."
        ) from error
    return LGBMClassifier(
        n_estimators=n_trees, learning_rate=0.01, random_state=seed, n_jobs=n_jobs, verbose=-1
    )
