"""Scores of the batches of one evaluation: sums that can be interrupted, shared among processes and put together again.

Notable: what a batch holds and its sums do not depend on who computes it or when, and sums of batches are exactly
rounded whatever their order, so killed, resumed and distributed evaluations report the same bits.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from evaluation.perplexity.reading import Window
from evaluation.positions import bucket_sums, position_edges
from evaluation.rank_journal import RankJournal
from evaluation.scoring import mean_report

FLUSH_SECONDS = 20.0


@dataclass(frozen=True)
class BatchScore:
    """Sums of one batch.

    Attributes:
        windows: [start, stop, first target, sum of losses] of each window.
        positions: sum of losses of each bucket of positions (`evaluation.positions`).
        counts: targets of each bucket.
        published: mean loss of each window over the targets that the published evaluation scores.
        seconds: time it took, about.
    """

    windows: list[list[Any]]
    positions: list[float]
    counts: list[int]
    published: list[float]
    seconds: float


class Journal(RankJournal):
    """Finished batches on disk."""

    def scores(self) -> dict[int, BatchScore]:
        """Return what all processes have finished, by number."""
        return {number: BatchScore(**score) for number, score in self.read()}

    def add(self, scores: Mapping[int, BatchScore]) -> None:
        """Add finished batches."""
        self.append([number, vars(score)] for number, score in scores.items())


@dataclass
class Collector:
    """Losses of finished batches on the model's device, until they are taken to the host together.

    Attributes:
        window: inputs per window.
        published: note the means of the published evaluation.
        journal: where finished batches are written from time to time; None: nowhere.
    """

    window: int
    published: bool = False
    journal: Journal | None = None
    done: dict[int, BatchScore] = field(default_factory=dict)
    _pending: list[tuple[int, list[Window], int, tuple[Tensor, ...]]] = field(default_factory=list)
    _since: float = field(default_factory=time.perf_counter)

    def add(self, number: int, batch: list[Window], nll: Tensor, length: int) -> None:
        """Add losses ``[B, R]`` of windows of ``length`` inputs, of which the last R positions were scored."""
        nll = nll.double()
        # A published window is x[start:start + window]: the successor of its last token lies outside.
        means = nll[:, : self.window - 1].mean(1) if self.published and self.window > 1 else nll.new_zeros(0)
        self._pending.append((number, batch, length, (nll.sum(1), nll.sum(0), means)))
        if time.perf_counter() - self._since > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Take everything to the host, and to the journal."""
        pending, self._pending = [(*entry[:3], [part.cpu() for part in entry[3]]) for entry in self._pending], []
        now = time.perf_counter()
        seconds = (now - self._since) / max(1, len(pending))
        fresh = {number: self._score(batch, length, parts, seconds) for number, batch, length, parts in pending}
        self.done |= fresh
        self._since = now
        if self.journal is not None and fresh:
            self.journal.add(fresh)

    def _score(self, batch: list[Window], length: int, parts: list[Tensor], seconds: float) -> BatchScore:
        sums, columns, means = parts
        scored, edges = slice(length - len(columns), length), position_edges(self.window)
        losses, counts = np.zeros(self.window), np.zeros(self.window)
        losses[scored], counts[scored] = columns.numpy(), len(batch)
        return BatchScore(
            windows=[[*window, value] for window, value in zip(batch, sums.tolist(), strict=True)],
            positions=bucket_sums(losses, edges).tolist(),
            counts=[int(count) for count in bucket_sums(counts, edges)],
            published=means.tolist(),
            seconds=seconds,
        )


def report(scores: Mapping[int, BatchScore], window: int, *, bytes_per_token: float | None) -> dict[str, Any]:
    """Return sums, means and the exponential of all batches as plain numbers.

    Args:
        scores: batches by number.
        window: inputs per window.
        bytes_per_token: of the text, None if unknown.
    """
    ordered = [scores[number] for number in sorted(scores)]
    windows = [window for score in ordered for window in score.windows]
    nll_sum = math.fsum(entry[3] for entry in windows)
    counts = [sum(column) for column in zip(*(score.counts for score in ordered), strict=True)]
    means = [mean for score in ordered for mean in score.published]
    found: dict[str, Any] = {
        "nll_sum": nll_sum,
        "num_targets": sum(counts),
        **mean_report(nll_sum, sum(counts), bytes_per_token),
        "position_edges": position_edges(window),
        "position_nll_sum": [math.fsum(column) for column in zip(*(s.positions for s in ordered), strict=True)],
        "position_counts": counts,
        "windows": windows,
        "seconds": math.fsum(score.seconds for score in ordered),
    }
    return found | ({"published_mean_loss": math.fsum(means) / len(means)} if means else {})
