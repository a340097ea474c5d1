"""Training to find needles: text windows with needles planted, and validation on their answers.

Notable: what `datamodules.packed_text` promises holds here too: a sample is a pure function of (seed, step, index),
where the data stands is the optimiser step, and resuming is arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.corpus_format import digest
from datamodules.loading import PlainStateLoader
from datamodules.needle_batches import (
    LossOn,
    NeedleBatches,
    NeedlePlan,
    NeedleValidation,
    check_needle_length,
    stages_of,
)
from datamodules.needle_task import corpus_needle_task, id_range
from datamodules.niah import Kind, NeedleTask
from datamodules.packed_text import PackedTextDataModule
from datamodules.step_data import check_counts

__all__ = ["NeedleDataModule"]


class NeedleDataModule(PackedTextDataModule):
    """Needles in random windows of a corpus folder; validation scores the answers of fixed samples.

    Args:
        path: folder with one token corpus per split and ``tokenizer/``.
        context_length: tokens of a training window; a multiple of ``chunk_size`` where questions are aligned.
        batch_size: windows of a micro-batch on one rank.
        max_steps: optimiser steps of the whole run.
        chunk_size: text tokens of a chunk of the model.
        pad_token_id: what follows an aligned answer.
        kind: ``single``, ``multihop`` or ``multi``, see `datamodules.niah.NeedleTask`.
        key_length: tokens of a value in training.
        eval_key_length: tokens of a value in validation; None: as in training.
        num_hops: needles of a chain; None: as `NeedleTask`.
        num_distractors: chains that are not asked for; None: as `NeedleTask`.
        vocab_range: ids of values; None is the longest run of ids without special ones.
        special_token_ids: ids that no value may hold, besides those of the tokenizer.
        align_question: end questions on the first token of a chunk.
        loss_on: targets that count in training, ``all`` or those of the ``answer``.
        depths: grid of depths that the samples go through in turn; None draws places at random.
        curriculum: stages ``[first step, length, decoys]``: shorter windows to begin with, as many more of them to a
            batch; decoys, 0 where left out, are values without a template, written over the text.
        seed: seed of windows, values and places.
        accumulate_grad_batches: micro-batches of an optimiser step, as the trainer has it.
        eval_lengths: window lengths of validation; default the context length.
        eval_samples: samples of each of them.
        eval_batch_tokens: tokens of a validation batch; default ``batch_size * context_length``.
        train_split: folder of the training corpus.
        validation_split: folder of the validation corpus.
        num_workers: loader processes.
        pin_memory: page-lock batches for copies to a GPU.

    Raises:
        ValueError: an option out of range.
    """

    whole_rows = False  # answers are padded

    def __init__(
        self,
        path: str | Path,
        *,
        context_length: int,
        batch_size: int,
        max_steps: int,
        chunk_size: int,
        pad_token_id: int,
        kind: Kind = "single",
        key_length: int = 5,
        eval_key_length: int | None = None,
        num_hops: int | None = None,
        num_distractors: int | None = None,
        vocab_range: list[int] | None = None,
        special_token_ids: list[int | None] | None = None,
        align_question: bool = True,
        loss_on: LossOn = "all",
        depths: list[float] | None = None,
        curriculum: list[list[int]] | None = None,
        seed: int = 0,
        accumulate_grad_batches: int = 1,
        eval_lengths: list[int] | None = None,
        eval_samples: int = 64,
        eval_batch_tokens: int | None = None,
        train_split: str = "train",
        validation_split: str = "validation",
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__(
            path,
            context_length=context_length,
            batch_size=batch_size,
            max_steps=max_steps,
            seed=seed,
            accumulate_grad_batches=accumulate_grad_batches,
            eval_lengths=eval_lengths,
            eval_batch_tokens=eval_batch_tokens,
            train_split=train_split,
            validation_split=validation_split,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        check_counts({"eval_samples": eval_samples}, not_negative={"seed": seed})
        self.eval_samples, self.loss_on, self.depths = eval_samples, loss_on, depths
        self.kind, self.curriculum = kind, stages_of(curriculum)
        self.key_length = key_length
        self.eval_key_length = key_length if eval_key_length is None else eval_key_length
        self.task_options: dict[str, Any] = {"chunk_size": chunk_size, "pad_token_id": pad_token_id}
        self.task_options |= {"num_hops": num_hops, "num_distractors": num_distractors}
        self.task_options |= {"vocab_range": id_range(vocab_range), "special_token_ids": special_token_ids or []}
        self.task_options["align_question"] = align_question
        self._plans: dict[int, NeedlePlan] = {}

    def needles(self, key_length: int) -> NeedlePlan:
        """What is planted, with values of so many tokens."""
        if key_length not in self._plans:
            task = corpus_needle_task(self.path, self.kind, key_length=key_length, **self.task_options)
            self._plans[key_length] = NeedlePlan(task, self.loss_on, self.depths, self.curriculum)
        return self._plans[key_length]

    @property
    def task(self) -> NeedleTask:
        """The task trained on."""
        return self.needles(self.key_length).task

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage reads and check that needles fit.

        Raises:
            FileNotFoundError: a split or the tokenizer is missing.
            ValueError: a split is damaged or too short, or the needles do not fit.
        """
        if stage in (None, "fit"):
            self.needles(self.key_length).check(self.plan.context_length)
        super().setup(stage)
        for length in self.eval_lengths:
            check_needle_length(length, self.needles(self.eval_key_length).task)

    def train_dataloader(self) -> PlainStateLoader:
        """All micro-batches of the run as one epoch, from the resumed step on."""
        needles = self.needles(self.key_length)
        dataset = NeedleBatches(self.train_corpus, self.plan, needles, share=self._share())
        return self._training_loader(dataset)

    def validation_protocol(self) -> dict[str, Any]:
        """What validation numbers depend on besides the weights."""
        return {
            "corpus": self.validation_corpus.identity,
            "split": self.validation_split,
            "task": self.needles(self.eval_key_length).task.identity(),
            "samples": self.eval_samples,
            "targets": "the tokens of the answers",
        }

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, which data it is, and what is planted."""
        return super().state_dict() | {"needles": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader at the stored step.

        Raises:
            ValueError: as `PackedTextDataModule`, or the checkpoint was trained with other needles.
        """
        if state_dict.get("needles") != self._identity():
            raise ValueError(
                "the checkpoint was trained with other needles (kind, templates, values, places or loss): "
                "resume with the old options or start a new run"
            )
        super().load_state_dict(state_dict)

    def _identity(self) -> str:
        depths = None if self.depths is None else list(self.depths)
        stages = [[stage.start, stage.length, stage.decoys] for stage in self.curriculum]
        return digest([self.task.identity(), self.loss_on, depths, stages])

    def _validation_loader(self, length: int) -> PlainStateLoader:
        dataset = NeedleValidation(
            self.validation_corpus,
            self.needles(self.eval_key_length),
            length=length,
            num_samples=self.eval_samples,
            batch_size=max(1, self.eval_batch_tokens // length),
            share=self._share(),
        )
        return self._validation_loader_of(dataset)
