import numpy as np

from covidmtl_core.boxes import bounds


def test_the_box_holds_the_mask_and_no_more() -> None:
    mask = np.zeros((6, 7, 8), bool)
    mask[2, 3, 4] = mask[4, 3, 6] = True
    assert bounds(mask) == (slice(2, 5), slice(3, 4), slice(4, 7))
    assert bounds(mask, (1, 0, 9)) == (slice(1, 6), slice(3, 4), slice(0, 8))


def test_an_empty_mask_has_an_empty_box() -> None:
    assert np.zeros((4, 5))[bounds(np.zeros((4, 5), bool), 3)].size == 0
