"""Figures of tasks: score against context length, and score by length and depth of the needle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.figures import COLOURS, MARKERS, length_name, plain_label


def save_score_by_length(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Save one curve per method: the mean score at each context length.

    Args:
        curves: method -> context length -> score in [0, 100].
        path: the file.
    """
    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths = sorted({length for points in curves.values() for length in points})
    for number, (label, points) in enumerate(curves.items()):
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            label=plain_label(label),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_name(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("score")
    axes.set_title("Score by context length", loc="left", fontsize="medium")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def save_needle_map(grid: np.ndarray, lengths: Sequence[int], path: Path, *, title: str) -> None:
    """Save a heat map of scores.

    Args:
        grid: scores in [0, 100], ``[depth bins, lengths]``, NaN where nothing was measured.
        lengths: context lengths of the columns.
        path: the file.
        title: of the figure.
    """
    figure = Figure(figsize=(1.6 + 0.9 * len(lengths), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(grid), vmin=0, vmax=100, cmap="viridis", aspect="auto")
    bins = len(grid)
    axes.set_xticks(range(len(lengths)), [length_name(length) for length in lengths])
    axes.set_yticks(range(bins), [f"{100 * row // bins}" for row in range(bins)])
    for row, column in np.argwhere(~np.isnan(grid)):
        value = grid[row, column]
        colour = "black" if value > 60 else "white"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize="x-small", color=colour)
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("depth of the needle (%, from)")
    axes.set_title(plain_label(title), loc="left", fontsize="medium")
    figure.colorbar(image, ax=axes, label="score")
    figure.savefig(path, dpi=150)
