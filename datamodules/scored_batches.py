"""Micro-batches of whole sequences: which sequences a rank reads when, and what a batch holds.

Notable: item i of the data set is micro-batch i of the run, whatever the number of workers, so going on after
micro-batch i means starting the sampler at i.

Letters: n sequences, B sequences of a micro-batch on one rank, C tokens, T = C - 1 targets, W ranks, M micro-batches of
an epoch on a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Required, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datamodules.loading import Share
from datamodules.score_store import ScoreStore
from datamodules.sequence_store import Int64Array, SequenceStore
from losses.base_scoring import pack_scores


class ScoredBatch(TypedDict, total=False):
    """A micro-batch of B sequences.

    Attributes:
        input_ids: ``[B, C]`` int64, right-padded.
        valid: ``[B, T]`` bool, the targets that count. All False on a rank that repeats a sequence because fewer than
            W were left.
        sequence_index: ``[B]`` int64, numbers of the sequences in their store.
        base_nll_bits: ``[B, T]`` int32, the scores as bits (``losses.base_scoring.unpack_scores``): precision plugins
            would round a float column. Present with a score store.
        num_step_targets: int64 scalar, valid targets of this rank in the accumulation window of the batch. Training
            only.
    """

    input_ids: Required[torch.Tensor]
    valid: Required[torch.Tensor]
    sequence_index: Required[torch.Tensor]
    base_nll_bits: torch.Tensor
    num_step_targets: torch.Tensor


@dataclass(frozen=True)
class SequencePlan:
    """How sequences are numbered over a run, and which of them are a rank's.

    An epoch reads every sequence once. Endless: the orders of the epochs follow each other without a seam, and
    micro-batch i takes the W B sequences from position i W B on. Otherwise: micro-batch e M + m takes them from
    position m W B of epoch e on; the last of an epoch may find fewer, and its accumulation window may be shorter.
    Of these, rank r reads every W-th from the r-th on.

    Attributes:
        num_sequences: n.
        batch_size: B.
        accumulate: micro-batches of an optimiser step.
        seed: of the orders.
        shuffle: permute every epoch, else keep the order of the store.
        share: the rank.
        endless: epochs without seams, for runs of so many steps; else epochs that end, for runs of so many epochs.
    """

    num_sequences: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    shuffle: bool = False
    share: Share = field(default_factory=Share)
    endless: bool = False

    @property
    def sequences_per_micro_batch(self) -> int:
        """W B."""
        return self.batch_size * self.share.num_ranks

    @property
    def num_micro_batches(self) -> int:
        """M, the same on all ranks."""
        return -(-self.num_sequences // self.sequences_per_micro_batch)

    def rows(self, index: int) -> Int64Array:
        """Return the sequences of a micro-batch of this rank, int64 ``[B]``; empty where fewer than W were left."""
        size = self.sequences_per_micro_batch
        if self.endless:
            places = (divmod(at, self.num_sequences) for at in range(index * size, (index + 1) * size))
            dealt = np.array([self._order(epoch)[place] for epoch, place in places])
        else:
            epoch, number = divmod(index, self.num_micro_batches)
            dealt = self._order(epoch)[number * size : (number + 1) * size]
        return dealt[self.share.rank :: self.share.num_ranks]

    def place_in_step(self, index: int) -> int:
        """Return the number of a micro-batch in its accumulation window."""
        return (index if self.endless else index % self.num_micro_batches) % self.accumulate

    def window(self, index: int) -> range:
        """Return the micro-batches of the accumulation window of a micro-batch."""
        first = index - self.place_in_step(index)
        last = first + self.accumulate
        if not self.endless:
            last = min(last, (index // self.num_micro_batches + 1) * self.num_micro_batches)
        return range(first, last)

    def _order(self, epoch: int) -> Int64Array:
        return epoch_order(self.num_sequences, self.seed if self.shuffle else None, epoch)


@lru_cache(maxsize=4)
def epoch_order(num_sequences: int, seed: int | None, epoch: int) -> Int64Array:
    """Return the order of an epoch: ``default_rng([seed, epoch]).permutation(n)``, or 0 .. n - 1 without a seed."""
    if seed is None:
        return np.arange(num_sequences)
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


class SequenceBatches(Dataset[ScoredBatch]):
    """The micro-batches of a run.

    Args:
        sequences: the tokens.
        scores: their scores, joined by number; None for none.
        plan: who reads what when.
        training: announce ``num_step_targets``.
        length: micro-batches of what Lightning calls an epoch: of a whole run with an endless plan; None is that of
            the plan.
    """

    def __init__(
        self,
        sequences: SequenceStore,
        scores: ScoreStore | None,
        *,
        plan: SequencePlan,
        training: bool,
        length: int | None = None,
    ):
        self.sequences, self.scores, self.plan, self.training = sequences, scores, plan, training
        self.length = plan.num_micro_batches if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ScoredBatch:
        rows = self.plan.rows(index)
        batch = self._read(rows if len(rows) else np.zeros(1, np.int64))
        if not len(rows):
            # Ranks that share a model must call it equally often.
            batch["valid"].fill_(False)
        if self.training:
            window = np.concatenate([self.plan.rows(number) for number in self.plan.window(index)])
            targets = int(self.sequences.num_targets[window].sum())
            batch["num_step_targets"] = torch.tensor(targets, dtype=torch.int64)
        return batch

    def _read(self, numbers: Int64Array) -> ScoredBatch:
        items = [self.sequences[int(number)] for number in numbers]
        batch = ScoredBatch(
            input_ids=torch.stack([item["input_ids"] for item in items]),
            valid=torch.stack([item["valid"] for item in items]),
            sequence_index=torch.tensor([item["sequence_index"] for item in items], dtype=torch.int64),
        )
        if self.scores is not None:
            batch["base_nll_bits"] = pack_scores(torch.stack([self.scores[int(number)] for number in numbers]))
        return batch


class EpochSampler(Sampler[int]):
    """Yield the numbers of the micro-batches of one epoch, from ``start`` on in the epoch that holds it.

    Its length is that of a whole epoch: Lightning counts the batches it has already seen against it.

    Args:
        length: micro-batches of an epoch.
        start: micro-batch to begin with, counted from the beginning of the run.
    """

    def __init__(self, length: int, start: int = 0):
        self.length, self.start, self.epoch = length, start, start // length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this at the start of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        first, end = self.epoch * self.length, (self.epoch + 1) * self.length
        # Not a generator: the epoch is that of the call, not that of the first item.
        return iter(range(self.start if first <= self.start < end else first, end))
