"""Draw the newest rows of every benchmark group against their targets: `python -m benchmarks.figures [GROUP ...]`.

One picture a group, benchmarks/figures/GROUP.png: a bar a row, the ratio divided by its target on a logarithmic axis,
so that a bar right of 1 has reached its target whether large or small ratios are wanted (bars end at 8).
"""

import csv
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent / "figures"
REACHED, MISSED = "#4c78a8", "#e4a13c"
RUN, COMPARISON = ("date", "commit", "machine"), ("case", "shape", "measure", "peer")
FARTHEST = 8.0


def newest(path: Path) -> list[dict[str, str]]:
    """Return the rows of the last run of each case of a file; none if the file holds no comparisons."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if not {*RUN, *COMPARISON, "ratio", "target"} <= set(reader.fieldnames or ()):
            return []
        rows = list(reader)
    last = {row["case"]: [row[name] for name in RUN] for row in rows}
    current = [row for row in rows if [row[name] for name in RUN] == last[row["case"]]]
    return list({tuple(row[name] for name in COMPARISON): row for row in current}.values())


def reach(row: dict[str, str]) -> float:
    """Return how far a row reaches its target; 1 = just there, more is better."""
    relation, target = row["target"].split()
    ratio = float(row["ratio"]) / float(target)
    return ratio if relation == ">=" else 1.0 / ratio


def draw(group: str, rows: list[dict[str, str]], path: Path) -> None:
    """Save the picture of a group."""
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    reached = [min(FARTHEST, max(1 / FARTHEST, reach(row))) for row in rows]
    colours = [REACHED if value >= 1 else MISSED for value in reached]
    axes.barh(range(len(rows)), [value - 1 for value in reached], left=1, color=colours, height=0.6)
    for place, (row, value) in enumerate(zip(rows, reached, strict=True)):
        text = f" {row['ratio']} ({row['target']}) "
        axes.annotate(text, (value, place), va="center", ha="left" if value >= 1 else "right", fontsize="small")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *reached) / 2.5, 2 * FARTHEST)
    ticks = [tick for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8) if tick >= axes.get_xlim()[0]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("ratio / target; reached right of 1")
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    axes.set_title(f"{group}: {machines}, newest of {max(row['date'] for row in rows)}", loc="left", fontsize="medium")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=90)


def _label(row: dict[str, str]) -> str:
    what = row["measure"].removesuffix(", CPU s").removesuffix(", GPU s")
    return f"{row['case']}  {what}\nagainst {row['peer']}; {row['shape']}"


def main(groups: list[str]) -> int:
    """Draw the groups, or all; returns 2 on a name without rows."""
    found = {path.stem: rows for path in sorted(RESULTS.glob("*.csv")) if (rows := newest(path))}
    unknown = sorted(set(groups) - set(found))
    if unknown:
        print(f"no rows of {', '.join(unknown)}; there are {', '.join(found)}", file=sys.stderr)
        return 2
    FIGURES.mkdir(exist_ok=True)
    for group, rows in found.items():
        if not groups or group in groups:
            draw(group, rows, FIGURES / f"{group}.png")
            print(f"benchmarks/figures/{group}.png: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
