"""Blocks as the published code cuts them: words are marked first, the marked text is tokenised, blocks are cut last.

Notable: kept for comparison with published figures only. Spans miss their ratio and are cut by the borders of blocks,
blanks that only separate marks are scored, and methods score different targets; `datamodules.sentinel` does better.

Letters: N blocks, T tokens of a block (sentinels included).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.loading import PlainStateLoader, make_loader
from datamodules.scored_batches import SequencePlan
from patches.compressed_rows import Method
from patches.rules import scattered_keep
from patches.sentinel.layout import IGNORED, SpanLayout
from patches.sentinel.sampler import mark_words, sample_spans
from patches.sentinel.sentinels import Sentinels

NAMES = ("<CL>", "<CR>")
ROWS_OF_A_GROUP = 1000
METHODS = ("sentinel", "local", "scattered", "dense")


@dataclass(frozen=True)
class MarkedText:
    """Rows of text, marked and tokenised.

    Attributes:
        rows: token ids of every row.
        num_words: words of all rows; what lies between single blanks.
        removed_words: covered words less one for each span.
        num_tokens: tokens, sentinels included.
        num_sentinels: sentinels among them.
        plain_tokens: tokens of the text without marks.
    """

    rows: list[list[int]]
    num_words: int
    removed_words: int
    num_tokens: int
    num_sentinels: int
    plain_tokens: int

    @property
    def report(self) -> dict[str, Any]:
        """The counts, the true ratio in words, and the tokens that marking added besides sentinels."""
        counts = {name: value for name, value in asdict(self).items() if name != "rows"}
        extra = self.num_tokens - self.num_sentinels - self.plain_tokens
        return counts | {"true_ratio_words": self.removed_words / max(self.num_words, 1), "extra_tokens": extra}


def mark_and_tokenize(
    rows: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    compression_ratio: float,
    max_length: int = 25,
    seed: int = 0,
) -> MarkedText:
    """Mark spans of the words of every row by the published sampler, one generator for all, and tokenise.

    Args:
        rows: as stored.
        tokenizer: knows the marks, see `with_marks`.
        compression_ratio: nominal; 0 marks nothing.
        max_length: longest span, in words.
        seed: of the spans.
    """
    draw, num_words, removed, marked = random.Random(seed), 0, 0, []
    for row in rows:
        words = len(row.split(" "))
        spans = sample_spans(words, compression_ratio, max_length=max_length, policy="published", generator=draw)
        num_words += words
        removed += sum(span[1] - span[0] - 1 for span in spans)
        marked.append(mark_words(row, [(span[0], span[1]) for span in spans], names=NAMES) if spans else row)
    ids, plain = (_encode(tokenizer, texts) for texts in (marked, rows))
    marks = set(tokenizer.convert_tokens_to_ids(list(NAMES)))
    return MarkedText(
        rows=ids,
        num_words=num_words,
        removed_words=removed,
        num_tokens=sum(map(len, ids)),
        num_sentinels=sum(token in marks for row in ids for token in row),
        plain_tokens=sum(map(len, plain)),
    )


def with_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, Sentinels]:
    """Return a tokenizer that knows the marks as ordinary tokens, and the sentinels that they are."""
    tokenizer.add_tokens(list(NAMES))
    opening, closing = tokenizer.convert_tokens_to_ids(list(NAMES))
    return tokenizer, Sentinels(opening, (closing,))


def cut_blocks(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """Join every thousand rows and cut them into blocks ``[N, T]``; what is left of a thousand is dropped.

    Raises:
        ValueError: no thousand rows fill a block.
    """
    blocks = []
    for first in range(0, len(rows), ROWS_OF_A_GROUP):
        stream = [token for row in rows[first : first + ROWS_OF_A_GROUP] for token in row]
        blocks += [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    if not blocks:
        raise ValueError(f"the text is shorter than one block of {length} tokens")
    return torch.tensor(blocks, dtype=torch.int64)


def bernoulli_keep(num_blocks: int, length: int, compression_ratio: float, *, seed: int) -> Tensor:
    """Draw, once for every block, which keys scattered attention shows: bool ``[N, T]``."""
    draw = torch.Generator().manual_seed(seed)
    return scattered_keep(num_blocks, length, compression_ratio, generator=draw, exact=False)


class PublishedBatches(Dataset[dict[str, Tensor]]):
    """Micro-batches of blocks, shuffled anew every epoch.

    Args:
        blocks: ``[N, T]``.
        method: ``sentinel`` reads the marks; ``scattered`` gets what it keeps.
        sentinels: the marks.
        keep: bool ``[N, T]`` of ``scattered``.
        plan: who reads what when.
        length: micro-batches of the run.
    """

    def __init__(
        self,
        blocks: Tensor,
        *,
        method: Method,
        sentinels: Sentinels,
        keep: Tensor | None,
        plan: SequencePlan,
        length: int,
    ):
        self.blocks, self.method, self.sentinels = blocks, method, sentinels
        self.keep, self.plan, self.length = keep, plan, length
        if method == "sentinel":
            labels = SpanLayout.from_ids(blocks, sentinels).published_labels
            self.targets = (labels[:, 1:] != IGNORED).sum(1)
        else:
            self.targets = torch.full((len(blocks),), blocks.shape[1] - 1)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        index = torch.from_numpy(self.plan.rows(number))
        ids = self.blocks[index]
        batch = {"input_ids": ids}
        if self.method == "sentinel":
            layout = SpanLayout.from_ids(ids, self.sentinels)
            batch |= {"kind": layout.kind, "span": layout.span}
        elif self.keep is not None:
            batch["keep"] = self.keep[index]
        step = [self.plan.rows(other) for other in self.plan.window(number)]
        batch["num_step_targets"] = sum(self.targets[torch.from_numpy(rows)].sum() for rows in step)
        return batch


class PublishedDataModule(pl.LightningDataModule):
    """Training batches of marked text on one process, for the published protocol.

    Args:
        blocks: ``[N, T]``.
        method: what is trained.
        sentinels: the marks.
        compression_ratio: of ``scattered``.
        batch_size: blocks of a micro-batch.
        max_steps: optimiser steps of the run.
        accumulate_grad_batches: micro-batches of a step.
        seed: of order and draws.
    """

    def __init__(
        self,
        blocks: Tensor,
        *,
        method: Method,
        sentinels: Sentinels,
        compression_ratio: float,
        batch_size: int = 4,
        max_steps: int = 1,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
    ):
        super().__init__()
        keep = None
        if method == "scattered":
            keep = bernoulli_keep(len(blocks), blocks.shape[1], compression_ratio, seed=seed)
        plan = SequencePlan(
            len(blocks), batch_size, accumulate=accumulate_grad_batches, seed=seed, shuffle=True, endless=True
        )
        length = max_steps * accumulate_grad_batches
        self.batches = PublishedBatches(blocks, method=method, sentinels=sentinels, keep=keep, plan=plan, length=length)

    def train_dataloader(self) -> PlainStateLoader:
        """All micro-batches of the run as one epoch."""
        data: Any = self.batches
        return make_loader(data, num_workers=0, pin_memory=False)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids
