"""Measuring one cell of a sweep over parallel contexts, batch by batch, and what its journal says."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evaluation.cell_journal import CellJournal
from evaluation.parallel_context.plan import Segments, Setting, attention_cost, described
from evaluation.parallel_context.tails import TailCut, score_tails
from evaluation.results import digest
from evaluation.scoring import perplexity_of
from patches.parallel_context import ParallelContext


@dataclass
class Cell:
    """One model on one text in one setting.

    Attributes:
        model: label of the model.
        text: name of the text.
        setting: what the sweep varies.
        patch: the patch of the setting.
        segments: rows of tokens ``[n, length]``.
        cut: which of their tokens are query, and scored.
        batch_size: segments of a call.
        request: everything else that the numbers depend on.
    """

    model: str
    text: str
    setting: Setting
    patch: ParallelContext
    segments: Segments
    cut: TailCut
    batch_size: int
    request: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Digest of all that the numbers depend on; cells that must have equal numbers share it."""
        shape = {"length": self.setting.length, "batch_size": self.batch_size}
        cut = {"keep_tail": self.cut.keep_tail, "unsplit": self.cut.unsplit}
        return digest(self.request | shape | cut | {"patch": described(self.patch)})[:16]

    def journal(self, folder: Path) -> CellJournal:
        """Return its journal."""
        return CellJournal(folder / f"{self.setting.length}-{self.setting.degree}-{self.key}.jsonl")

    @property
    def num_batches(self) -> int:
        """Lines of the finished journal."""
        return -(-len(self.segments) // self.batch_size)

    def is_done(self, journal: CellJournal) -> bool:
        """Whether nothing is missing of the journal."""
        return len(journal.lines()) == self.num_batches

    def measure(self, journal: CellJournal, model: Any, tokenizer: Any) -> None:
        """Append what is missing of the journal; the caller holds it."""
        journal.mend()
        device = next(model.parameters()).device
        with self.patch.bind(model, tokenizer) as bound:
            for number in range(len(journal.lines()), self.num_batches):
                journal.append(self._batch(bound, number, device))

    def _batch(self, bound: Any, number: int, device: torch.device) -> dict[str, Any]:
        rows = self.segments[number * self.batch_size : (number + 1) * self.batch_size].tolist()
        contexts, queries = zip(*map(self.cut.cut, rows), strict=True)
        pieces = [self.patch.split(context) for context in contexts]
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        nll_sum, num_targets, entropy = score_tails(bound, pieces, list(queries), cut=self.cut).T.tolist()
        return {
            "nll_sum": nll_sum,
            "num_targets": [int(count) for count in num_targets],
            "entropy_sum": entropy,
            "attention_cost": [attention_cost(p, len(c)) for p, c in zip(pieces, contexts, strict=True)],
            "seconds": time.perf_counter() - start,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        }

    def row(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the row of the tables from the lines of the journal."""
        sums = {
            name: [x for line in lines for x in line[name]] for name in ("nll_sum", "entropy_sum", "attention_cost")
        }
        num_targets = sum(sum(line["num_targets"]) for line in lines)
        nll_sum = math.fsum(sums["nll_sum"])
        peaks = [line["peak_bytes"] for line in lines]
        return {
            "model": self.model,
            "data": self.text,
            **self.setting._asdict(),
            "nll_sum": nll_sum,
            "num_targets": num_targets,
            "perplexity": perplexity_of(nll_sum / num_targets),
            "entropy": math.fsum(sums["entropy_sum"]) / num_targets,
            "attention_cost": math.fsum(sums["attention_cost"]) / len(self.segments),
            "num_segments": len(self.segments),
            "seconds": math.fsum(line["seconds"] for line in lines),
            "peak_bytes": None if None in peaks else max(peaks),
        }

    def predictions(self, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what each segment gave."""
        names = ("nll_sum", "num_targets", "entropy_sum")
        values = zip(*([x for line in lines for x in line[name]] for name in names), strict=True)
        head = {"model": self.model, "data": self.text, **self.setting._asdict()}
        return [head | {"segment": i} | dict(zip(names, found, strict=True)) for i, found in enumerate(values)]
