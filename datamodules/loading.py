"""Map-style data sets of whole micro-batches, and the loader that deals them out from any starting point.

Notable: item m of a data set is micro-batch m of the run. A loader with any number of workers therefore yields the
same batches, and going on after micro-batch m means starting the sampler at m.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from datamodules.batch import IGNORED, TokenBatch
from datamodules.corpus import TokenCorpus
from datamodules.windows import WindowRow, window_start


@dataclass(frozen=True)
class Share:
    """The share of one rank.

    Attributes:
        rank: which share.
        num_ranks: how many there are.
    """

    rank: int = 0
    num_ranks: int = 1


@dataclass(frozen=True)
class TrainingPlan:
    """How the samples of a run are numbered.

    Attributes:
        context_length: T, tokens of a window.
        batch_size: B, windows of a micro-batch on one rank.
        seed: seed of the windows.
        max_steps: optimiser steps.
        accumulate: micro-batches of an optimiser step.
    """

    context_length: int
    batch_size: int
    seed: int
    max_steps: int
    accumulate: int


class TrainingBatches(Dataset[TokenBatch]):
    """Micro-batches of random windows.

    Micro-batch m belongs to step m // accumulate. Rank r holds the contiguous samples
    r * accumulate * B ... (r + 1) * accumulate * B - 1 of every step.
    """

    def __init__(self, corpus: TokenCorpus, plan: TrainingPlan, *, share: Share, with_documents: bool):
        self.corpus, self.plan, self.share, self.with_documents = corpus, plan, share, with_documents

    def __len__(self) -> int:
        return self.plan.max_steps * self.plan.accumulate

    def __getitem__(self, micro_batch: int) -> TokenBatch:
        plan = self.plan
        step, part = divmod(micro_batch, plan.accumulate)
        first = (self.share.rank * plan.accumulate + part) * plan.batch_size
        indices = range(first, first + plan.batch_size)
        starts = [self._start(step, index) for index in indices]
        samples_per_step = self.share.num_ranks * plan.accumulate * plan.batch_size
        batch = read_windows(self.corpus, starts, length=plan.context_length, with_documents=self.with_documents)
        batch["sample_index"] = torch.arange(indices.start, indices.stop) + step * samples_per_step
        batch["num_step_targets"] = torch.tensor(self._step_targets(step))
        return batch

    def _step_targets(self, step: int) -> int:
        """Targets of this rank in a whole optimiser step: the borders of its documents are none."""
        plan = self.plan
        per_rank = plan.accumulate * plan.batch_size
        targets = per_rank * (plan.context_length - 1)
        if self.with_documents:
            for index in range(self.share.rank * per_rank, (self.share.rank + 1) * per_rank):
                start = self._start(step, index)
                documents = self.corpus.document_ids(start, start + plan.context_length)
                targets -= int(np.count_nonzero(np.diff(documents)))
        return targets

    def _start(self, step: int, index: int) -> int:
        plan = self.plan
        return window_start(plan.seed, step, index, num_tokens=len(self.corpus), length=plan.context_length)


class ValidationBatches(Dataset[TokenBatch]):
    """Batches of consecutive windows, dealt to the ranks in turn.

    Where the batches do not come out even, the ranks that would get one fewer repeat their first with nothing to
    score: ranks that share a model must call it equally often.
    """

    def __init__(self, corpus: TokenCorpus, rows: list[WindowRow], *, share: Share, with_documents: bool):
        self.corpus, self.with_documents = corpus, with_documents
        self.rows = rows[share.rank :: share.num_ranks]
        self.num_batches = -(-len(rows) // share.num_ranks)
        self.filler = rows[0]

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> TokenBatch:
        scored = number < len(self.rows)
        row = self.rows[number] if scored else self.filler
        starts = [row.start + i * row.length for i in range(row.windows)]
        batch = read_windows(self.corpus, starts, length=row.length, with_documents=self.with_documents)
        batch["sample_index"] = torch.arange(row.first, row.first + row.windows)
        batch["next_token"] = torch.from_numpy(self._next_tokens(starts, row.length))
        if not scored:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            batch["next_token"] = torch.full_like(batch["next_token"], IGNORED)
        return batch

    def _next_tokens(self, starts: list[int], length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        after = np.array([self.corpus.read(start + length, start + length + 1)[0] for start in starts])
        if self.with_documents:
            for i, start in enumerate(starts):
                last, following = self.corpus.document_ids(start + length - 1, start + length + 1)
                after[i] = after[i] if last == following else IGNORED
        return after


def read_windows(corpus: TokenCorpus, starts: list[int], *, length: int, with_documents: bool) -> TokenBatch:
    """Read windows [B, T] beginning at ``starts`` [B]; ``sample_index`` is for the caller to number."""
    tokens = np.empty((len(starts), length), np.int64)
    for row, start in zip(tokens, starts, strict=True):
        corpus.read_into(row, start)
    if int(tokens.max(initial=0)) >= corpus.vocab_size:
        raise ValueError(f"{corpus.path} is damaged, it holds token id {tokens.max()}: see python -m preprocess.verify")
    input_ids, window_starts = torch.from_numpy(tokens), torch.tensor(starts, dtype=torch.int64)
    batch = TokenBatch(
        input_ids=input_ids, labels=input_ids.clone(), sample_index=window_starts, window_start=window_starts
    )
    if with_documents:
        documents = np.stack([corpus.document_ids(start, start + length) for start in starts])
        batch["document_ids"] = torch.from_numpy(documents)
    return batch


class OffsetSampler(DistributedSampler[int]):
    """Yield start, start + 1, ... length - 1, but keep the length of the whole.

    Lightning counts the batches it has already seen against the length of the loader, hence the whole length. It
    leaves a ``DistributedSampler`` alone, and this is one: the data set knows its rank's share.
    """

    def __init__(self, dataset: Dataset[TokenBatch], start: int = 0):
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, len(self)))


class PlainStateLoader(DataLoader[TokenBatch]):
    """A loader whose position follows from the optimiser step, which the datamodule stores.

    Offering the two methods tells Lightning that a run may go on in the middle of the epoch.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the datamodule's state says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing back: the sampler was built with its start."""


def make_loader(
    dataset: Dataset[TokenBatch], *, start: int = 0, num_workers: int, pin_memory: bool
) -> PlainStateLoader:
    """Build a loader of whole batches.

    Its own generator keeps iterators from drawing worker seeds from the global random state, which would change
    dropout.
    """
    return PlainStateLoader(
        dataset,
        batch_size=None,
        sampler=OffsetSampler(dataset, start),
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),
    )
