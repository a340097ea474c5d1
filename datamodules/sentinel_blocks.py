"""Blocks of plain tokens, and the draws that go with them: spans for sentinels, kept tokens for scattered attention.

Notable: blocks are cut first and spans drawn afterwards, so every method and ratio scores the same targets and no span
is cut. What is drawn depends on (seed, epoch, block) alone: not on batches, workers or ranks.

Letters: B batch, T original tokens of a block, S columns of a row with sentinels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.scored_batches import SequencePlan
from datamodules.span_hints import NEEDED, Hints
from patches.compressed_rows import Method
from patches.rules import scattered_keep
from patches.sentinel.layout import SpanLayout
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels


class Tokens(Protocol):
    """A stream of tokens; `datamodules.corpus.TokenCorpus` is one."""

    def __len__(self) -> int:
        """Number of tokens."""

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Return tokens ``start .. stop - 1`` as int64 ``[stop - start]``."""


class Blocks:
    """Consecutive blocks of ``length`` tokens; a last partial one is left out.

    Args:
        tokens: the stream.
        length: tokens of a block.
        max_blocks: take only the first so many.

    Raises:
        ValueError: the stream is shorter than a block.
    """

    def __init__(self, tokens: Tokens, length: int, *, max_blocks: int | None = None):
        found = len(tokens) // length
        if not found:
            raise ValueError(f"{len(tokens)} tokens are fewer than one block of {length}: use shorter blocks")
        self.tokens, self.length = tokens, length
        self.num_blocks = found if max_blocks is None else min(found, max_blocks)

    def __len__(self) -> int:
        return self.num_blocks

    def __getitem__(self, index: int) -> Tensor:
        """Return a block, int64 ``[T]``."""
        return torch.from_numpy(self.tokens.read(index * self.length, (index + 1) * self.length))


def drawer(seed: int, epoch: int, index: int) -> random.Random:
    """Return the source of randomness of one block in one epoch."""
    return random.Random(f"{seed} {epoch} {index}")


class SentinelCollator:
    """Turn blocks into rows with sentinels.

    Args:
        sentinels: ids to insert.
        sampler: chooses the spans of a block.
        seed: of the spans.
        resample: draw new spans every epoch; False keeps those of epoch 0.
        hints: what the sampler's policy wants to know of a block, see `datamodules.span_hints`.
    """

    def __init__(
        self,
        sentinels: Sentinels,
        sampler: SpanSampler,
        *,
        seed: int = 0,
        resample: bool = True,
        hints: Hints | None = None,
    ):
        if sampler.policy in NEEDED and hints is None:
            raise ValueError(f"policy {sampler.policy!r} needs hints: pass datamodules.span_hints.SpanHints")
        self.hints = hints
        self.sentinels, self.sampler, self.seed, self.resample = sentinels, sampler, seed, resample
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of items that name none."""
        self.epoch = epoch

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids`` int64, ``kind`` int8 and ``span`` int32 ``[B, S]``, right-padded; ``forget`` ``[B]``.

        Args:
            items: each with ``input_ids`` [T], ``index`` and, in a batch over the seam of two epochs, ``epoch``.
        """
        rows = [torch.as_tensor(item["input_ids"]) for item in items]
        spans = [
            self.sampler(len(row), slots=self.sentinels.slots, generator=self._draw(item), **self._hints(row, item))
            for row, item in zip(rows, items, strict=True)
        ]
        forget = self.sampler.forget(len(rows[0]), self.sentinels.slots)
        layout = SpanLayout.from_spans(rows, spans, self.sentinels, forget=forget)
        batch = {"input_ids": layout.input_ids, "kind": layout.kind, "span": layout.span}
        return batch if layout.forget is None else batch | {"forget": layout.forget}

    def _draw(self, item: Mapping[str, Any]) -> random.Random:
        return drawer(self.seed, int(item.get("epoch", self.epoch)) if self.resample else 0, int(item["index"]))

    def _hints(self, ids: Tensor, item: Mapping[str, Any]) -> dict[str, Any]:
        return {} if self.hints is None else {**self.hints(ids, int(item["index"]))}


class PlainCollator:
    """Stack blocks for a baseline; ``scattered`` gets what it keeps.

    Args:
        method: the baseline.
        compression_ratio: fraction that ``scattered`` removes, exactly.
        seed: of what it keeps.
        resample: draw anew every epoch.
    """

    def __init__(self, method: Method, compression_ratio: float, *, seed: int = 0, resample: bool = True):
        self.method, self.compression_ratio, self.seed, self.resample = method, compression_ratio, seed, resample

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids`` int64 ``[B, T]`` and, for ``scattered``, ``keep`` bool ``[B, T]``."""
        batch = {"input_ids": torch.stack([torch.as_tensor(item["input_ids"]) for item in items])}
        if self.method == "scattered":
            draws = (
                drawer(self.seed, int(item["epoch"]) if self.resample else 0, int(item["index"])) for item in items
            )
            size = batch["input_ids"].shape[1]
            batch["keep"] = torch.cat([scattered_keep(1, size, self.compression_ratio, generator=g) for g in draws])
        return batch


class BlockBatches(Dataset[dict[str, Tensor]]):
    """The micro-batches of a run: item i is micro-batch i, whatever the number of workers.

    Args:
        blocks: what to read.
        plan: who reads what when.
        collates: make a batch of items with ``input_ids``, ``index`` and ``epoch``; micro-batches take them in turn,
            and say which as ``ratio_index`` if there are several.
        length: micro-batches of a run, with their ``num_step_targets``; None: one pass over the blocks, for validation,
            ``scored`` being False where a rank repeats a block because fewer than ranks were left.
    """

    def __init__(self, blocks: Blocks, plan: SequencePlan, *collates: Any, length: int | None = None):
        self.blocks, self.plan, self.collates, self.length = blocks, plan, collates, length

    def __len__(self) -> int:
        return self.plan.num_micro_batches if self.length is None else self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        plan, first = self.plan, number * self.plan.sequences_per_micro_batch
        share = plan.share
        indices = plan.rows(number)
        epochs = [(first + place) // plan.num_sequences for place in range(plan.sequences_per_micro_batch)]
        mine = epochs[share.rank :: share.num_ranks]
        items = [
            {"input_ids": self.blocks[int(index)], "index": int(index), "epoch": epoch}
            for index, epoch in zip(indices, mine, strict=False)
        ]
        # Ranks that share a model must call it equally often.
        turn = number % len(self.collates)
        collate = self.collates[turn]
        batch: dict[str, Tensor] = collate(items or [{"input_ids": self.blocks[0], "index": 0, "epoch": 0}])
        if len(self.collates) > 1:
            batch["ratio_index"] = torch.tensor(turn)
        if self.length is None:
            batch["scored"] = torch.tensor(bool(items))
        else:
            targets = plan.accumulate * plan.batch_size * (self.blocks.length - 1)
            batch["num_step_targets"] = torch.tensor(targets)
        return batch
