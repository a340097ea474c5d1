"""What is written of perplexities: metrics, rows, the sum of each window, figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.figures import save_comparison, save_loss_by_position, save_perplexity_by_length
from evaluation.results import csv_text, json_text, text_table, write_json, write_text

SHOWN = ("model", "length", "num_targets", "loss", "perplexity", "bits_per_byte")
PUBLISHED = "published_mean_loss"
COLUMNS = (*SHOWN, "stride", "nll_sum", PUBLISHED, "seconds", "peak_memory_bytes")


def publish(metrics: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write everything made of the results; return the metrics with the table as text."""
    lines = []
    for result in metrics["results"]:
        for start, stop, first_target, nll_sum in result.pop("windows"):
            window = {"start": start, "stop": stop, "first_target": first_target, "nll_sum": nll_sum}
            lines.append(json_text({"model": result["model"], "length": result["length"]} | window) + "\n")
    write_text(output / "predictions.jsonl", "".join(lines))
    write_json(output / "metrics.json", metrics)
    write_text(output / "perplexity.csv", csv_text(metrics["results"], COLUMNS))
    curves: dict[str, dict[int, Mapping[str, Any]]] = {label: {} for label in metrics["models"]}
    for result in metrics["results"]:
        curves[result["model"]][result["length"]] = result
    save_perplexity_by_length(curves, output / "perplexity_by_length.png")
    save_loss_by_position(curves, output / "loss_by_position.png")
    if len(curves) > 1:
        save_comparison(curves, output / "comparison.png")
    shown = (*SHOWN, PUBLISHED) if metrics["protocol"]["parity"] else SHOWN
    return metrics | {"table": text_table(metrics["results"], shown)}
