"""Micro-batches of needle samples as pure functions of their number.

Notable: the haystack of a sample is the window that plain training would read there; values and places follow from
(seed, number of the sample). Workers, ranks and interruptions change nothing.

Letters: B samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.batch import IGNORED, TokenBatch
from datamodules.corpus import TokenCorpus
from datamodules.loading import Share, TrainingPlan
from datamodules.niah import Int64Array, NeedleSample, NeedleTask
from datamodules.windows import window_start

LossOn = Literal["all", "answer"]


@dataclass(frozen=True)
class Stage:
    """Samples from one step on.

    Attributes:
        start: first optimiser step.
        length: T.
        decoys: bare values, without a template, that are written over text of the haystack: retrieval that looks for
            their tokens alone takes them for needles.
    """

    start: int
    length: int
    decoys: int = 0


@dataclass(frozen=True)
class NeedlePlan:
    """What is planted, and what counts.

    Attributes:
        task: templates, values and places.
        loss_on: targets that count, ``"all"`` or those of the answer.
        depths: grid of depths that the samples go through in turn; None draws places at random.
        curriculum: stages in order; empty: always the full context length, without decoys.
    """

    task: NeedleTask
    loss_on: LossOn = "all"
    depths: Sequence[float] | None = None
    curriculum: Sequence[Stage] = ()

    def check(self, context_length: int) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: an option out of range, or needles that do not fit a length of the curriculum.
        """
        if self.loss_on not in get_args(LossOn):
            raise ValueError(f"loss_on is one of {', '.join(get_args(LossOn))}, got {self.loss_on}")
        check_depths(self.depths, self.task)
        starts = [stage.start for stage in self.curriculum]
        if starts and (starts[0] != 0 or sorted(set(starts)) != starts):
            raise ValueError(f"curriculum begins with step 0 and its steps ascend, got {starts}")
        for stage in (Stage(0, context_length), *self.curriculum):
            check_needle_length(stage.length, self.task)
            if stage.length > context_length:
                raise ValueError(f"the curriculum exceeds context_length={context_length}: {stage.length}")
            if not 0 <= stage.decoys * self.task.key_length <= stage.length:
                raise ValueError(f"{stage.decoys} decoys of {self.task.key_length} tokens do not fit {stage.length}")

    def stage_at(self, step: int, context_length: int) -> Stage:
        """Return what holds at an optimiser step."""
        past = [stage for stage in self.curriculum if stage.start <= step]
        return past[-1] if past else Stage(0, context_length)

    def build(self, haystack: Int64Array, *, seed: int, number: int, decoys: int = 0) -> NeedleSample:
        """Build sample ``number`` in a haystack ``[T]``."""
        depth = None if self.depths is None else self.depths[number % len(self.depths)]
        if decoys:
            generator = np.random.default_rng([seed, number, 1])
            size = self.task.key_length
            places = generator.integers(len(haystack) - size + 1, size=decoys)
            values = generator.integers(*self.task.vocab_range, size=(decoys, size))
            haystack = haystack.copy()
            haystack[places[:, None] + np.arange(size)] = values
        return self.task.build(haystack, seed=seed, index=number, depth=depth)


def stages_of(curriculum: Sequence[Sequence[int]] | None) -> list[Stage]:
    """Return the stages of a curriculum given as ``[first step, length]`` or ``[first step, length, decoys]`` each.

    Raises:
        ValueError: anything else.
    """
    if any(len(stage) not in (2, 3) for stage in curriculum or []):
        raise ValueError(f"curriculum is a list of [first step, length, decoys], got {curriculum}")
    return [Stage(*(int(number) for number in stage)) for stage in curriculum or []]


def check_depths(depths: Sequence[float] | None, task: NeedleTask) -> None:
    """Refuse a grid of depths that is empty, out of range, or of several needles.

    Raises:
        ValueError: as said.
    """
    if depths is None:
        return
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths must be numbers between 0 and 1, got {list(depths)}")
    if task.kind != "single":
        raise ValueError(f"depths place a single needle, kind={task.kind} has {task.num_needles}: leave depths out")


