"""What the cells of a comparison read: the blocks that all are scored on, their spans, the text in its rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.corpus import TokenCorpus, open_split
from datamodules.sentinel import SentinelTextDataModule
from datamodules.sentinel_blocks import Blocks
from lightning_modules.published_cells import PublishedText
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels


class CellRows:
    """The rows of a corpus for every method and ratio.

    Args:
        data: `SentinelTextDataModule` but its path, method, sampler and seed.
        corpus: the corpus folder, or a function that makes it.
        sampler: chooses the spans, its ratio aside.
        sentinels: their ids.
        eval_split: split that cells are scored on.
        max_eval_blocks: score only the first so many blocks.
        text: for the published protocol, a function of ``split`` that returns the rows of the corpus' text.
    """

    def __init__(
        self,
        *,
        data: Callable[..., SentinelTextDataModule],
        corpus: str | Callable[[], str],
        sampler: SpanSampler,
        sentinels: Sentinels,
        eval_split: str,
        max_eval_blocks: int | None,
        text: Callable[..., list[str]] | None,
    ):
        self.data, self._corpus, self._text = data, corpus, text
        self.base_sampler, self.sentinels = sampler, sentinels
        self.eval_split, self.max_eval_blocks = eval_split, max_eval_blocks

    @functools.cached_property
    def corpus(self) -> Path:
        """The corpus folder."""
        return Path(self._corpus if isinstance(self._corpus, str) else self._corpus())

    @functools.cached_property
    def eval_corpus(self) -> TokenCorpus:
        """The split that cells are scored on."""
        return open_split(self.corpus, self.eval_split)

    def blocks(self) -> Blocks:
        """The blocks that every cell is scored on."""
        length = self.data(path=self.corpus, method="dense").context_length
        return Blocks(self.eval_corpus, length, max_blocks=self.max_eval_blocks)

    @functools.cached_property
    def text(self) -> PublishedText:
        """The text of the published protocol."""
        assert self._text is not None
        return PublishedText(
            self._text,
            self.corpus / "tokenizer",
            self.sentinels,
            eval_split=self.eval_split,
            context_length=self.data(path=self.corpus, method="dense").context_length,
            max_blocks=self.max_eval_blocks,
        )

    def sampler(self, compression_ratio: float) -> SpanSampler:
        """What chooses spans at a ratio."""
        return dataclasses.replace(self.base_sampler, compression_ratio=compression_ratio)

    def spans(self, blocks: Sequence[Tensor], compression_ratio: float, seed: int) -> Any:
        """The spans of the blocks to score; None if the sampler chooses them by length alone."""
        sampler = self.sampler(compression_ratio)
        data = self.data(path=self.corpus, method="dense", sampler=sampler)
        return data.spans_to_score(blocks, sampler, self.eval_split, seed=seed)
