"""Training on random windows of a corpus, validation on consecutive ones.

Notable: where the data stands is one number, the optimiser step. Windows are a pure function of (seed, step, index),
so resuming is arithmetic and neither workers nor the number of ranks change what is read. All validation lengths
score the same tokens.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batch import TokenBatch
from datamodules.corpus import TokenCorpus, open_split
from datamodules.loading import PlainStateLoader, Share, TrainingBatches, TrainingPlan, ValidationBatches, make_loader
from datamodules.windows import validation_rows, window_start

__all__ = ["PackedTextDataModule", "TokenBatch", "TokenCorpus", "window_start"]

DOCUMENT_MODES = ("stream", "packed")


class PackedTextDataModule(pl.LightningDataModule):
    """Random training windows and consecutive validation windows of a corpus folder.

    Args:
        path: folder with one token corpus per split and ``tokenizer/``.
        context_length: tokens of a training window.
        batch_size: windows of a micro-batch on one rank.
        seed: seed of the windows.
        max_steps: optimiser steps of the whole run; the loader has ``max_steps * accumulate_grad_batches`` batches.
        accumulate_grad_batches: micro-batches of an optimiser step, as the trainer has it.
        documents: ``"stream"`` or ``"packed"`` (adds ``document_ids``).
        eval_lengths: window lengths of validation, one loader each; default the context length.
        eval_batch_tokens: tokens of a validation batch; default ``batch_size * context_length``.
        max_eval_tokens: score only the first so many tokens of the validation split.
        train_split: folder of the training corpus.
        validation_split: folder of the validation corpus.
        num_workers: loader processes, for training and for each validation length.
        pin_memory: page-lock batches for copies to a GPU.

    Raises:
        ValueError: a number below 1, or an unknown ``documents``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context_length: int,
        batch_size: int,
        max_steps: int,
        seed: int = 0,
        accumulate_grad_batches: int = 1,
        documents: Literal["stream", "packed"] = "stream",
        eval_lengths: list[int] | None = None,
        eval_batch_tokens: int | None = None,
        max_eval_tokens: int | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__()
        self.path, self.train_split, self.validation_split = Path(path), train_split, validation_split
        self.plan = TrainingPlan(context_length, batch_size, seed, max_steps, accumulate_grad_batches)
        self.documents = documents
        self.eval_lengths = [context_length] if eval_lengths is None else list(eval_lengths)
        self.eval_batch_tokens = batch_size * context_length if eval_batch_tokens is None else eval_batch_tokens
        self.max_eval_tokens = max_eval_tokens
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.start_step = 0
        self._check_options()

    def _check_options(self) -> None:
        plan = self.plan
        if plan.context_length < 2:
            raise ValueError(f"context_length must be at least 2 (a token and its target), got {plan.context_length}")
        counts = {
            "batch_size": plan.batch_size,
            "max_steps": plan.max_steps,
            "accumulate_grad_batches": plan.accumulate,
            "eval_batch_tokens": self.eval_batch_tokens,
            "max_eval_tokens": 1 if self.max_eval_tokens is None else self.max_eval_tokens,
            "every number in eval_lengths": min(self.eval_lengths, default=0),
        }
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if plan.seed < 0 or self.num_workers < 0:
            raise ValueError(f"seed and num_workers must not be negative, got {plan.seed} and {self.num_workers}")
        if len(set(self.eval_lengths)) != len(self.eval_lengths):
            raise ValueError(f"eval_lengths must differ from each other, got {self.eval_lengths}")
        if self.documents not in DOCUMENT_MODES:
            raise ValueError(f"documents is one of {', '.join(DOCUMENT_MODES)}, got {self.documents}")

    @cached_property
    def train_corpus(self) -> TokenCorpus:
        """The training split, opened on first use."""
        return open_split(self.path, self.train_split)

    @cached_property
    def validation_corpus(self) -> TokenCorpus:
        """The validation split, opened on first use."""
        return open_split(self.path, self.validation_split)

    @property
    def tokenizer_path(self) -> str | None:
        """Tokenizer folder of the corpus, None if it has none."""
        folder = self.path / "tokenizer"
        return str(folder) if folder.is_dir() else None

    @property
    def tokens_per_step(self) -> int:
        """Text tokens of an optimiser step over all ranks."""
        plan = self.plan
        return self._share().num_ranks * plan.accumulate * plan.batch_size * plan.context_length

    def validation_protocol(self) -> dict[str, Any]:
        """What validation numbers depend on besides the weights."""
        return {
            "corpus": self.validation_corpus.identity,
            "split": self.validation_split,
            "max_eval_tokens": self.max_eval_tokens,
            "windows": "not overlapping, every target once",
            "bos_token_id": None,
            "documents": self.documents,
        }

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage reads and check that it is long enough.

        Raises:
            FileNotFoundError: a split is missing.
            ValueError: a split is damaged or shorter than a window, or the two have different tokenizers.
        """
        if stage in (None, "fit"):
            corpus, length = self.train_corpus, self.plan.context_length
            if len(corpus) < length:
                raise ValueError(
                    f"{corpus.path} has {len(corpus)} tokens, fewer than context_length={length}: "
                    "use a shorter context or more text"
                )
            if corpus.meta.get("tokenizer") != self.validation_corpus.meta.get("tokenizer"):
                raise ValueError(f"the splits {self.train_split} and {self.validation_split} have different tokenizers")
        for eval_length in self.eval_lengths:
            self._validation_rows(eval_length)

    def train_dataloader(self) -> PlainStateLoader:
        """All micro-batches of the run as one epoch, from the resumed step on."""
        dataset = TrainingBatches(
            self.train_corpus, self.plan, share=self._share(), with_documents=self.documents == "packed"
        )
        start = min(self.start_step * self.plan.accumulate, len(dataset))
        return make_loader(dataset, start=start, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def val_dataloader(self) -> list[PlainStateLoader]:
        """One loader per evaluation length; all score the same targets, each once."""
        return [self._validation_loader(length) for length in self.eval_lengths]

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, and which data it is."""
        plan = self.plan
        return {
            "step": self.start_step if self.trainer is None else self.trainer.global_step,
            "micro_batch": self._micro_batch(),
            "identity": self.train_corpus.identity,
            "seed": plan.seed,
            "accumulate_grad_batches": plan.accumulate,
            "context_length": plan.context_length,
            "samples_per_step": self._share().num_ranks * plan.accumulate * plan.batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader at the stored step.

        Raises:
            ValueError: the checkpoint was made with another corpus or seed, or in the middle of an optimiser step,
                whose gradient so far is lost.
        """
        if state_dict["micro_batch"]:
            raise ValueError(
                f"the checkpoint was written inside optimiser step {state_dict['step']}, after micro-batch "
                f"{state_dict['micro_batch']} of {state_dict['accumulate_grad_batches']}: "
                "resume from one written after a step"
            )
        mine = self.state_dict()
        for name in ("identity", "seed"):
            if state_dict[name] != mine[name]:
                meaning = "corpus identity" if name == "identity" else name
                raise ValueError(
                    f"the checkpoint was trained with another {meaning}: {state_dict[name]}, now {mine[name]}; "
                    "resume with the old one or start a new run"
                )
        for name in ("context_length", "samples_per_step"):
            if state_dict[name] != mine[name]:
                rank_zero_warn(f"{name} was {state_dict[name]} and is now {mine[name]}: other windows will be drawn")
        self.start_step = int(state_dict["step"])

    def _share(self) -> Share:
        if self.trainer is None:
            return Share()
        # Strategies that split more than the batch (tensor parallelism) know the data-parallel rank.
        ranks = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
        return Share(ranks["rank"], ranks["num_replicas"])

    def _micro_batch(self) -> int:
        """Return how many micro-batches of the unfinished optimiser step are done."""
        if self.trainer is None:
            return 0
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % self.plan.accumulate)

    def _validation_rows(self, length: int) -> list[Any]:
        available = len(self.validation_corpus)
        num_tokens = available if self.max_eval_tokens is None else min(available, self.max_eval_tokens)
        return validation_rows(num_tokens, length=length, batch_size=max(1, self.eval_batch_tokens // length))

    def _validation_loader(self, length: int) -> PlainStateLoader:
        dataset = ValidationBatches(
            self.validation_corpus,
            self._validation_rows(length),
            share=self._share(),
            with_documents=self.documents == "packed",
        )
        return make_loader(dataset, num_workers=self.num_workers, pin_memory=self.pin_memory)
