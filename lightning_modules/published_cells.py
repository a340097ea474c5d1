"""Cells of a comparison as the published code trains and scores them, for the published protocol of the sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.published_text import (
    MarkedText,
    PublishedDataModule,
    bernoulli_keep,
    cut_blocks,
    mark_and_tokenize,
    with_marks,
)
from evaluation.kv_compression.published import published_perplexity
from evaluation.results import digest
from patches.compressed_rows import Method
from patches.sentinel.sentinels import Sentinels

Rows = Callable[..., list[str]]


class PublishedText:
    """The text of a corpus by rows, marked at a ratio for one method.

    Args:
        rows: function of ``split`` that returns the rows of the text.
        tokenizer: folder of the corpus' tokenizer.
        sentinels: ids that the marks must have.
        eval_split: split that cells are scored on.
        context_length: tokens of a block.
        max_blocks: score only the first so many blocks.

    Raises:
        ValueError: the marks would have other ids.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Path,
        sentinels: Sentinels,
        *,
        eval_split: str,
        context_length: int,
        max_blocks: int | None = None,
    ):
        self._rows, self.eval_split = rows, eval_split
        self.context_length, self.max_blocks, self.sentinels = context_length, max_blocks, sentinels
        self.tokenizer: PreTrainedTokenizerBase
        self.tokenizer, marks = with_marks(PreTrainedTokenizerFast.from_pretrained(tokenizer))
        if marks != sentinels:
            raise ValueError(
                f"the marks of the published protocol get the ids {marks.ids}, the recipe has {sentinels.ids}: "
                f"pass vocabulary.size={marks.open_id} module.sentinels.slots=1"
            )

    @functools.cache  # noqa: B019 - one object for a sweep, which reads every split for every cell
    def rows(self, split: str) -> list[str]:
        """Return the rows of a split."""
        return self._rows(split=split)

    def identity(self) -> dict[str, str]:
        """Return what tells the text apart."""
        return {split: digest(self.rows(split)) for split in ("train", self.eval_split)}

    def marked(self, split: str, method: Method, compression_ratio: float, *, seed: int) -> MarkedText:
        """Return a split, marked for ``sentinel``; the baselines read it unmarked."""
        ratio = compression_ratio if method == "sentinel" else 0.0
        return mark_and_tokenize(self.rows(split), self.tokenizer, compression_ratio=ratio, seed=seed)

    def data(self, method: Method, compression_ratio: float, *, seed: int, **options: Any) -> PublishedDataModule:
        """Return the training batches of a cell."""
        text = self.marked("train", method, compression_ratio, seed=seed)
        blocks = cut_blocks(text.rows, self.context_length)
        given: dict[str, Any] = {"method": method, "compression_ratio": compression_ratio, "sentinels": self.sentinels}
        return PublishedDataModule(blocks, seed=seed, **given, **options)

    def report(self, model: Any, method: Method, compression_ratio: float, *, seed: int) -> dict[str, Any]:
        """Score a cell, with the counts of its marking."""
        text = self.marked(self.eval_split, method, compression_ratio, seed=seed)
        blocks = cut_blocks(text.rows, self.context_length)[: self.max_blocks]
        keep = None
        if method == "scattered":
            keep = bernoulli_keep(len(blocks), self.context_length, compression_ratio, seed=seed + 1)
        options: dict[str, Any] = {
            "method": method,
            "compression_ratio": compression_ratio,
            "sentinels": self.sentinels,
        }
        return text.report | published_perplexity(model, torch.as_tensor(blocks), keep=keep, **options)
