"""The slider that needs no kernel; a browser moves it in tests/browser."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from covidmtl_core import style


def test_scrubber_holds_every_picture_and_shows_the_middle_one() -> None:
    figures = [plt.figure(figsize=(1, 1)) for _ in range(3)]
    shown = style.scrubber(figures, ["one", "two & more", "three"], 'a "map"').data
    assert shown.count("data:image/webp;base64,") == 3 and 'max="2"' in shown
    assert shown.count("display:block") == 1 and "<output>two &amp; more</output>" in shown
    assert "a &quot;map&quot;" in shown
    assert not any(plt.fignum_exists(figure.number) for figure in figures)


def test_scrubber_wants_a_label_for_each_picture() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        style.scrubber([plt.figure(), plt.figure()], ["one"], "alt")
    with pytest.raises(ValueError, match="at least one"):
        style.scrubber([], [], "alt")


def test_a_figure_to_turn_is_a_frame_with_a_way_to_plotly() -> None:
    import plotly.graph_objects as go

    shown = style.turnable(go.Figure(go.Scatter(y=[1, 2])), 300, "A line").data
    assert "vendor/plotly.min.js" in shown and "https://cdn.plot.ly/plotly-" in shown
    assert 'title="A line"' in shown and len(shown) < 50_000


def test_surfaces_of_both_lungs_lie_where_the_lungs_lie_in_mm() -> None:
    labels = np.zeros((20, 30, 40), np.uint8)
    labels[4:16, 5:25, 3:15], labels[4:16, 5:25, 25:37] = 1, 2
    right, left = style.lung_surfaces(labels, 2.0, step_mm=2.0).data
    assert (right.name, left.name) == ("right lung", "left lung")
    padding = 3 * 2.0
    for surface, (low, high) in ((right, (3, 15)), (left, (25, 37))):
        x = np.asarray(surface.x) - padding
        assert x.min() == pytest.approx(2.0 * low - 1, abs=2)
        assert x.max() == pytest.approx(2.0 * high - 1, abs=2)
    assert len(style.lung_surfaces(np.where(labels == 1, labels, 0), 2.0).data) == 1


def test_outlines_are_drawn_for_masks_that_hold_something() -> None:
    figure, ax = plt.subplots()
    plane, mask = np.zeros((10, 10)), np.zeros((10, 10), bool)
    style.outline(ax, plane, [("blue", mask)])
    assert len(ax.collections) == 0
    mask[2:8, 2:8] = True
    style.outline(ax, plane, [("blue", mask)])
    assert len(ax.collections) == 1
    plt.close(figure)
