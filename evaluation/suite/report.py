"""What the task recipes report: every method found in a folder, as rows, as a table and as figures."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.results import csv_text, read_json, text_table, write_json, write_text
from evaluation.suite.figures import save_needle_map, save_score_by_length

COLUMNS = (
    "method",
    "task",
    "length",
    "num_examples",
    "score",
    "answer_nll",
    "seconds_per_example",
    "prefill_seconds_per_example",
    "peak_bytes",
)
DEPTH_BINS = 10
# Folders of a set with ParallelComp's prompts, and what they would be without.
_PROMPTS_OF = ("_parallelcomp_", "_")


def write_report(output: Path) -> dict[str, Any]:
    """Gather the finished tasks of all methods under a folder; write table, rows and figures; return them.

    Files: ``metrics.json``, ``rows.csv``, ``table.md``, ``score_by_length.png``, ``needle_<label>.png``.
    """
    for folder in sorted({file.parent.parent for file in output.glob("*/*/metrics.json")}):
        check_sets(folder)
    rows, answers = [], {}
    for file in sorted(output.glob("*/*/metrics.json")):
        metrics, label = read_json(file), file.parent.parent.name
        length = _length(file.parent.name, metrics["task"])
        rows.append(_row(label, length, metrics))
        answers[label, metrics["task"], length] = _read_answers(file.with_name("predictions.jsonl"))
    report: dict[str, Any] = {"results": rows}
    write_json(output / "metrics.json", report)
    write_text(output / "rows.csv", csv_text(rows, COLUMNS))
    table, columns = score_table(rows)
    write_text(output / "table.md", _markdown(table, columns) + "\n" + _markdown(cost_table(rows), COST_COLUMNS))
    _draw(answers, output)
    text = text_table(table, columns) + "\n\n" + text_table(cost_table(rows), COST_COLUMNS)
    return report | {"table": text}


def check_sets(folder: Path, planned: Sequence[str] = ()) -> None:
    """Refuse a set with two kinds of prompts in one column, where one would stand for both.

    Args:
        folder: of the column.
        planned: folders of cells in it, besides those that are there.

    Raises:
        ValueError: naming both.
    """
    there = [file.parent.name for file in folder.glob("*/settings.json")]
    first: dict[str, str] = {}
    for name in sorted({*there, *planned}):
        other = first.setdefault(name.replace(*_PROMPTS_OF), name)
        if other != name:
            raise ValueError(f"{folder} would hold {other} and {name}, one set with two prompts: pass another label")


def _row(label: str, length: int | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
    count = metrics["num_examples"]
    prefill = metrics["prefill_seconds"]
    return {
        "method": label,
        # Sets are compared, whosever prompts a method has.
        "task": metrics["task"].replace("_parallelcomp/", "/"),
        "length": length,
        "num_examples": count,
        "score": 100 * metrics["score"],
        "answer_nll": metrics["scores"].get("answer_nll"),
        "scores": metrics["scores"],
        "seconds_per_example": metrics["seconds"] / count,
        "prefill_seconds_per_example": None if prefill is None else prefill / count,
        "peak_bytes": metrics["peak_bytes"],
        "protocol": metrics["protocol"],
    }


def _length(folder: str, task: str) -> int | None:
    tail = folder.removeprefix(task.replace("/", "_")).lstrip("_")
    return int(tail) if tail.isdigit() else None


def score_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return scores x 100 by task (and length) with a column per method, their mean over what all of them have last."""
    labels = list(dict.fromkeys(row["method"] for row in rows))
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["task"], row["length"] or 0)
        cells.setdefault(key, {"task": row["task"], "length": row["length"]})[row["method"]] = round(row["score"], 2)
    table = [cells[key] for key in sorted(cells)]
    shared = [cell for cell in table if all(label in cell for label in labels)]
    if len(shared) > 1:
        mean = {label: round(sum(cell[label] for cell in shared) / len(shared), 2) for label in labels}
        table.append({"task": f"mean of {len(shared)}", "length": None} | mean)
    with_length = any(row["length"] for row in rows)
    return table, ["task", *(["length"] if with_length else []), *labels]


COST_COLUMNS = ("method", "length", "score", "answer_nll", "prefill_seconds", "seconds", "peak_mib")


def cost_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what examples cost by method and length, and the score beside it.

    Seconds and NLL are means over examples, whatever set they belong to; the score is the mean over sets, as in
    `score_table`.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["length"] or 0].append(row)
    table = []
    for (label, length), members in sorted(groups.items()):
        peaks = [row["peak_bytes"] for row in members if row["peak_bytes"] is not None]
        table.append(
            {
                "method": label,
                "length": length or None,
                "score": math.fsum(row["score"] for row in members) / len(members),
                "answer_nll": _mean_over_examples(members, "answer_nll"),
                "prefill_seconds": _mean_over_examples(members, "prefill_seconds_per_example"),
                "seconds": _mean_over_examples(members, "seconds_per_example"),
                "peak_mib": max(peaks) // 2**20 if peaks else None,
            }
        )
    return table


def _mean_over_examples(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a column of means, each with the weight of its examples; None where one is missing."""
    if any(row[name] is None for row in rows):
        return None
    return math.fsum(row[name] * row["num_examples"] for row in rows) / sum(row["num_examples"] for row in rows)


def _markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column) for column in columns)
        lines.append(["" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v) for v in values])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _read_answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _draw(answers: Mapping[tuple[str, str, int | None], Sequence[Mapping[str, Any]]], output: Path) -> None:
    """Draw the score against the length, and for each method the score by length and depth of the needle."""
    curves: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    maps: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for (label, _, length), lines in answers.items():
        for line in lines:
            place = length or _bucket(line["num_context_tokens"])
            curves[label][place].append(line["scores"]["score"])
            if "depth" in line:
                maps[label][place, min(DEPTH_BINS - 1, int(line["depth"] * DEPTH_BINS))].append(line["scores"]["score"])
    means = {label: {at: 100 * float(np.mean(v)) for at, v in points.items()} for label, points in curves.items()}
    save_score_by_length(means, output / "score_by_length.png")
    for label, cells in maps.items():
        lengths = sorted({length for length, _ in cells})
        grid = np.full((DEPTH_BINS, len(lengths)), math.nan)
        for (length, depth), values in cells.items():
            grid[depth, lengths.index(length)] = 100 * float(np.mean(values))
        save_needle_map(grid, lengths, output / f"needle_{label}.png", title=label)


def _bucket(num_tokens: int) -> int:
    """Return the power of two that a context of so many tokens fits in."""
    return 1 << max(0, num_tokens - 1).bit_length()
