"""What the datamodules of a run of optimiser steps share: two splits of a folder, a position, loaders that start there.

Notable: where the data stands is one number, the optimiser step. What a step reads is a pure function of it, so
resuming is arithmetic and neither workers nor the number of ranks change what is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import lightning.pytorch as pl
from torch.utils.data import Dataset

from datamodules.loading import PlainStateLoader, Share, make_loader


class Split(Protocol):
    """What is asked of a split of any kind."""

    @property
    def meta(self) -> dict[str, Any]:
        """``meta.json``."""

    @property
    def identity(self) -> str:
        """Digest of content and options."""


SplitT = TypeVar("SplitT", bound=Split)


class StepDataModule(pl.LightningDataModule, Generic[SplitT]):
    """Data of a run of optimiser steps.

    Args:
        path: folder of the splits, with ``tokenizer/``.
        splits: names of the training and the validation split.
        accumulate: micro-batches of an optimiser step, as the trainer has it.
        num_workers: loader processes.
        pin_memory: page-lock batches for copies to a GPU.
    """

    whole_rows = False
    """Whether one text fills every row, without padding or, as long as ``documents`` says nothing else, borders."""

    def __init__(
        self, path: str | Path, *, splits: tuple[str, str], accumulate: int, num_workers: int, pin_memory: bool
    ):
        super().__init__()
        self.path, (self.train_split, self.validation_split) = Path(path), splits
        self.accumulate, self.num_workers, self.pin_memory = accumulate, num_workers, pin_memory
        self.start_step = 0

    @abstractmethod
    def _open(self, split: str) -> SplitT:
        """Open a split."""

    @cached_property
    def train_corpus(self) -> SplitT:
        """The training split, opened on first use."""
        return self._open(self.train_split)

    @cached_property
    def validation_corpus(self) -> SplitT:
        """The validation split, opened on first use."""
        return self._open(self.validation_split)

    @property
    def tokenizer_path(self) -> str | None:
        """Tokenizer folder beside the splits, None if there is none."""
        folder = self.path / "tokenizer"
        return str(folder) if folder.is_dir() else None

    def _check_fit(self) -> None:
        """Refuse splits of different tokenizers, and a trainer that accumulates otherwise.

        Raises:
            FileNotFoundError: a split is missing.
            ValueError: as said.
        """
        accumulate = self.accumulate if self.trainer is None else self.trainer.accumulate_grad_batches
        if accumulate != self.accumulate:
            raise ValueError(
                f"the trainer has accumulate_grad_batches={accumulate} and the data {self.accumulate}: "
                "give both the same"
            )
        if self.train_corpus.meta.get("tokenizer") != self.validation_corpus.meta.get("tokenizer"):
            raise ValueError(f"the splits {self.train_split} and {self.validation_split} have different tokenizers")

    def _position(self) -> dict[str, int]:
        """Say where the data stands: the step, and the micro-batches that are done of it."""
        if self.trainer is None:
            return {"step": self.start_step, "micro_batch": 0}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return {"step": self.trainer.global_step, "micro_batch": int(done % self.accumulate)}

    def _go_on(self, state: Mapping[str, Any], *, bound: Iterable[str]) -> None:
        """Start the next training loader at a stored step.

        Args:
            state: what ``state_dict`` gave.
            bound: names of what must be now as it was then.

        Raises:
            ValueError: it is not, or the state is of the middle of an optimiser step, whose gradient so far is lost.
        """
        if state.get("micro_batch"):
            raise ValueError(
                f"the checkpoint was written inside optimiser step {state['step']}, after micro-batch "
                f"{state['micro_batch']} of {state['accumulate_grad_batches']}: resume from one written after a step"
            )
        mine = self.state_dict()
        for name in bound:
            if state.get(name) != mine[name]:
                meaning = "corpus identity" if name == "identity" else name
                raise ValueError(
                    f"the checkpoint was trained with another {meaning}: {state.get(name)}, now {mine[name]}; "
                    "resume with the old one or start a new run"
                )
        self.start_step = int(state["step"])

    def _share(self) -> Share:
        return share_of(self.trainer)

    def _training_loader(self, dataset: Dataset[Any]) -> PlainStateLoader:
        """All micro-batches of the run as one epoch, from the resumed step on."""
        start = min(self.start_step * self.accumulate, len(dataset))  # type: ignore[arg-type]
        return make_loader(dataset, start=start, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def _validation_loader_of(self, dataset: Dataset[Any]) -> PlainStateLoader:
        return make_loader(dataset, num_workers=self.num_workers, pin_memory=self.pin_memory)


def share_of(trainer: pl.Trainer | None) -> Share:
    """Return the share of this process; without a trainer it reads everything."""
    if trainer is None:
        return Share()
    # Strategies that split more than the batch (tensor parallelism) know the data-parallel rank.
    ranks = getattr(trainer.strategy, "distributed_sampler_kwargs", {"rank": 0, "num_replicas": 1})
    return Share(ranks["rank"], ranks["num_replicas"])


def check_counts(counts: Mapping[str, int | None], *, not_negative: Mapping[str, int]) -> None:
    """Refuse counts below 1 (None is no count), and numbers below 0.

    Raises:
        ValueError: as said; names what is too small.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if min(not_negative.values()) < 0:
        values = " and ".join(map(str, not_negative.values()))
        raise ValueError(f"{' and '.join(not_negative)} must not be negative, got {values}")
