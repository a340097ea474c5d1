"""One cell of a comparison of compression methods: a base model fine-tuned with one method at one ratio.

Notable: cells differ in method and ratio only. Blocks, their order, steps and learning rate are the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from datamodules.sentinel import SentinelTextDataModule
from evaluation.kv_compression import compression_of
from evaluation.results import digest
from lightning_modules.cell_rows import CellRows
from lightning_modules.described_options import described_option
from lightning_modules.kv_compression import KVCompressionLM
from lightning_modules.learnt_parameters import LearntParameters
from patches.compressed_rows import Method
from patches.sentinel.sampler import SpanSampler
from patches.sentinel.sentinels import Sentinels

__all__ = ["CellTrainer", "described_option"]


class CellTrainer(CellRows):
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
        ValueError: shared ratios under the published protocol.
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
        super().__init__(
            data=data,
            corpus=corpus,
            sampler=sampler,
            sentinels=sentinels,
            eval_split=eval_split,
            max_eval_blocks=max_eval_blocks,
            text=text,
        )
        if shared_ratios and protocol == "published":
            raise ValueError("shared_ratios belong to protocol=exact: the published one trains a model for each ratio")
        self.shared_ratios, self.models = tuple(shared_ratios), None if models is None else Path(models)
        self._shared: dict[tuple[str, int], Any] = {}
        self.protocol, self.module, self.trainer, self.num_sinks = protocol, module, trainer, num_sinks

    def published_report(self, model: Any, method: Method, compression_ratio: float, seed: int) -> dict[str, Any]:
        """Score a cell by the published protocol."""
        return self.text.report(model, method, compression_ratio, seed=seed)

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
