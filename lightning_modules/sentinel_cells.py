"""One cell of a comparison of compression methods: a base model fine-tuned with one method at one ratio.

Notable: cells differ in method and ratio only. Blocks, their order, steps and learning rate are the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from datamodules.corpus import TokenCorpus, open_split
from datamodules.sentinel import SentinelTextDataModule
from datamodules.sentinel_blocks import Blocks
from evaluation.compression_perplexity import compression_of
from evaluation.results import model_identity
from lightning_modules.kv_compression import KVCompressionLM
from lightning_modules.published_cells import PublishedText
from patches.compressed_rows import Method
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels


class CellTrainer:
    """Train the cells of a sweep.

    Args:
        module: `KVCompressionLM` but its method, ratio, window and seed.
        data: `SentinelTextDataModule` but its path, method, sampler and seed.
        trainer: ``lightning.pytorch.Trainer``; neither callbacks nor loggers are used.
        corpus: the corpus folder, or a function that makes it.
        sampler: chooses the spans, its ratio aside.
        sentinels: their ids.
        num_sinks: first tokens that ``streaming`` keeps.
        eval_split: split that cells are scored on.
        max_eval_blocks: score only the first so many blocks.
        protocol: as the sweep has it; ``published`` trains and scores marked text.
        text: for ``published``, a function of ``split`` that returns the rows of the corpus' text.

    Raises:
        ValueError: the published protocol without text.
    """

    def __init__(
        self,
        *,
        module: Callable[..., KVCompressionLM],
        data: Callable[..., SentinelTextDataModule],
        trainer: Callable[..., pl.Trainer],
        corpus: str | Callable[[], str],
        sampler: SpanSampler,
        sentinels: Sentinels,
        num_sinks: int = 4,
        eval_split: str = "test",
        max_eval_blocks: int | None = None,
        protocol: Literal["exact", "published"] = "exact",
        text: Callable[..., list[str]] | None = None,
    ):
        self.protocol, self._text = protocol, text
        self.module, self.data, self.trainer = module, data, trainer
        self._corpus, self.eval_split, self.max_eval_blocks = corpus, eval_split, max_eval_blocks
        self.base_sampler, self.sentinels, self.num_sinks = sampler, sentinels, num_sinks

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

    def published_report(self, model: Any, method: Method, compression_ratio: float, seed: int) -> dict[str, Any]:
        """Score a cell by the published protocol."""
        return self.text.report(model, method, compression_ratio, seed=seed)

    def sampler(self, compression_ratio: float) -> SpanSampler:
        """What chooses spans at a ratio."""
        return dataclasses.replace(self.base_sampler, compression_ratio=compression_ratio)

    def identity(self) -> dict[str, Any]:
        """All that the numbers of a cell depend on besides its method, ratio and seed."""
        parts = {"module": self.module, "data": self.data, "trainer": self.trainer, "sampler": self.base_sampler}
        described = {name: described_option(part) for name, part in parts.items()}
        evaluated = {"split": self.eval_split, "corpus": self.eval_corpus.identity, "max_blocks": self.max_eval_blocks}
        published = {} if self.protocol == "exact" else {"published_text": self.text.identity()}
        return described | {"evaluation": evaluated} | published

    def train(self, method: Method, compression_ratio: float, seed: int) -> Any:
        """Train a cell; return its model."""
        data: pl.LightningDataModule
        options: dict[str, Any] = {"method": method, "compression_ratio": compression_ratio, "seed": seed}
        if self.protocol == "published":
            data = self.text.data(method, compression_ratio, seed=seed, **_steps(self.data))
            options |= {"exclude_sentinel_logits": False, "published_labels": method == "sentinel"}
        else:
            data = self.data(path=self.corpus, method=method, sampler=self.sampler(compression_ratio), seed=seed)
            length = data.context_length
            window = compression_of(method, compression_ratio, length, num_sinks=self.num_sinks).window_size
            options |= {"window_size": window, "num_sinks": self.num_sinks}
        module = self.module(**options)
        trainer = self.trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0)
        with torch.random.fork_rng():
            trainer.fit(module, datamodule=data)
        return module.model


def _steps(data: Callable[..., SentinelTextDataModule]) -> dict[str, Any]:
    """Options of a datamodule that say how blocks make batches and steps."""
    words = data.keywords if isinstance(data, functools.partial) else {}
    return {name: words[name] for name in ("batch_size", "max_steps", "accumulate_grad_batches") if name in words}


def described_option(option: Any) -> Any:
    """Return plain values that tell an option of a recipe apart; of a model folder, those of its content."""
    if isinstance(option, functools.partial):
        words = {name: described_option(value) for name, value in sorted(option.keywords.items())}
        if isinstance(words.get("path"), str) and (Path(words["path"]) / "config.json").is_file():
            words["path"] = model_identity(Path(words["path"]))
        target = getattr(option.func, "__qualname__", repr(option.func))
        return {"target": target, **words}
    if dataclasses.is_dataclass(option) and not isinstance(option, type):
        return {name: described_option(value) for name, value in dataclasses.asdict(option).items()}
    if isinstance(option, dict):
        return {str(name): described_option(value) for name, value in option.items()}
    if isinstance(option, list | tuple):
        return [described_option(value) for value in option]
    if option is None or isinstance(option, bool | int | float | str):
        return option
    to_dict = getattr(option, "to_dict", None)
    return described_option(to_dict()) if callable(to_dict) else type(option).__qualname__
