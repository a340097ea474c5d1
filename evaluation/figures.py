"""Figures of results: perplexity against context length, loss against position in the context.

Notable: figures are built without pyplot, so nothing global (backend, current figure, style) is touched. Colours are
Okabe and Ito's, told apart by colour-blind readers too, and every curve has its own marker.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Reports of a model by context length; a report holds `perplexity`, `loss` and the `position_*` entries.
Reports = Mapping[int, Mapping[str, Any]]


def save_perplexity_by_length(results: Mapping[str, Reports], path: Path) -> None:
    """Save one curve per model: perplexity at each context length."""
    figure, (axes,) = _figure(1)
    draw_perplexity_by_length(axes, results)
    figure.savefig(path, dpi=150)


def save_loss_by_position(results: Mapping[str, Reports], path: Path) -> None:
    """Save one curve per model: the loss by position at its longest context length."""
    figure, (axes,) = _figure(1)
    draw_loss_by_position(axes, results)
    figure.savefig(path, dpi=150)


def save_comparison(results: Mapping[str, Reports], path: Path) -> None:
    """Save both panels side by side."""
    figure, (left, right) = _figure(2)
    draw_loss_by_position(left, results)
    draw_perplexity_by_length(right, results)
    figure.savefig(path, dpi=150)


def draw_perplexity_by_length(axes: Axes, results: Mapping[str, Reports]) -> None:
    """Draw perplexity over context length, one curve per model."""
    lengths = sorted({length for reports in results.values() for length in reports})
    values = [float(report["perplexity"]) for reports in results.values() for report in reports.values()]
    for i, (label, reports) in enumerate(results.items()):
        points = sorted((length, float(report["perplexity"])) for length, report in reports.items())
        axes.plot(*zip(*points, strict=True), label=plain_label(label), **_look(i, markersize=6))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_name(length) for length in lengths])
    axes.minorticks_off()
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity per token")
    axes.set_title("Perplexity by context length, same targets", loc="left", fontsize="medium")
    axes.legend(frameon=False)


def draw_loss_by_position(axes: Axes, results: Mapping[str, Reports]) -> None:
    """Draw the loss over the number of context tokens, one curve per model, each at its longest length."""
    longest = 0
    for i, (label, reports) in enumerate(results.items()):
        length = max(reports)
        longest = max(longest, length)
        x, y = position_curve(reports[length])
        name = label if len({max(r) for r in results.values()}) == 1 else f"{label} ({length_name(length)})"
        axes.plot(x, y, label=plain_label(name), **_look(i, markersize=3.5))
    ticks = [2**power for power in range(longest.bit_length() + 1) if 2**power <= longest]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks[:: 1 + len(ticks) // 9], [length_name(tick) for tick in ticks[:: 1 + len(ticks) // 9]])
    axes.minorticks_off()
    axes.set_xlabel("context before the target (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss by position, windows of {longest:,} tokens", loc="left", fontsize="medium")
    axes.legend(frameon=False)


def position_curve(report: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return context lengths (geometric middle of each bucket) and mean losses, empty buckets left out."""
    edges = np.asarray(report["position_edges"], dtype=np.float64)
    counts = np.asarray(report["position_counts"], dtype=np.float64)
    sums = np.asarray(report["position_nll_sum"], dtype=np.float64)
    # Position p has p + 1 tokens of context: bucket [a, b) covers contexts a + 1 .. b.
    middle = np.sqrt((edges[:-1] + 1) * edges[1:])
    filled = counts > 0
    return middle[filled], sums[filled] / counts[filled]


def plain_label(label: str) -> str:
    """Return a legend entry that reads as ``label``: no formula between dollars, not hidden by a first underscore."""
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def length_name(length: int) -> str:
    """Return 512 as 512, 16384 as 16K and 1048576 as 1M."""
    if length >= 1 << 20 and length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(6.2 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for panel in axes:
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _look(index: int, markersize: float) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": markersize,
        "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3],
        "linewidth": 1.6,
    }
