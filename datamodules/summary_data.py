"""Training on documents with their summaries, every pair once in an epoch; validation on other pairs.

Notable: where the data stands is one number, the optimiser step. The orders of the epochs follow each other without a
seam and are pure functions of (seed, epoch), so resuming is arithmetic. Every batch announces the targets of its
optimiser step, by which the loss is divided: a long summary counts for as much as its tokens.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.loading import PlainStateLoader, Share, make_loader
from datamodules.scored_batches import SequencePlan
from datamodules.summarization import Alignment, LossOn, SummaryLayout
from datamodules.summary_batches import SummaryBatches
from datamodules.summary_store import SummaryStore, open_summaries

BOUND = ("identity", "layout", "seed", "samples_per_step")


class SummarizationDataModule(pl.LightningDataModule):
    """Rows ``document |Summary: summary <eos>`` of a folder made by ``python -m preprocess.summarization``.

    Args:
        path: folder with one store per split and ``tokenizer/``.
        context_length: T, tokens of a row at most.
        batch_size: rows of a micro-batch on one rank.
        max_steps: optimiser steps of the whole run.
        max_summary_length: tokens of a summary with its end; of a longer one the first are kept.
        chunk_size: tokens of a chunk of the model; None for models without chunks.
        alignment: how the marker comes to open a chunk, see ``datamodules.summarization.SummaryLayout``.
        loss_on: ``summary`` trains on summaries only, ``all`` on whole rows as published. Validation is on summaries.
        pad_token_id: padding in front (seen) and behind (not seen).
        accumulate_grad_batches: micro-batches of an optimiser step, as the trainer has it.
        seed: of the orders.
        max_eval_pairs: validate on the first so many pairs; None: all.
        train_split: folder of the training pairs.
        validation_split: folder of the validation pairs.
        num_workers: loader processes.
        pin_memory: page-lock batches for copies to a GPU.

    Raises:
        ValueError: a number below 1, or sizes that leave no room for a document.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context_length: int,
        batch_size: int,
        max_steps: int,
        max_summary_length: int,
        chunk_size: int | None = None,
        alignment: Alignment = "pad",
        loss_on: LossOn = "summary",
        pad_token_id: int = 50257,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
        max_eval_pairs: int | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__()
        counts = {"context_length": context_length, "batch_size": batch_size, "max_steps": max_steps}
        counts |= {"accumulate_grad_batches": accumulate_grad_batches}
        for name, value in (counts | {"max_eval_pairs": 1 if max_eval_pairs is None else max_eval_pairs}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed < 0 or num_workers < 0:
            raise ValueError(f"seed and num_workers must not be negative, got {seed} and {num_workers}")
        self.path, self.train_split, self.validation_split = Path(path), train_split, validation_split
        self.batch_size, self.max_steps, self.accumulate = batch_size, max_steps, accumulate_grad_batches
        self.seed, self.max_eval_pairs = seed, max_eval_pairs
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.eval_lengths, self.start_step = [context_length], 0
        self.options: dict[str, Any] = {
            "max_length": context_length,
            "max_summary_length": max_summary_length,
            "chunk_size": chunk_size,
            "alignment": alignment,
            "pad_token_id": pad_token_id,
            "loss_on": loss_on,
        }
        SummaryLayout((0,), **self.options)  # refuses impossible sizes now

    @cached_property
    def train_corpus(self) -> SummaryStore:
        """The training pairs, opened on first use."""
        return open_summaries(self.path, split=self.train_split)

    @cached_property
    def validation_corpus(self) -> SummaryStore:
        """The validation pairs, opened on first use."""
        return open_summaries(self.path, split=self.validation_split)

    @property
    def tokenizer_path(self) -> str | None:
        """Tokenizer folder of the pairs, None if it is gone."""
        folder = self.path / "tokenizer"
        return str(folder) if folder.is_dir() else None

    def layout(self, store: SummaryStore, **changes: Any) -> SummaryLayout:
        """Return how rows of a store are laid out."""
        return SummaryLayout(store.marker, eos_token_id=store.eos_token_id, **(self.options | changes))

    def validation_protocol(self) -> dict[str, Any]:
        """What validation numbers depend on besides the weights."""
        return {
            "summaries": self.validation_corpus.identity,
            "split": self.validation_split,
            "max_eval_pairs": self.max_eval_pairs,
            "targets": "tokens of the summaries and their ends, each once",
            **{name: value for name, value in self.options.items() if name != "loss_on"},
        }

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage reads and check it.

        Raises:
            FileNotFoundError: a split is missing.
            ValueError: a split is damaged, the two have different tokenizers, or the marker does not fit.
        """
        if stage in (None, "fit"):
            if self.train_corpus.meta["tokenizer"] != self.validation_corpus.meta["tokenizer"]:
                raise ValueError(f"the splits {self.train_split} and {self.validation_split} have different tokenizers")
            layout = self.layout(self.train_corpus)
            cut = int((self.train_corpus.summary_lengths >= layout.max_summary_length).sum())
            if cut:
                rank_zero_warn(
                    f"{cut} of {len(self.train_corpus)} training summaries have more than max_summary_length="
                    f"{layout.max_summary_length} tokens with their end: they are trained on without their last ones"
                )
        self.layout(self.validation_corpus)

    def train_dataloader(self) -> PlainStateLoader:
        """All micro-batches of the run as one epoch, from the resumed step on."""
        self._check_chunks()
        dataset = SummaryBatches(
            self.train_corpus,
            self.layout(self.train_corpus),
            plan=self._plan(),
            length=self.max_steps * self.accumulate,
            training=True,
        )
        start = min(self.start_step * self.accumulate, len(dataset))
        return make_loader(dataset, start=start, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def val_dataloader(self) -> PlainStateLoader:
        """The validation pairs in their order, each once over all ranks."""
        store = self.validation_corpus
        plan = SequencePlan(min(len(store), self.max_eval_pairs or len(store)), self.batch_size, share=self._share())
        layout = self.layout(store, loss_on="summary")
        dataset = SummaryBatches(store, layout, plan=plan, length=plan.num_micro_batches, training=False)
        return make_loader(dataset, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, and which data it is."""
        return {
            "step": self.start_step if self.trainer is None else self.trainer.global_step,
            "micro_batch": self._micro_batch(),
            "identity": self.train_corpus.identity,
            "layout": dict(self.options),
            "seed": self.seed,
            "accumulate_grad_batches": self.accumulate,
            "samples_per_step": self.accumulate * self._plan().sequences_per_micro_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader at the stored step.

        Raises:
            ValueError: the checkpoint was made with other pairs, rows or another order, or in the middle of an
                optimiser step, whose gradient so far is lost.
        """
        mine = self.state_dict()
        for name in BOUND:
            if state_dict[name] != mine[name]:
                raise ValueError(
                    f"the checkpoint was trained with another {name}: {state_dict[name]}, now {mine[name]}; "
                    "resume with the old one or start a new run"
                )
        if state_dict["micro_batch"]:
            raise ValueError(
                f"the checkpoint was written inside optimiser step {state_dict['step']}, after micro-batch "
                f"{state_dict['micro_batch']} of {state_dict['accumulate_grad_batches']}: resume from one written after "
                "a step"
            )
        self.start_step = int(state_dict["step"])

    def _plan(self) -> SequencePlan:
        return SequencePlan(
            len(self.train_corpus),
            self.batch_size,
            accumulate=self.accumulate,
            seed=self.seed,
            shuffle=True,
            share=self._share(),
            endless=True,
        )

    def _check_chunks(self) -> None:
        """Refuse chunks of another size than the model's: rows would be aligned to nothing."""
        module = None if self.trainer is None else self.trainer.lightning_module
        size = getattr(getattr(getattr(module, "model", None), "config", None), "chunk_size", None)
        mine = self.options["chunk_size"]
        if isinstance(size, int) and self.options["alignment"] != "none" and size != mine:
            raise ValueError(f"the model has chunks of {size} tokens, the data of {mine}: pass data.chunk_size={size}")

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
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed % self.accumulate)
