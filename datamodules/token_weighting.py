"""Training on whole sequences, each with the scores of its targets; validation on other sequences.

Notable: where the data stands is one number, the micro-batches of the run so far, and what each of them reads is a pure
function of that number, so resuming is arithmetic. Scores are joined by number, travel as int32 bits, and every batch
announces the targets of its optimiser step, by which the loss is divided.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from datamodules.loading import OffsetSampler, PlainStateLoader, Share
from datamodules.score_store import ScoreStore, check_sequences
from datamodules.scored_batches import EpochSampler, ScoredBatch, SequenceBatches, SequencePlan
from datamodules.sequence_store import SequenceStore, open_sequences
from datamodules.step_data import check_counts, share_of

__all__ = ["ScoreStore", "ScoredBatch", "ScoredSequencesDataModule", "SequenceStore"]


class ScoredSequencesDataModule(pl.LightningDataModule):
    """Batches of a sequence store (see ``datamodules.scored_batches.ScoredBatch``).

    With several processes the trainer must have ``use_distributed_sampler=False``: the module deals the sequences to
    the ranks itself.

    Args:
        sequences: sequence store to train on, or its path.
        scores: score store of these sequences, or its path; None trains without scores.
        validation: sequence store to validate on, or its path: in the order of the store, without scores and without
            ``num_step_targets``.
        batch_size: sequences of a micro-batch on one rank.
        accumulate_grad_batches: micro-batches of an optimiser step, as the trainer has it.
        seed: of the order.
        shuffle: every epoch is a permutation by (seed, epoch); False keeps the order of the store.
        num_workers: loader processes.
        pin_memory: page-lock batches for copies to a GPU.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(
        self,
        sequences: SequenceStore | str | Path,
        scores: ScoreStore | str | Path | None = None,
        *,
        validation: SequenceStore | str | Path | None = None,
        batch_size: int = 1,
        accumulate_grad_batches: int = 1,
        seed: int = 42,
        shuffle: bool = True,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__()
        check_counts(
            {"batch_size": batch_size, "accumulate_grad_batches": accumulate_grad_batches},
            not_negative={"seed": seed, "num_workers": num_workers},
        )
        self._sequences, self._scores, self._validation = sequences, scores, validation
        self.batch_size, self.accumulate, self.seed, self.shuffle = batch_size, accumulate_grad_batches, seed, shuffle
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.start = 0

    @cached_property
    def sequences(self) -> SequenceStore:
        """The training sequences, opened on first use."""
        return open_sequences(self._sequences)

    @cached_property
    def scores(self) -> ScoreStore | None:
        """Their scores, opened on first use; None without."""
        scores = self._scores
        if scores is None:
            return None
        opened = scores if isinstance(scores, ScoreStore) else ScoreStore(scores, self.sequences)
        check_sequences(opened.path, opened.manifest, self.sequences.store_id)
        return opened

    @cached_property
    def validation(self) -> SequenceStore | None:
        """The validation sequences, opened on first use; None without."""
        return None if self._validation is None else open_sequences(self._validation)

    @property
    def train_corpus(self) -> SequenceStore:
        """The training sequences."""
        return self.sequences

    @property
    def validation_corpus(self) -> SequenceStore | None:
        """The validation sequences."""
        return self.validation

    @property
    def tokenizer_path(self) -> str | None:
        """Tokenizer folder beside the store, None if there is none."""
        folder = self.sequences.path.parent / "tokenizer"
        return str(folder) if folder.is_dir() else None

    def validation_protocol(self) -> dict[str, Any]:
        """What validation numbers depend on besides the weights."""
        store = self.validation
        return {
            "sequences": None if store is None else store.store_id,
            "length": None if store is None else store.length,
            "bos_token_id": None if store is None else store.bos_token_id,
            "windows": "whole sequences of one document each, every target once",
        }

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage reads and check it against the trainer.

        Raises:
            FileNotFoundError: a store is missing.
            ValueError: a store is damaged, the scores are of other sequences, or the trainer deals samples itself or
                accumulates otherwise.
        """
        if stage in (None, "fit"):
            accumulate = self.accumulate if self.trainer is None else self.trainer.accumulate_grad_batches
            if accumulate != self.accumulate:
                raise ValueError(
                    f"the trainer has accumulate_grad_batches={accumulate} and the data {self.accumulate}: "
                    "num_step_targets would be wrong; give both the same"
                )
            self._training_batches()
        self._validation_batches()

    def train_dataloader(self) -> PlainStateLoader:
        """The micro-batches of the run, or of an epoch if the trainer has no ``max_steps``; from the resumed one on."""
        return self._loader(self._training_batches(), start=self._position())

    def val_dataloader(self) -> list[PlainStateLoader]:
        """One loader of the validation sequences, each once over all ranks; none without them."""
        dataset = self._validation_batches()
        return [] if dataset is None else [self._loader(dataset)]

    def state_dict(self) -> dict[str, Any]:
        """Say where the data stands, and which data it is."""
        plan = self._training_batches().plan
        return {
            "micro_batches": self._position(),
            "accumulate": self.accumulate,
            "sequences": self.sequences.store_id,
            "scores": None if self.scores is None else self.scores.manifest_id,
            "seed": self.seed,
            "shuffle": self.shuffle,
            **self._order_of(plan),
        }

    def _order_of(self, plan: SequencePlan) -> dict[str, Any]:
        """What else decides which sequences a step reads: of a run of steps, how many they are."""
        if plan.endless:
            return {"run_length": "steps", "sequences_per_step": plan.sequences_per_micro_batch * self.accumulate}
        return {
            "run_length": "epochs",
            "accumulate_grad_batches": self.accumulate,
            "sequences_per_micro_batch": plan.sequences_per_micro_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next training loader where the state says.

        Raises:
            ValueError: the checkpoint was made with other data or another order, or in the middle of an optimiser
                step, whose gradient so far is lost.
        """
        mine = self.state_dict()
        for name in ("run_length", *sorted(mine.keys() - {"micro_batches", "accumulate", "run_length"})):
            if state_dict.get(name) != mine[name]:
                raise ValueError(
                    f"the checkpoint was trained with another {name}: {state_dict.get(name)}, now {mine[name]}; "
                    "resume with the old one or start a new run"
                )
        plan, start, accumulate = self._training_batches().plan, state_dict["micro_batches"], state_dict["accumulate"]
        inside = start % accumulate if plan.endless else plan.place_in_step(start)
        if inside:
            raise ValueError(
                f"the checkpoint was written inside an optimiser step, after micro-batch {inside} of "
                f"{accumulate}: resume from one written after a step"
            )
        # A step may now have another number of micro-batches.
        self.start = start // accumulate * self.accumulate if plan.endless else start

    def _position(self) -> int:
        """Return the micro-batch that comes next, counted from the beginning of the run."""
        seen = float("inf") if self.trainer is None else self.trainer.num_training_batches
        if self.trainer is None or seen == float("inf"):
            return self.start  # the loader of this run is still to be built
        # The total is right inside every hook; the counts of the epoch are reset late, that of epochs goes up early.
        done = int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)
        epoch, number = divmod(done, max(1, int(seen)))
        return epoch * len(self._training_batches()) + number

    def _training_batches(self) -> SequenceBatches:
        # Lightning resumes a run of steps badly at the end of an epoch, so such a run is one epoch for it, unless the
        # user cuts epochs short.
        trainer = self.trainer
        endless = trainer is not None and trainer.max_steps >= 0 and trainer.limit_train_batches == 1.0
        plan = SequencePlan(
            len(self.sequences),
            self.batch_size,
            accumulate=self.accumulate,
            seed=self.seed,
            shuffle=self.shuffle,
            share=self._share(),
            endless=endless,
        )
        rest = 0 if endless else plan.num_micro_batches % self.accumulate
        if rest and trainer is not None and trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{plan.num_micro_batches} micro-batches of an epoch are no multiple of accumulate_grad_batches="
                f"{self.accumulate}, and this strategy does not end a step with the epoch: state max_steps"
            )
        length = trainer.max_steps * self.accumulate if trainer is not None and endless else None
        return SequenceBatches(self.sequences, self.scores, plan=plan, training=True, length=length)

    def _validation_batches(self) -> SequenceBatches | None:
        if self.validation is None:
            return None
        plan = SequencePlan(len(self.validation), self.batch_size, share=self._share())
        return SequenceBatches(self.validation, None, plan=plan, training=False)

    def _share(self) -> Share:
        share = share_of(self.trainer)
        if share.num_ranks > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"{share.num_ranks} processes need Trainer(use_distributed_sampler=False): the datamodule deals the "
                "sequences to the ranks itself, and a sampler on top would shuffle and split them again"
            )
        return share

    def _loader(self, dataset: SequenceBatches, start: int = 0) -> PlainStateLoader:
        data: Any = dataset
        length = len(dataset)
        whole_run = dataset.plan.endless
        return PlainStateLoader(
            data,
            batch_size=None,
            sampler=OffsetSampler(data, min(start, length)) if whole_run else EpochSampler(length, start),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Of its own, lest iterators draw worker seeds from the global random state, which would change dropout.
            generator=torch.Generator().manual_seed(0),
        )
