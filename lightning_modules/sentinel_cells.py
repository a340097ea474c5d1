"""One cell of a comparison of compression methods: a base model fine-tuned with one method at one ratio.

Notable: cells differ in method and ratio only. Blocks, their order, steps and learning rate are the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from datamodules.corpus import TokenCorpus, open_split
from datamodules.sentinel import SentinelTextDataModule
from datamodules.sentinel_blocks import Blocks
from evaluation.kv_compression import compression_of
from evaluation.results import digest, model_identity
from lightning_modules.kv_compression import KVCompressionLM
from lightning_modules.learnt_parameters import LearntParameters
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
        shared_ratios: train one model for each method and seed, on these ratios in turn, and score it at every ratio;
            none: each cell trains its own.
        models: folder of what those models have learnt, for a sweep that goes on in another process.

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
        shared_ratios: Sequence[float] = (),
        models: str | None = None,
    ):
        if shared_ratios and protocol == "published":
            raise ValueError("shared_ratios belong to protocol=exact: the published one trains a model for each ratio")
        self.shared_ratios, self.models = tuple(shared_ratios), None if models is None else Path(models)
        self._shared: dict[tuple[str, int], Any] = {}
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

    def spans(self, blocks: Sequence[Tensor], compression_ratio: float, seed: int) -> Any:
        """The spans of the blocks to score; None if the sampler chooses them by length alone."""
        sampler = self.sampler(compression_ratio)
        data = self.data(path=self.corpus, method="dense", sampler=sampler)
        return data.spans_to_score(blocks, sampler, self.eval_split, seed=seed)

    def check(self, method: Method, compression_ratio: float) -> None:
        """Refuse a cell whose spans cannot reach its ratio, before any other is trained.

        Raises:
            ValueError: with the ratio that can be reached.
        """
        if self.protocol == "exact":
            self.data(path=self.corpus, method=method, sampler=self.sampler(compression_ratio))

    def identity(self) -> dict[str, Any]:
        """All that the numbers of a cell depend on besides its method, ratio and seed."""
        parts = {"module": self.module, "data": self.data, "trainer": self.trainer, "sampler": self.base_sampler}
        described = {name: described_option(part) for name, part in parts.items()}
        evaluated = {"split": self.eval_split, "corpus": self.eval_corpus.identity, "max_blocks": self.max_eval_blocks}
        published = {} if self.protocol == "exact" else {"published_text": self.text.identity()}
        shared = {"shared_ratios": list(self.shared_ratios)} if self.shared_ratios else {}
        return described | {"evaluation": evaluated} | published | shared

    def train(self, method: Method, compression_ratio: float, seed: int) -> Any:
        """Train a cell, or the model that it shares with the cells of other ratios; return its model."""
        if not self.shared_ratios or method == "dense":
            return self._train(method, compression_ratio, seed)
        if (method, seed) not in self._shared:
            self._shared[method, seed] = self._train_shared(method, seed)
        return self._shared[method, seed]

    def _train_shared(self, method: Method, seed: int) -> Any:
        """Train a model on all ratios in turn, or read what it has learnt."""
        data = self.data(
            path=self.corpus,
            method=method,
            sampler=self.sampler(self.shared_ratios[0]),
            ratios=self.shared_ratios,
            seed=seed,
        )
        mixture = [
            compression_of(method, ratio, data.context_length, num_sinks=self.num_sinks) for ratio in self.shared_ratios
        ]
        module = self.module(
            method=method,
            compression_ratio=mixture[0].compression_ratio,
            window_size=mixture[0].window_size,
            num_sinks=self.num_sinks,
            mixture=mixture,
            seed=seed,
        )
        if self.models is None:
            return self._fit(module, data)
        file = self.models / f"{method}_{seed}.safetensors"
        learnt = LearntParameters(file, digest(self.identity()))
        if file.is_file():
            module.configure_model()
            return learnt.load(module.model)
        return learnt.save(self._fit(module, data))

    def _train(self, method: Method, compression_ratio: float, seed: int) -> Any:
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
        return self._fit(self.module(**options), data)

    def _fit(self, module: KVCompressionLM, data: pl.LightningDataModule) -> Any:
        """Train a module; the random state of the caller stays where it was."""
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
