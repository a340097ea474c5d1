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


def write_report(output: Path) -> dict[str, Any]:
    """Gather the finished tasks of all methods under a folder; write table, rows and figures; return them.

    Files: ``metrics.json``, ``rows.csv``, ``table.md``, ``score_by_length.png``, ``needle_<label>.png``.
    """
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
    """Return by method and length the mean score, seconds per example and the peak memory."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["length"] or 0].append(row)
    table = []
    for (label, length), members in sorted(groups.items()):
        prefill = [row["prefill_seconds_per_example"] for row in members]
        forced = [row["answer_nll"] for row in members]
        peaks = [row["peak_bytes"] for row in members if row["peak_bytes"] is not None]
        table.append(
            {
                "method": label,
                "length": length or None,
                "score": sum(row["score"] for row in members) / len(members),
                "answer_nll": None if None in forced else sum(forced) / len(members),
                "prefill_seconds": None if None in prefill else sum(prefill) / len(members),
                "seconds": sum(row["seconds_per_example"] for row in members) / len(members),
                "peak_mib": max(peaks) // 2**20 if peaks else None,
            }
        )
    return table


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