def check_needle_length(length: int, task: NeedleTask) -> None:
    """Refuse a length that cannot hold the needles, or in which an aligned question would not be aligned.

    Raises:
        ValueError: as said.
    """
    task.room(length)
    if task.align_question and length % task.chunk_size:
        raise ValueError(
            f"an aligned question needs a length that is a multiple of chunk_size={task.chunk_size}, got {length}: "
            f"use {length - length % task.chunk_size} or align_question=false"
        )


class NeedleBatches(Dataset[TokenBatch]):
    """Training micro-batches; with a shorter T there are more samples, so that no step has more tokens than others."""

    def __init__(self, corpus: TokenCorpus, plan: TrainingPlan, needles: NeedlePlan, *, share: Share):
        self.corpus, self.plan, self.needles, self.share = corpus, plan, needles, share
        shortest = min([stage.length for stage in needles.curriculum], default=plan.context_length)
        # Samples are numbered as if every step had as many as the one with the most: no number comes twice.
        windows = plan.batch_size * (plan.context_length // shortest)
        self._samples_per_step = share.num_ranks * plan.accumulate * windows

    def __len__(self) -> int:
        return self.plan.max_steps * self.plan.accumulate

    def __getitem__(self, micro_batch: int) -> TokenBatch:
        plan = self.plan
        step, part = divmod(micro_batch, plan.accumulate)
        stage = self.needles.stage_at(step, plan.context_length)
        length = stage.length
        size = plan.batch_size * (plan.context_length // length)
        first = (self.share.rank * plan.accumulate + part) * size
        starts, samples, numbers = [], [], []
        for index in range(first, first + size):
            start = window_start(plan.seed, step, index, num_tokens=len(self.corpus), length=length)
            number = step * self._samples_per_step + index
            haystack = self.corpus.read(start, start + length)
            samples.append(self.needles.build(haystack, seed=plan.seed, number=number, decoys=stage.decoys))
            starts.append(start)
            numbers.append(number)
        return needle_batch(samples, numbers, starts, loss_on=self.needles.loss_on)


class NeedleValidation(Dataset[TokenBatch]):
    """Batches of the first samples of one length, dealt to the ranks in turn; only answers count.

    Sample i has the haystack from token (i T) mod (n - T + 1) on, as in the evaluation of needles.
    """

    def __init__(
        self, corpus: TokenCorpus, needles: NeedlePlan, *, length: int, num_samples: int, batch_size: int, share: Share
    ):
        self.corpus, self.needles, self.length = corpus, needles, length
        batches = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]
        self.rows = batches[share.rank :: share.num_ranks]
        self.num_batches, self.filler = -(-len(batches) // share.num_ranks), batches[0]

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> TokenBatch:
        # Ranks that share a model must call it equally often.
        scored = number < len(self.rows)
        numbers = self.rows[number] if scored else self.filler
        places = len(self.corpus) - self.length + 1
        starts = [i * self.length % places for i in numbers]
        haystacks = [self.corpus.read(start, start + self.length) for start in starts]
        samples = [self.needles.build(text, seed=0, number=i) for i, text in zip(numbers, haystacks, strict=True)]
        batch = needle_batch(samples, numbers, starts, loss_on="answer")
        if not scored:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        return batch


def needle_batch(
    samples: Sequence[NeedleSample], numbers: Sequence[int], starts: Sequence[int], *, loss_on: LossOn
) -> TokenBatch:
    """Stack samples ``[B, T]``; with ``loss_on="answer"`` only targets of answers keep their label."""
    labels = np.stack([sample.labels for sample in samples])
    if loss_on == "answer":
        for row, sample in zip(labels, samples, strict=True):
            row[: sample.answer_start] = IGNORED
    return TokenBatch(
        input_ids=torch.from_numpy(np.stack([sample.input_ids for sample in samples])),
        labels=torch.from_numpy(labels),
        attention_mask=torch.from_numpy(np.stack([sample.attention_mask for sample in samples])),
        sample_index=torch.tensor(list(numbers), dtype=torch.int64),
        window_start=torch.tensor(list(starts), dtype=torch.int64),
    )
