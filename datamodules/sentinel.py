"""Blocks of a token corpus for KV compression: with sentinels, or plain for the baselines.

Notable: where the data stands is one number, the optimiser step, and what a micro-batch holds is a pure function of its
number. All methods read the same blocks in the same order.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.corpus import TokenCorpus, open_split
from datamodules.loading import PlainStateLoader
from datamodules.scored_batches import SequencePlan
from datamodules.sentinel_blocks import BlockBatches, Blocks, PlainCollator, SentinelCollator
from datamodules.span_hints import SpanHints, hinted_spans
from datamodules.step_data import StepDataModule, check_counts
from patches.compressed_rows import METHODS, Method
from patches.sentinel.sampler import RECENT, SpanSampler, max_compression_ratio
from patches.sentinel.sentinels import Sentinels

DEFAULT_SAMPLER = SpanSampler()

__all__ = ["Blocks", "PlainCollator", "SentinelCollator", "SentinelTextDataModule"]


class SentinelTextDataModule(StepDataModule[TokenCorpus]):
    """Consecutive blocks of a corpus folder, shuffled every epoch, and those of its validation split in order.

    Batches hold ``input_ids`` [B, S]; for ``sentinel`` also ``kind`` and ``span``; for ``scattered`` ``keep``; in
    training ``num_step_targets``.

    Args:
        path: corpus folder (``python -m preprocess.tokenize`` makes one from text, JSON lines or parquet).
        sentinels: ids to insert; only ``sentinel`` needs them.
        method: as the module has it.
        sampler: chooses the spans; its ratio is also that of ``scattered``.
        context_length: original tokens of a block, T.
        batch_size: blocks of a micro-batch on one rank.
        max_steps: optimiser steps of the whole run.
        accumulate_grad_batches: micro-batches of an optimiser step, as the trainer has it.
        seed: of order and spans.
        resample: draw new spans every epoch.
        span_scores: of ``sampler.policy=low_information``: ``unigram``, or a folder with ``<split>.npy``, a number for
            each token of a split.
        ratios: compression ratios that the micro-batches of training take in turn, which then hold their number as
            ``ratio_index``; none: always that of the sampler.
        max_eval_blocks: validate on the first so many blocks.
        train_split: folder of the training corpus.
        validation_split: folder of the validation corpus.
        num_workers: loader processes.
        pin_memory: page-lock batches for copies to a GPU.

    Raises:
        ValueError: a number is too small, sentinels are missing, or spans cannot reach the ratio.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sentinels: Sentinels | None = None,
        method: Method = "sentinel",
        sampler: SpanSampler = DEFAULT_SAMPLER,
        context_length: int = 256,
        batch_size: int = 4,
        max_steps: int = 1,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
        resample: bool = True,
        span_scores: str | None = None,
        ratios: Sequence[float] = (),
        max_eval_blocks: int | None = None,
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
        self.sentinels, self.method, self.sampler = sentinels, method, sampler
        self.context_length, self.batch_size = context_length, batch_size
        self.max_steps, self.seed = max_steps, seed
        self.resample, self.ratios, self.max_eval_blocks = resample, tuple(ratios), max_eval_blocks
        self.span_scores = span_scores
        self._check_options()

    def _check_options(self) -> None:
        counts = {
            "batch_size": self.batch_size,
            "max_steps": self.max_steps,
            "accumulate_grad_batches": self.accumulate,
            "max_eval_blocks": self.max_eval_blocks,
        }
        check_counts(counts, not_negative={"seed": self.seed, "num_workers": self.num_workers})
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2 (a token and its target), got {self.context_length}")
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}, use one of {', '.join(METHODS)}")
        if self.method != "sentinel":
            return
        if self.sentinels is None:
            raise ValueError("method='sentinel' needs sentinels: pass what add_sentinels returned")
        for sampler in self._samplers():
            self._check_reach(sampler, self.sentinels)

    def _check_reach(self, options: SpanSampler, sentinels: Sentinels) -> None:
        self.hints(self.train_split)  # refuses what does not go together
        if options.policy == "published":  # which misses its ratio, but refuses options that it does not have
            options(self.context_length, slots=sentinels.slots, generator=random.Random(0))
        if options.policy in ("published", *RECENT):
            return
        reached = max_compression_ratio(
            self.context_length,
            min_length=options.min_length,
            max_length=options.max_length,
            slots=sentinels.slots,
            protect_head=options.protect_head,
            protect_tail=options.protect_tail,
        )
        if int(options.compression_ratio * self.context_length + 0.5) > round(reached * self.context_length):
            raise ValueError(
                f"compression_ratio={options.compression_ratio} is out of reach: spans of {options.min_length} to "
                f"{options.max_length} tokens with {sentinels.slots} slots in blocks of {self.context_length} "
                f"remove at most {reached:.4f}; lower it, or raise sampler.max_length"
            )

    def _open(self, split: str) -> TokenCorpus:
        return open_split(self.path, split)

    @cached_property
    def train_blocks(self) -> Blocks:
        """The blocks of the training split."""
        return Blocks(self.train_corpus, self.context_length)

    @cached_property
    def validation_blocks(self) -> Blocks:
        """The blocks of the validation split."""
        return Blocks(self.validation_corpus, self.context_length, max_blocks=self.max_eval_blocks)

    @property
    def eval_lengths(self) -> list[int]:
        """Lengths of validation: that of a block."""
        return [self.context_length]

    @property
    def tokens_per_step(self) -> int:
        """Original tokens of an optimiser step over all ranks."""
        return self._share().num_ranks * self.accumulate * self.batch_size * self.context_length

    def validation_protocol(self) -> dict[str, Any]:
        """What validation numbers depend on besides the weights."""
        return {
            "corpus": self.validation_corpus.identity,
            "split": self.validation_split,
            "blocks": len(self.validation_blocks),
            "block_length": self.context_length,
            "method": self.method,
            "compression_ratio": self.sampler.compression_ratio,
            "targets": "every original token of a block but its first, once",
        }

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage reads.

        Raises:
            FileNotFoundError: a split is missing.
            ValueError: a split is damaged or shorter than a block, the two have different tokenizers, or the trainer
                accumulates otherwise.
        """
        if stage in (None, "fit"):
            self._check_fit()
            _ = self.train_blocks
        _ = self.validation_blocks

    def train_dataloader(self) -> PlainStateLoader:
        """All micro-batches of the run as one epoch, from the resumed step on."""
        plan = SequencePlan(
            len(self.train_blocks),
            self.batch_size,
            accumulate=self.accumulate,
            seed=self.seed,
            shuffle=True,
            share=self._share(),
            endless=True,
        )
        length = self.max_steps * self.accumulate
        collates = [self.collator(sampler, self.train_split, resample=self.resample) for sampler in self._samplers()]
        dataset = BlockBatches(self.train_blocks, plan, *collates, length=length)
        return self._training_loader(dataset)

    def val_dataloader(self) -> PlainStateLoader:
        """The validation blocks in order, each once over all ranks; their spans are always the same."""
        plan = SequencePlan(len(self.validation_blocks), self.batch_size, share=self._share())
        collate = self.collator(self.sampler, self.validation_split, resample=False)
        return self._validation_loader_of(BlockBatches(self.validation_blocks, plan, collate))

    def _samplers(self) -> list[SpanSampler]:
        """The samplers that micro-batches of training take in turn."""
        mixed = [dataclasses.replace(self.sampler, compression_ratio=ratio) for ratio in self.ratios]
        return mixed or [self.sampler]

    def hints(self, split: str) -> SpanHints:
        """What the policy of the sampler may ask of the blocks of a split."""
        scores, train = self.span_scores, self.train_split
        return SpanHints(self.path, split, policy=self.sampler.policy, scores=scores, train_split=train)

    def spans_to_score(self, blocks: Sequence[Tensor], sampler: SpanSampler, split: str, *, seed: int = 0) -> Any:
        """Return the spans of the first blocks ``[T]`` of a split; None if the sampler needs only their length."""
        slots = 1 if self.sentinels is None else self.sentinels.slots
        return hinted_spans(blocks, sampler, self.hints(split), slots=slots, seed=seed)

    def collator(self, sampler: SpanSampler, split: str, *, resample: bool) -> SentinelCollator | PlainCollator:
        """What makes a batch of blocks for the method."""
        if self.method == "sentinel":
            assert self.sentinels is not None
            hints = self.hints(split)
            return SentinelCollator(self.sentinels, sampler, seed=self.seed, resample=resample, hints=hints)
        return PlainCollator(self.method, sampler.compression_ratio, seed=self.seed, resample=resample)

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, and which data it is."""
        return {
            **self._position(),
            "identity": self.train_corpus.identity,
            "seed": self.seed,
            "context_length": self.context_length,
            "blocks_per_step": self._share().num_ranks * self.accumulate * self.batch_size,
            "accumulate_grad_batches": self.accumulate,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader at the stored step.

        Raises:
            ValueError: the checkpoint was made with other data or another order, or in the middle of an optimiser step.
        """
        bound = ("identity", "seed", "context_length", "blocks_per_step")
        # Which ratio a block is read at depends on its micro-batch.
        self._go_on(state_dict, bound=(*bound, "accumulate_grad_batches") if self.ratios else bound)
