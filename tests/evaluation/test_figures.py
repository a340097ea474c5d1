"""Figures: what is drawn is what was measured."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation.figures import (
    draw_loss_by_position,
    draw_perplexity_by_length,
    length_name,
    position_curve,
    save_comparison,
    save_loss_by_position,
    save_perplexity_by_length,
)
from evaluation.positions import position_report


def report(length, perplexity):
    losses = np.linspace(6, 4, length)
    return {"perplexity": perplexity, "loss": np.log(perplexity)} | position_report(losses * 3, np.full(length, 3))


RESULTS = {
    "drt": {512: report(512, 20.0), 2048: report(2048, 15.0)},
    "window": {512: report(512, 21.0), 2048: report(2048, 19.0)},
}


def test_curves_hold_the_numbers_and_axes_have_units():
    axes = Figure().add_subplot()
    draw_perplexity_by_length(axes, RESULTS)
    assert [list(line.get_ydata()) for line in axes.lines] == [[20.0, 15.0], [21.0, 19.0]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[512, 2048]] * 2
    assert axes.get_xlabel() == "context length (tokens)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["drt", "window"]
    assert len({line.get_color() for line in axes.lines}) == 2
    assert len({line.get_marker() for line in axes.lines}) == 2


def test_position_curve_is_the_mean_of_each_bucket():
    x, y = position_curve({"position_edges": [0, 1, 4], "position_counts": [2, 6], "position_nll_sum": [8.0, 18.0]})
    np.testing.assert_allclose(x, [1, np.sqrt(2 * 4)])
    np.testing.assert_allclose(y, [4, 3])
    x, _ = position_curve({"position_edges": [0, 1, 4], "position_counts": [0, 6], "position_nll_sum": [0.0, 18.0]})
    assert len(x) == 1


def test_loss_by_position_uses_the_longest_length_and_says_so():
    axes = Figure().add_subplot()
    draw_loss_by_position(axes, {"drt": RESULTS["drt"], "short": {512: RESULTS["window"][512]}})
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["drt (2K)", "short (512)"]
    assert max(axes.lines[0].get_xdata()) > 1024 > max(axes.lines[1].get_xdata())


@pytest.mark.parametrize("save", [save_perplexity_by_length, save_loss_by_position, save_comparison])
def test_files_are_written_without_touching_global_state(tmp_path, save):
    before = mpl.rcParams.copy()
    save(RESULTS, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert mpl.rcParams.copy() == before


@pytest.mark.parametrize(("length", "name"), [(512, "512"), (1024, "1K"), (1500, "1500"), (16384, "16K")])
def test_length_names(length, name):
    assert length_name(length) == name


@pytest.mark.parametrize("label", ["a $\\frac$ b", "_run"])
def test_any_label_is_shown_as_it_is(label, tmp_path):
    results = {label: RESULTS["drt"]}
    save_comparison(results, tmp_path / "figure.png")
    axes = Figure().add_subplot()
    draw_loss_by_position(axes, results)
    assert [text.get_text().replace("\\$", "$").strip() for text in axes.get_legend().get_texts()] == [label]
