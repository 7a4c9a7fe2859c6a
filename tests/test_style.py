"""The slider that needs no kernel; a browser moves it in tests/browser."""

import pytest
from matplotlib import pyplot as plt

from covidmtl_core import style


def test_scrubber_holds_every_picture_and_shows_the_middle_one() -> None:
    figures = [plt.figure(figsize=(1, 1)) for _ in range(3)]
    shown = style.scrubber(figures, ["one", "two & more", "three"], 'a "map"').data
    assert shown.count("data:image/png;base64,") == 3 and 'max="2"' in shown
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
