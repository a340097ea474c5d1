"""Figure of a sweep: perplexity against the ratio that was achieved, one curve per method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.figures import COLOURS, MARKERS


def compression_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float]]]:
    """Return (achieved ratio, perplexity, nominal ratio) by method, means over seeds; dense starts every curve."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    curves = {}
    for method in [name for name in methods if name != "dense"] or methods:
        mine = [row for row in rows if row["method"] in (method, "dense")]
        points = []
        for ratio in sorted({row["nominal_ratio"] for row in mine}):
            cells = [row for row in mine if row["nominal_ratio"] == ratio]
            means = [sum(row[key] for row in cells) / len(cells) for key in ("achieved_ratio", "perplexity")]
            points.append((means[0], means[1], ratio))
        curves[method] = points
    return curves


Curve = Sequence[tuple[float, float, float]]


def _plot(axes: Axes, method: str, points: Curve, index: int) -> None:
    """Draw the finite part of a curve; its name says where the rest was."""
    finite = [point for point in points if math.isfinite(point[1])]
    lost = ", ".join(str(point[2]) for point in points if not math.isfinite(point[1]))
    label = f"{method} (infinite at {lost})" if lost else method
    axes.plot([point[0] for point in finite], [point[1] for point in finite], label=label, **_look(index))


def _draw_perplexity(axes: Axes, curves: Mapping[str, Curve], reference: Mapping[str, Any]) -> None:
    for index, (method, points) in enumerate(curves.items()):
        _plot(axes, method, points, index)
        for achieved, value, nominal in points:
            if abs(achieved - nominal) > 0.005 and math.isfinite(value):
                axes.annotate(f"nominal {nominal}", (achieved, value), fontsize="x-small")
    for index, (label, pairs) in enumerate(reference.items()):
        look: dict[str, Any] = {"color": COLOURS[index % len(COLOURS)], "linestyle": "--", "linewidth": 1}
        axes.plot([pair[0] for pair in pairs], [pair[1] for pair in pairs], label=label, **look)
    if _spread(axes) > 10:
        axes.set_yscale("log")
    axes.set_ylabel("perplexity per original token")


def _draw_excess(axes: Axes, curves: Mapping[str, Curve], dense: float) -> None:
    """Draw what a method loses against the dense model: differences that vanish beside the worst method's."""
    for index, (method, points) in enumerate(curves.items()):
        removed = [(achieved, math.log(value / dense), nominal) for achieved, value, nominal in points if nominal]
        _plot(axes, method, removed, index)
    wide = _spread(axes) > 10
    axes.axhline(0, color="0.5", linewidth=1, linestyle=":")
    if wide:
        axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylabel(f"loss above dense (nats{', linear within 0.001' * wide})")


def _spread(axes: Axes) -> float:
    """How many times the smallest drawn value the greatest is, without their signs; 1 without values."""
    sizes = [abs(float(value)) for line in axes.lines for value in np.asarray(line.get_ydata())]
    return max(sizes, default=1) / max(min(sizes, default=1), 1e-12)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def save_compression_figure(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    reference: Mapping[str, Sequence[Sequence[float]]],
    title: str = "Same targets for all methods and ratios",
) -> None:
    """Save ``figure.png`` and ``figure.svg``.

    Args:
        rows: cells, each with ``method``, ``nominal_ratio``, ``achieved_ratio`` and ``perplexity``.
        folder: where to.
        reference: further curves by label, pairs of ratio and perplexity, dashed.
        title: above the axes.
    """
    curves = compression_curves(rows)
    dense = next((points[0][1] for points in curves.values() if points[0][2] == 0), None)
    dense = dense if dense is not None and math.isfinite(dense) else None
    figure = Figure(figsize=(7 if dense is None else 11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 if dense is None else 2, squeeze=False)[0]
    _draw_perplexity(axes[0], curves, reference)
    if dense is not None:
        axes[0].axhline(dense, color="0.5", linewidth=1, linestyle=":", label="dense")
        _draw_excess(axes[1], curves, dense)
    axes[0].legend(frameon=False)
    axes[0].set_title(title, loc="left", fontsize="medium")
    for panel in axes:
        panel.set_xlabel("cache entries removed (achieved fraction)")
    for ending in ("png", "svg"):
        figure.savefig(folder / f"figure.{ending}", dpi=150)


# What is drawn of generated texts, and what is better.
GENERATION_PANELS = (
    ("rougeL", "ROUGE-L (higher is better)"),
    ("bertscore_f1", "BERTScore F1 (higher is better)"),
    ("judge_perplexity_mean_text", "perplexity of the judge (lower is better)"),
    ("distinct_2", "distinct 2-grams"),
    ("repetition", "repeated 4-grams (lower is better)"),
)


def save_generation_figure(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Save ``figure.png`` and ``figure.svg``: a panel for each score, against the ratio that was achieved.

    Args:
        rows: cells, each with ``method``, ``nominal_ratio``, ``achieved_ratio`` and scores.
        folder: where to.
    """
    panels = [(name, label) for name, label in GENERATION_PANELS if all(row.get(name) is not None for row in rows)]
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        scores = [{**row, "perplexity": row[name]} for row in rows]
        for index, (method, points) in enumerate(compression_curves(scores).items()):
            _plot(axes, method, points, index)
        if axes is figure.axes[0] or not all(math.isfinite(row[name]) for row in rows):
            axes.legend(frameon=False, fontsize="small")
        axes.set_xlabel("cache entries removed")
        axes.set_title(label, loc="left", fontsize="medium")
    for ending in ("png", "svg"):
        figure.savefig(folder / f"figure.{ending}", dpi=150)
