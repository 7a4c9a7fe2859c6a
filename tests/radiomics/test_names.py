import pandas as pd
import pytest

from covidmtl_core import fetch
from covidmtl_core.radiomics import names


def test_count_is_the_papers() -> None:
    parts = [names.FIRST_ORDER, names.GLCM, names.GLRLM, names.GLSZM, names.WAVELET_GLCM]
    assert [len(part) for part in parts] == [18, 24, 16, 16, 22]
    assert len(set(names.GLRLM) & set(names.GLSZM)) == 3
    assert len(names.FEATURE_NAMES) == len(set(names.FEATURE_NAMES)) == 375


def test_named_features_exist() -> None:
    assert set(names.TABLE_5_FEATURES) <= set(names.FEATURE_NAMES)
    assert set(names.FIGURE_8_FEATURES) <= set(names.TABLE_5_FEATURES)


@pytest.mark.usefixtures("released")
def test_table_5_features_are_the_released_ones() -> None:
    columns = pd.read_excel(fetch.fetch("top-features")).columns
    assert tuple(columns[2:26]) == names.TABLE_5_FEATURES
