"""What is written of needles: rows by length and depth, metrics, the answers, a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.passkey.figure import save_needle_map
from evaluation.passkey.haystack import summary
from evaluation.results import csv_text, json_text, text_table, write_json, write_text

SHARES = ("exact_match", "teacher_forced", "scored_token", "first_token", "last_token")
COLUMNS = ("model", "length", "num_tokens", "depth", "num_samples", *SHARES)
SHOWN = ("model", "length", "num_samples", "exact_match", "scored_token", "tokens_per_second", "peak_memory_mib")


def length_rows(
    found: Mapping[tuple[Any, ...], dict[str, Any]],
    lengths: Mapping[int, int],
    depths: Sequence[float] | None,
    wanted: Sequence[tuple[int, int]],
) -> list[dict[str, Any]]:
    """Return one row for each length, with one for each depth of the grid inside.

    Args:
        found: answers of a model by (length, index).
        lengths: tokens that were used for each length.
        depths: the grid; None: places were drawn.
        wanted: which answers count.
    """
    rows = []
    for length, num_tokens in lengths.items():
        answers = [found[key] for key in wanted if key[0] == length]
        peaks = [answer["peak_memory_bytes"] for answer in answers if answer["peak_memory_bytes"]]
        row = {"length": length, "num_tokens": num_tokens, "depth": None} | summary(answers)
        row["tokens_per_second"] = num_tokens * len(answers) / sum(answer["seconds"] for answer in answers)
        row["peak_memory_mib"] = max(peaks) / 2**20 if peaks else None
        by_depth = [
            {"depth": depth} | summary([answer for answer in answers if answer["depth"] == depth])
            for depth in depths or []
        ]
        rows.append(row | {"by_depth": by_depth})
    return rows


def publish(
    metrics: dict[str, Any], answers: Sequence[Mapping[str, Any]], output: Path, *, kind: str, remarks: Sequence[str]
) -> dict[str, Any]:
    """Write everything made of the answers; return the metrics with the table as text."""
    rows = metrics["results"]
    write_text(output / "predictions.jsonl", "".join(json_text(answer) + "\n" for answer in answers))
    write_json(output / "metrics.json", metrics)
    cells = [row | cell for row in rows for cell in row["by_depth"] or [{}]]
    write_text(output / "passkey.csv", csv_text(cells, COLUMNS))
    save_needle_map(rows, output / "passkey.png", title=f"Needle ({kind}): exact match of the answer")
    return metrics | {"table": "\n".join([text_table(rows, SHOWN), *remarks])}
