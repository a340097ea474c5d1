"""Compression methods over ratios: every cell trained alike, scored on the same targets, plotted at its true ratio.

Notable: a finished cell is one file, so an interrupted sweep continues; cells of other options are refused, not mixed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import transformers
from torch import Tensor

from evaluation.kv_compression.exact import Sampler, compression_of, perplexity
from evaluation.kv_compression.figure import save_compression_figure
from evaluation.results import csv_text, digest, read_json, text_table, write_json, write_text
from patches.compressed_rows import METHODS, Method
from patches.sentinel.sentinels import Sentinels

COLUMNS = (
    "method",
    "nominal_ratio",
    "achieved_ratio",
    "visible_fraction",
    "seed",
    "perplexity",
    "nll_sum",
    "num_targets",
    "perplexity_in_span",
    "perplexity_after_span",
    "cache_bytes_per_token",
    "seconds",
)
PUBLISHED_COLUMNS = (
    "method",
    "nominal_ratio",
    "true_ratio_words",
    "achieved_ratio",
    "seed",
    "perplexity",
    "perplexity_original",
    "extra_tokens",
    "num_tokens",
    "num_sentinels",
    "plain_tokens",
    "nll_sum",
    "num_targets",
    "seconds",
)
SHOWN = tuple(column for column in COLUMNS if column not in ("nll_sum", "visible_fraction"))
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Cells(Protocol):
    """What trains cells; `lightning_modules.sentinel_cells.CellTrainer` does."""

    sentinels: Sentinels
    num_sinks: int

    def blocks(self) -> Sequence[Tensor]:
        """Blocks to score."""

    def sampler(self, compression_ratio: float) -> Sampler:
        """What chooses spans at a ratio."""

    def check(self, method: Method, compression_ratio: float) -> None:
        """Refuse a cell that cannot be."""

    def spans(self, blocks: Sequence[Tensor], compression_ratio: float, seed: int) -> Any:
        """The spans of the blocks, where they depend on more than their length; else None."""

    def identity(self) -> dict[str, Any]:
        """Plain values that all numbers depend on."""

    def train(self, method: Method, compression_ratio: float, seed: int) -> Any:
        """Train a cell; return its model."""

    def published_report(self, model: Any, method: Method, compression_ratio: float, seed: int) -> dict[str, Any]:
        """Score a cell by the published protocol; only asked for under it."""


class CompressionSweep:
    """Train and score methods at ratios.

    Args:
        cells: what trains them.
        ratios: fractions removed; 0 is one dense cell for all methods.
        methods: methods to compare.
        seeds: of training and spans; one cell each.
        batch_size: blocks of a forward in scoring.
        reference: published perplexities by label, pairs of true ratio and perplexity, drawn beside ours.
        protocol: ``exact``: every original token once, at the ratio asked for; ``published``: as the published code
            does it, with a column ``perplexity_original`` for what it hides.

    Raises:
        ValueError: a ratio outside [0, 1), an unknown method, or nothing to do.
    """

    def __init__(
        self,
        cells: Cells,
        *,
        ratios: Sequence[float] = RATIOS,
        methods: Sequence[str] = ("sentinel", "local", "scattered", "streaming"),
        seeds: Sequence[int] = (0,),
        batch_size: int = 8,
        reference: Mapping[str, Sequence[Sequence[float]]] | None = None,
        protocol: Literal["exact", "published"] = "exact",
    ):
        if protocol not in ("exact", "published"):
            raise ValueError(f"protocol is one of exact, published, got {protocol!r}")
        if protocol == "published" and "streaming" in methods:
            raise ValueError("the published protocol compares sentinel, local and scattered: leave streaming out")
        if not (ratios and methods and seeds):
            raise ValueError("ratios, methods and seeds need at least one entry each")
        for name, values in (("ratios", ratios), ("methods", methods), ("seeds", seeds)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must differ from each other, got {list(values)}")
        if not all(0 <= ratio < 1 for ratio in ratios):
            raise ValueError(f"ratios are fractions removed, in [0, 1), got {list(ratios)}")
        unknown = [method for method in methods if method not in METHODS]
        if unknown or "dense" in methods:
            raise ValueError(f"methods are of {', '.join(METHODS[:-1])}, got {list(methods)}; dense is ratio 0")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.cells, self.ratios, self.methods = cells, sorted(ratios), list(methods)
        self.seeds, self.batch_size, self.reference = list(seeds), batch_size, dict(reference or {})
        self.protocol = protocol

    def run(self, output: Path) -> dict[str, Any]:
        """Compute what is missing in ``output``; write table and figure; return the rows and the table.

        Files: ``cells/<method>_<ratio>_<seed>.json``, ``metrics.json``, ``table.csv``, ``table.md``, ``figure.png``,
        ``figure.svg``.

        Raises:
            ValueError: the folder holds cells of other options, or a ratio leaves a method nothing to see.
        """
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        identity, blocks = self.cells.identity() | {"versions": versions}, self.cells.blocks()
        plan = self.plan()
        for method, ratio, _ in plan:
            compression_of(method, ratio, len(blocks[0]), num_sinks=self.cells.num_sinks)
            self.cells.check(method, ratio)
        rows = [self._cell(output / "cells", cell, identity, blocks) for cell in plan]
        metrics = {"task": "compression_sweep", "protocol": identity, "results": rows}
        write_json(output / "metrics.json", metrics)
        columns, shown = (COLUMNS, SHOWN) if self.protocol == "exact" else (PUBLISHED_COLUMNS, PUBLISHED_COLUMNS[:8])
        write_text(output / "table.csv", csv_text(rows, columns))
        write_text(output / "table.md", markdown_table(rows, shown))
        title = "Same targets for all methods and ratios"
        if self.protocol == "published":
            title = "Published protocol: targets differ between methods"
        save_compression_figure(rows, output, reference=self.reference, title=title)
        return metrics | {"table": text_table(rows, shown)}

    def plan(self) -> list[tuple[Method, float, int]]:
        """Return the cells, ratio by ratio."""
        cells: list[tuple[Any, float, int]] = []
        for seed in self.seeds:
            for ratio in self.ratios:
                cells += [(method, ratio, seed) for method in self.methods] if ratio else [("dense", 0.0, seed)]
        return cells

    def _cell(
        self, folder: Path, cell: tuple[Method, float, int], identity: dict[str, Any], blocks: Sequence[Tensor]
    ) -> dict[str, Any]:
        method, ratio, seed = cell
        file, request = folder / f"{method}_{ratio}_{seed}.json", digest(identity)
        if file.is_file():
            row = read_json(file)
            if row.get("request") != request:
                raise ValueError(
                    f"{file} was made with other options, model, text or versions: pass another output folder"
                )
            return row
        start = time.perf_counter()
        report = self._report(self.cells.train(method, ratio, seed), cell, blocks)
        row = {"method": method, "nominal_ratio": ratio, "seed": seed} | report
        row |= {"seconds": time.perf_counter() - start, "request": request}
        write_json(file, row)
        return row

    def _report(self, model: Any, cell: tuple[Method, float, int], blocks: Sequence[Tensor]) -> dict[str, Any]:
        method, ratio, seed = cell
        published = self.cells.published_report(model, *cell) if self.protocol == "published" else {}
        # The ratio that marking reached, so that the exact figure beside the published one is at equal budget.
        true_ratio = published["true_ratio_words"] if published and method == "sentinel" else ratio
        report = perplexity(
            model,
            blocks,
            method=method,
            compression_ratio=true_ratio,
            sentinels=self.cells.sentinels,
            sampler=self.cells.sampler(true_ratio),
            spans=self.cells.spans(blocks, true_ratio, seed) if method == "sentinel" else None,
            seed=seed,
            batch_size=self.batch_size,
            num_sinks=self.cells.num_sinks,
        )
        return published | {"perplexity_original": report["perplexity"]} if published else report


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as a Markdown table, four decimals."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column) for column in columns)
        lines.append(["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
