"""Training on random windows of a corpus, validation on consecutive ones.

Notable: where the data stands is one number, the optimiser step. Windows are a pure function of (seed, step, index),
so resuming is arithmetic and neither workers nor the number of ranks change what is read. All validation lengths
score the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batch import TokenBatch
from datamodules.corpus import TokenCorpus, open_split
from datamodules.loading import PlainStateLoader, TrainingBatches, TrainingPlan, ValidationBatches
from datamodules.step_data import StepDataModule, check_counts
from datamodules.windows import validation_rows, window_start

__all__ = ["PackedTextDataModule", "TokenBatch", "TokenCorpus", "window_start"]

DOCUMENT_MODES = ("stream", "packed")


class PackedTextDataModule(StepDataModule[TokenCorpus]):
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

    whole_rows = True

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
        super().__init__(
            path,
            splits=(train_split, validation_split),
            accumulate=accumulate_grad_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.plan = TrainingPlan(context_length, batch_size, seed, max_steps, accumulate_grad_batches)
        self.documents = documents
        self.eval_lengths = [context_length] if eval_lengths is None else list(eval_lengths)
        self.eval_batch_tokens = batch_size * context_length if eval_batch_tokens is None else eval_batch_tokens
        self.max_eval_tokens = max_eval_tokens
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
            "max_eval_tokens": self.max_eval_tokens,
            "every number in eval_lengths": min(self.eval_lengths, default=0),
        }
        check_counts(counts, not_negative={"seed": plan.seed, "num_workers": self.num_workers})
        if len(set(self.eval_lengths)) != len(self.eval_lengths):
            raise ValueError(f"eval_lengths must differ from each other, got {self.eval_lengths}")
        if self.documents not in DOCUMENT_MODES:
            raise ValueError(f"documents is one of {', '.join(DOCUMENT_MODES)}, got {self.documents}")

    def _open(self, split: str) -> TokenCorpus:
        return open_split(self.path, split)

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
            ValueError: a split is damaged or shorter than a window, the two have different tokenizers, or the trainer
                accumulates otherwise.
        """
        if stage in (None, "fit"):
            self._check_fit()
            corpus, length = self.train_corpus, self.plan.context_length
            if len(corpus) < length:
                raise ValueError(
                    f"{corpus.path} has {len(corpus)} tokens, fewer than context_length={length}: "
                    "use a shorter context or more text"
                )
        for eval_length in self.eval_lengths:
            self._validation_rows(eval_length)

    def train_dataloader(self) -> PlainStateLoader:
        """All micro-batches of the run as one epoch, from the resumed step on."""
        dataset = TrainingBatches(
            self.train_corpus, self.plan, share=self._share(), with_documents=self.documents == "packed"
        )
        return self._training_loader(dataset)

    def val_dataloader(self) -> list[PlainStateLoader]:
        """One loader per evaluation length; all score the same targets, each once."""
        return [self._validation_loader(length) for length in self.eval_lengths]

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, and which data it is."""
        plan = self.plan
        return {
            **self._position(),
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
        self._go_on(state_dict, bound=("identity", "seed"))
        mine = self.state_dict()
        for name in ("context_length", "samples_per_step"):
            if state_dict[name] != mine[name]:
                rank_zero_warn(f"{name} was {state_dict[name]} and is now {mine[name]}: other windows will be drawn")

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
        return self._validation_loader_of(dataset)
