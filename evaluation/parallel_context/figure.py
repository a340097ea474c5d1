"""Figure of a sweep over parallel contexts: perplexity and entropy by degree, and one against the other.

Notable: it is drawn from ``rows.csv`` and nothing else, so that a table can be cut or joined and drawn again:
``python -c "from evaluation.parallel_context.figure import redraw; redraw('FOLDER')"``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.figures import COLOURS, MARKERS, length_name, plain_label

LINES = ("-", "--", ":", "-.")
# What tells lines apart, and how a line is called where rows differ in it.
NAMES = {"model": "{}", "data": "{}", "length": "{}", "prefix": "prefix {}", "selection": "selection {}"}


def redraw(folder: str | Path) -> None:
    """Draw ``figure.png`` and ``figure.pdf`` from the ``rows.csv`` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has no rows, or not these columns.
    """
    path = Path(folder) / "rows.csv"
    if not path.is_file():
        raise FileNotFoundError(f"no rows.csv in {folder}: name the folder of a sweep")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in (*NAMES, "degree", "perplexity", "entropy") if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path} has no rows with {', '.join(missing)}: it is not that of a sweep")
    save_parallel_figure(rows, Path(folder))


def parallel_curves(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[tuple[int, float, float]]]:
    """Return (degree, perplexity, entropy) by degree, for each (model, data, length, prefix, selection)."""
    curves: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
    for row in rows:
        point = (int(row["degree"]), float(row["perplexity"]), float(row["entropy"]))
        curves.setdefault(tuple(str(row[name]) for name in NAMES), []).append(point)
    return {names: sorted(points) for names, points in curves.items()}


def save_parallel_figure(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Save three panels: perplexity and entropy against the degree, entropy against perplexity.

    A line is one length and setting: colour and marker tell the setting, the kind of line the length.
    """
    curves = parallel_curves(rows)
    columns = list(zip(*curves, strict=True))
    varied = [index for index, values in enumerate(columns) if len(set(values)) > 1]
    length_at = list(NAMES).index("length")
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, 3, number) for number in (1, 2, 3)]
    settings = list(dict.fromkeys(_without_length(names, length_at) for names in curves))
    lengths = sorted(set(columns[length_at]), key=int)
    for names, points in curves.items():
        number = settings.index(_without_length(names, length_at))
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
            "linestyle": LINES[lengths.index(names[length_at]) % len(LINES)],
            "markersize": 4.5,
            "linewidth": 1.4,
            "label": plain_label(_label(names, varied)),
        }
        degrees, perplexities, entropies = zip(*points, strict=True)
        for panel, x, y in zip(
            axes, (degrees, degrees, perplexities), (perplexities, entropies, entropies), strict=True
        ):
            panel.plot(x, y, **look)
    _name_axes(axes, sorted({point[0] for points in curves.values() for point in points}))
    if varied:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    for ending in ("png", "pdf"):
        figure.savefig(folder / f"figure.{ending}", dpi=150)


def _name_axes(axes: Sequence[Axes], degrees: Sequence[int]) -> None:
    titles = ("Perplexity by degree", "Attention entropy by degree", "Entropy against perplexity")
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, loc="left", fontsize="medium")
        panel.grid(True, color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[:2]:
        panel.set_xscale("log", base=2)
        panel.set_xticks(degrees, [str(degree) for degree in degrees])
        panel.minorticks_off()
        panel.set_xlabel("degree (pieces of the context)")
    axes[0].set_ylabel("perplexity of the tail")
    axes[1].set_ylabel("entropy (nats)")
    axes[2].set_xlabel("perplexity of the tail")
    axes[2].set_ylabel("entropy (nats)")


def _without_length(names: tuple[str, ...], length_at: int) -> tuple[str, ...]:
    return names[:length_at] + names[length_at + 1 :]


def _label(names: tuple[str, ...], varied: Sequence[int]) -> str:
    """Name a line by what the rows differ in."""
    shown = []
    for index in varied:
        column, value = list(NAMES)[index], names[index]
        text = length_name(int(value)) if column == "length" else value.replace("\n", "\\n")
        shown.append(NAMES[column].format(text))
    return ", ".join(shown) or "all"
