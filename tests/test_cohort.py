import numpy as np
import pandas as pd
import pytest

from covidmtl_core import cohort
from covidmtl_core.errors import ParameterError
from covidmtl_core.radiomics.names import FEATURE_NAMES

TABLES = ("load_cohort", "load_features", "load_source_cohort", "load_geometry")


@pytest.mark.parametrize("load", TABLES)
@pytest.mark.parametrize(("tier", "message"), [("relaesed", "phantom"), ("volumes", "released")])
def test_wrong_tier_is_named(load: str, tier: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        getattr(cohort, load)(tier)


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("load", TABLES)
def test_phantom_tables_have_the_released_columns(load: str) -> None:
    phantom, released = (getattr(cohort, load)(tier) for tier in ("phantom", "released"))
    assert list(phantom.columns) == list(released.columns)
    assert phantom.index.name == released.index.name == "patient_id"
    for column in phantom:
        assert phantom[column].dtype.kind == released[column].dtype.kind or column == "sex"


@pytest.mark.usefixtures("released")
def test_released_cohort_has_the_published_labels() -> None:
    patients = cohort.load_cohort()
    assert patients["ct"].value_counts().to_dict() == {1: 998, 0: 331}
    assert patients["nat"].value_counts().to_dict() == {1: 761, 0: 568}
    assert patients["severity"].value_counts().to_dict() == {0: 568, 1: 562, 2: 199}
    assert patients["morbidity"].value_counts()["Critically ill"] == 34
    assert set(patients["sex"]) == {"Female", "Male"} and patients["hospital"].nunique() == 2


@pytest.mark.usefixtures("released")
def test_released_features_are_complete_and_in_order() -> None:
    features, patients = cohort.load_features(), cohort.load_cohort()
    assert features.shape == (1329, 375) and tuple(features) == FEATURE_NAMES
    assert features.index.equals(patients.index)
    assert np.isfinite(features.to_numpy()).all()


@pytest.mark.usefixtures("released")
def test_laboratory_values_are_one_row_a_patient() -> None:
    values = cohort.load_laboratory()
    assert values.index.is_unique and len(values) == 1521
    assert values.columns.is_unique
    assert {"CRP", "LDH", "LYP", "IL-6", "CD4/CD8"} <= set(values)
    assert values["CRP"].notna().sum() > 500 and (values["CRP"].dropna() >= 0).all()


@pytest.mark.usefixtures("released")
def test_split_is_the_published_one() -> None:
    patients = cohort.load_cohort()
    train, test = cohort.split(patients)
    assert (len(train), len(test)) == (930, 399)
    assert not set(train) & set(test)
    # From print: 92.54 % is 211 of 228 NAT positives, 84.69 % is 83 of 98 controls.
    assert patients.loc[test, "nat"].sum() == 228
    assert (patients.loc[test, "morbidity"] == "Control").sum() == 98


@pytest.mark.usefixtures("released")
def test_check_finds_the_known_faults() -> None:
    checks = cohort.check(cohort.load_cohort(), cohort.load_features(), cohort.load_geometry())
    ids = checks.set_index("finding")["ids"]
    assert ids["patients sharing all features to the last bit"] == (225, 1369, 255, 1389, 866, 1125)
    assert ids["patients sharing all features to 6 decimals only"] == (228, 1371)
    leaked = ids["test patients whose scan is in training"]
    assert len(leaked) == 4
    assert {225, 1369} & set(leaked) and {255, 1389} & set(leaked)
    assert {866, 1125} & set(leaked) and {228, 1371} & set(leaked)
    counts = checks.set_index("finding")["count"]
    assert counts["CT positive, NAT negative"] == 259
    assert counts["CT negative, NAT positive"] == 22
    assert counts["largest lung area below zero"] == 12
    assert counts["brightest voxel above 4095"] == 94
    assert ids["feature is the same for everybody"] == ("Minimum",)
    assert ids["TotalEnergy only repeats Energy"] == ("TotalEnergy",)


def test_check_finds_planted_faults() -> None:
    patients, features = cohort.load_cohort("phantom"), cohort.load_features("phantom")
    geometry = cohort.load_geometry("phantom")
    train, test = cohort.split(patients)
    features.loc[test[0]] = features.loc[train[0]]
    features.loc[train[1], "Mean"] = np.inf
    geometry.loc[train[2], "max_slice_area"] = -1
    positive = patients.index[patients["nat"] == 1][0]
    patients.loc[positive, "severity"] = 0
    found = cohort.check(patients, features, geometry).set_index("finding")["ids"]
    assert set(found["patients sharing all features to the last bit"]) == {test[0], train[0]}
    assert found["test patients whose scan is in training"] == (test[0],)
    assert found["features missing or infinite"] == (train[1],)
    assert found["largest lung area below zero"] == (train[2],)
    assert found["severity 0 but NAT positive, or the reverse"] == (positive,)
    assert found["severity does not match morbidity"] == (positive,)


def test_identical_scans_come_in_groups() -> None:
    table = pd.DataFrame({"a": [1.0, 2, 1, 1.0000001], "b": [0.0, 0, 0, 0]}, index=[9, 8, 7, 6])
    assert cohort.identical_scans(table) == [(7, 9)]
    assert cohort.identical_scans(table, decimals=6) == [(6, 7, 9)]


@pytest.mark.usefixtures("released")
def test_missing_patients_are_as_the_errata_say() -> None:
    source = cohort.load_source_cohort()
    left_out = source[~source["enrolled"]]
    assert (len(source), len(left_out), source["segmentation_failed"].sum()) == (1521, 192, 11)
    assert (left_out["morbidity"] == "Critically ill").sum() == 38
    assert (source["morbidity"] == "Critically ill").sum() == 72
