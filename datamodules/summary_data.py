"""Training on documents with their summaries, every pair once in an epoch; validation on other pairs.

Notable: where the data stands is one number, the optimiser step. The orders of the epochs follow each other without a
seam and are pure functions of (seed, epoch), so resuming is arithmetic. Every batch announces the targets of its
optimiser step, by which the loss is divided: a long summary counts for as much as its tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.loading import PlainStateLoader
from datamodules.scored_batches import SequencePlan
from datamodules.step_data import StepDataModule, check_counts
from datamodules.summarization import Alignment, LossOn, SummaryLayout
from datamodules.summary_batches import SummaryBatches
from datamodules.summary_store import SummaryStore, open_summaries

BOUND = ("identity", "layout", "seed", "samples_per_step")


class SummarizationDataModule(StepDataModule[SummaryStore]):
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
        super().__init__(
            path,
            splits=(train_split, validation_split),
            accumulate=accumulate_grad_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        counts = {"context_length": context_length, "batch_size": batch_size, "max_steps": max_steps}
        counts |= {"accumulate_grad_batches": accumulate_grad_batches}
        check_counts(
            {**counts, "max_eval_pairs": max_eval_pairs}, not_negative={"seed": seed, "num_workers": num_workers}
        )
        self.batch_size, self.max_steps, self.seed = batch_size, max_steps, seed
        self.max_eval_pairs, self.eval_lengths = max_eval_pairs, [context_length]
        self.options: dict[str, Any] = {
            "max_length": context_length,
            "max_summary_length": max_summary_length,
            "chunk_size": chunk_size,
            "alignment": alignment,
            "pad_token_id": pad_token_id,
            "loss_on": loss_on,
        }
        SummaryLayout((0,), **self.options)  # refuses impossible sizes now

    def _open(self, split: str) -> SummaryStore:
        return open_summaries(self.path, split=split)

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
            ValueError: a split is damaged, the two have different tokenizers, the marker does not fit, or the trainer
                accumulates otherwise.
        """
        if stage in (None, "fit"):
            self._check_fit()
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
        return self._training_loader(dataset)

    def val_dataloader(self) -> PlainStateLoader:
        """The validation pairs in their order, each once over all ranks."""
        store = self.validation_corpus
        plan = SequencePlan(min(len(store), self.max_eval_pairs or len(store)), self.batch_size, share=self._share())
        layout = self.layout(store, loss_on="summary")
        dataset = SummaryBatches(store, layout, plan=plan, length=plan.num_micro_batches, training=False)
        return self._validation_loader_of(dataset)

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, and which data it is."""
        return {
            **self._position(),
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
        self._go_on(state_dict, bound=BOUND)

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
