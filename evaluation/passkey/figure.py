"""The needle figure: exact match by length and depth, one panel a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.figures import length_name, plain_label

# Dark blue is found, pale is lost: told apart in grey, too.
COLOURS = "Blues"


def save_needle_map(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Save a heat map of exact match: lengths to the right, depths downwards; without a grid of depths one line.

    Args:
        rows: results with ``model``, ``length``, ``exact_match`` and ``by_depth``.
        path: the PNG file.
        title: of the figure.
    """
    labels = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = [cell["depth"] for cell in rows[0]["by_depth"]] or [None]
    height = 1.7 + 0.36 * len(depths)
    # Wide enough for the title, however few the lengths.
    width = max((1.6 + 0.62 * len(lengths)) * len(labels), 0.6 + 0.085 * len(title))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for number, label in enumerate(labels):
        axes = figure.add_subplot(1, len(labels), number + 1)
        values = cells([row for row in rows if row["model"] == label], lengths, depths)
        axes.imshow(values, vmin=0, vmax=1, cmap=COLOURS, aspect="auto")
        for (line, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                shade = "white" if value > 0.6 else "black"
                axes.text(column, line, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=8)
        axes.set_xticks(range(len(lengths)), [length_name(length) for length in lengths], rotation=45, fontsize=8)
        names = ["drawn" if depth is None else f"{100 * depth:.0f} %" for depth in depths]
        axes.set_yticks(range(len(depths)), names, fontsize=8)
        axes.set_xlabel("context (tokens)")
        if number == 0:
            axes.set_ylabel("depth of the needle")
        axes.set_title(plain_label(label), loc="left", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def cells(
    rows: Sequence[Mapping[str, Any]], lengths: Sequence[int], depths: Sequence[float | None]
) -> np.ndarray[Any, Any]:
    """Return exact match by depth and length, NaN where nothing was measured."""
    values = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        for cell in row["by_depth"] or [{"depth": None, "exact_match": row["exact_match"]}]:
            values[depths.index(cell["depth"]), lengths.index(row["length"])] = cell["exact_match"]
    return values
