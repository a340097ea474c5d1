"""Perplexity and attention entropy over context lengths, degrees, prefixes and selections: ``recipe=ppl_parallel``.

Notable: a measured batch is a line in the journal of its cell, named by everything its number depends on. A killed
sweep goes on at the next batch, any number of processes may work on one folder, and the numbers are the same.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import track

from evaluation.arithmetic import arithmetic, versions
from evaluation.context_patch import check_pieces
from evaluation.model_sources import SweepModel, sweep_models
from evaluation.parallel_context.cells import Cell
from evaluation.parallel_context.figure import redraw
from evaluation.parallel_context.plan import SweepGrid, Texts, cut_segments, patch_of
from evaluation.parallel_context.tails import TailCut
from evaluation.processes import Process
from evaluation.results import csv_text, json_text, text_table, write_json, write_text
from patches.parallel_context import ParallelContext
from patches.parallel_context.families import check_positions

Dtype = Literal["float32", "bfloat16", "float16"]
COLUMNS = (
    "model",
    "data",
    "length",
    "degree",
    "prefix",
    "selection",
    "nll_sum",
    "num_targets",
    "perplexity",
    "entropy",
    "attention_cost",
    "num_segments",
    "seconds",
    "peak_bytes",
)
SHOWN = ("length", "degree", "prefix", "selection", "perplexity", "entropy", "attention_cost", "seconds")


class ParallelSweep:
    """Score the last tokens of segments behind their contexts, cut into pieces, in every setting.

    Args:
        models: a model folder (``save_pretrained``), several, label -> folder; ``hub:NAME`` is a model of the hub.
        texts: what to score (`preprocess.scored_texts.open_texts`).
        lengths: tokens of a segment; the prefix comes on top.
        degrees: numbers of pieces.
        prefixes: ``none``, ``bos``, ``p1``, ``p2`` or any other text.
        selections: ``none``, ``topN`` or ``softT``.
        keep_tail: last tokens of a segment, which are scored.
        unsplit: tokens before them that no piece holds, and only predict.
        max_documents: documents of a text for each length, the first that are long enough.
        patch: the other options of parallel context.
        tokenizer: tokenizer for models that have none.
        batch_tokens: tokens of the segments of a call, at least one segment.
        dtype: of weights and arithmetic; statistics are float32 or better.
        device: ``auto`` (CUDA when there is one; each process its own), ``cpu``, ``cuda``, ``cuda:1``.
        progress: show a progress bar on the error stream.

    Raises:
        ValueError: an option out of range, more pieces than tokens, or a device that is not there.
        FileNotFoundError: a model does not exist.
    """

    def __init__(
        self,
        models: str | list[str] | dict[str, str] | Callable[[], Any] | None,
        texts: Sequence[Texts],
        *,
        lengths: list[int],
        degrees: list[int],
        prefixes: list[str],
        selections: list[str],
        keep_tail: int = 1024,
        unsplit: int = 1,
        max_documents: int = 50,
        patch: ParallelContext | None = None,
        tokenizer: Any = None,
        batch_tokens: int = 16384,
        dtype: Dtype = "float32",
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        for name, value in (("max_documents", max_documents), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, got {dtype}")
        self.models, self.texts = sweep_models(models or (), tokenizer), list(texts)
        self.grid, self.cut = SweepGrid(lengths, degrees, prefixes, selections), TailCut(keep_tail, unsplit)
        self.grid.check(self.cut)
        self.patch = patch or ParallelContext()
        for name in ("degree", "max_piece_tokens"):
            if getattr(self.patch, name) is not None:
                raise ValueError(f"patch.{name} is what the sweep varies: pass degrees=[...] instead")
        self.max_documents, self.batch_tokens = max_documents, batch_tokens
        self.dtype, self.progress = dtype, progress
        self.process = Process.current()
        self.device = self.process.device(device, dtype)

    def run(self, output: Path) -> dict[str, Any] | None:
        """Measure what is missing in ``output``; when all is there, the first process writes metrics and figures.

        Files: ``cells/*.jsonl`` (the measured batches), ``metrics.json``, ``rows.csv``, ``predictions.jsonl`` (each
        segment), ``figure.png``, ``figure.pdf``.

        Returns:
            The metrics and the table; None in the other processes.
        """
        plan = {model.label: self._cells(model) for model in self.models}
        folder, processes = output / "cells", ([False, True] if self.process.is_first else [False])
        for wait in processes:  # first what nobody works on, then what others left
            for model in self.models:
                self._measure(model, plan[model.label], folder, wait=wait)
        if not self.process.is_first:
            return None
        cells = [cell for cells in plan.values() for cell in cells]
        return self._publish(cells, [cell.journal(folder).lines() for cell in cells], output)

    def _cells(self, model: SweepModel) -> list[Cell]:
        """Plan the cells of a model; nothing is loaded but its tokenizer and configuration."""
        cells = []
        for text in self.texts:
            documents = text.documents(model.tokenizer)
            segments = cut_segments(documents, self.grid.lengths, self.max_documents)
            for length, found in segments.items():
                if not len(found):
                    raise ValueError(f"{text.name} has no document of {length} tokens: leave that length out")
            digests = {length: hashlib.sha256(found.tobytes()).hexdigest() for length, found in segments.items()}
            for setting in self.grid.cells():
                patch = patch_of(setting, self.patch)
                rows = segments[setting.length]
                request = {
                    "model": model.identity,
                    "segments": digests[setting.length],
                    "prefix": patch.prefix_ids(model.tokenizer, model.config.get_text_config()),
                    **arithmetic(self.device, self.dtype),
                }
                batch_size = max(1, self.batch_tokens // setting.length)
                cells.append(Cell(model.label, text.name, setting, patch, rows, self.cut, batch_size, request))
        self._check_fit(model, cells)
        return cells

    def _check_fit(self, model: SweepModel, cells: Iterable[Cell]) -> None:
        """Refuse pieces beyond the model's context, and positions beyond it where angles change with the length."""
        limit, beyond = model.limit, {}
        for cell in cells:
            context, query = cell.cut.cut(cell.segments[0].tolist())
            pieces, prefix = cell.patch.split(context), len(cell.request["prefix"])
            where = f"length {cell.setting.length} at degree {cell.setting.degree}"
            check_pieces(pieces, prefix=prefix, limit=limit, where=where)
            used = cell.patch.num_positions(pieces, prefix=prefix, query=len(query))
            check_positions(model, used - 1)
            if limit is not None and used > limit:
                beyond[where] = used
        if beyond:
            where, used = max(beyond.items(), key=lambda entry: entry[1])
            warnings.warn(
                f"model {model.label} was made for {limit} positions, and {len(beyond)} settings use more "
                f"(up to {used}: {where}): their numbers show what it does beyond, too",
                stacklevel=2,
            )

    def _measure(self, model: SweepModel, cells: Sequence[Cell], folder: Path, *, wait: bool) -> None:
        """Measure the cells that are not finished; the model is loaded only if there is one."""
        loaded = None
        console = Console(stderr=True)
        shown = self.progress and self.process.is_first and console.is_terminal
        for cell in track(cells, f"scoring {model.label}", console=console, transient=True, disable=not shown):
            journal = cell.journal(folder)
            if cell.is_done(journal):
                continue
            with journal.held(wait=wait) as mine:
                if mine and not cell.is_done(journal):  # who held it before may have finished it
                    loaded = loaded or model.load(dtype=getattr(torch, self.dtype), device=self.device)
                    cell.measure(journal, loaded, model.tokenizer)

    def _protocol(self) -> dict[str, Any]:
        """What the numbers depend on besides what a row says."""
        return {
            "keep_tail": self.cut.keep_tail,
            "unsplit": self.cut.unsplit,
            "max_documents": self.max_documents,
            "segments": "consecutive, of the first documents that are long enough; the rest of each left out",
            "special_tokens": "none but those of the prefix",
            "patch": {name: value for name, value in asdict(self.patch).items() if name not in _VARIED},
            "batch_tokens": self.batch_tokens,
            "models": {model.label: {"source": str(model.source), "identity": model.identity} for model in self.models},
            "texts": {text.name: text.identity for text in self.texts},
            **arithmetic(self.device, self.dtype),
            "versions": versions(),
        }

    def _publish(self, cells: list[Cell], lines: list[list[dict[str, Any]]], output: Path) -> dict[str, Any]:
        found = list(zip(cells, lines, strict=True))
        rows = [cell.row(batches) for cell, batches in found]
        segments = [json_text(entry) + "\n" for cell, batches in found for entry in cell.predictions(batches)]
        metrics = {"task": "parallel_perplexity", "protocol": self._protocol(), "rows": rows}
        write_text(output / "predictions.jsonl", "".join(segments))
        write_json(output / "metrics.json", metrics)
        write_text(output / "rows.csv", csv_text(rows, COLUMNS))
        redraw(output)
        several = [name for name in ("model", "data") if len({row[name] for row in rows}) > 1]
        return metrics | {"table": text_table(rows, (*several, *SHOWN))}


_VARIED = ("degree", "max_piece_tokens", "prefix", "workspace_mb")
