"""What of a batch is this process's own, where several share every sequence.

B batch, T tokens of the sequence, L tokens of the own part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.context_parallel import Cut, SequenceGroup, SequencePart
from losses.cross_entropy import IGNORE_INDEX, next_token_nll

TARGETS = ("labels", "next_token")
# What no part of a sequence can have, and what to do: rows of text go without documents, pairs never without padding.
INSTEAD = {"document_ids": "data.documents=stream", "attention_mask": "trainer=ddp, or fsdp2"}


@dataclass(frozen=True)
class OwnTokens:
    """The tokens that this process computes.

    Attributes:
        batch: the part's ``input_ids``, ``labels`` [B, L], and ``next_token`` [B], the target of its last position.
        part: where they lie in the sequence; None: they are all of it, and no other process is needed.
    """

    batch: dict[str, Tensor]
    part: SequencePart | None = None

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of a model that computes the part."""
        return {"input_ids": self.batch["input_ids"], "part": self.part}

    def nll(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the whole sequence, float32 and bool ``[B, T]``: 0 and False at tokens of other processes.

        Args:
            logits: ``[B, L, V]``.
        """
        batch = self.batch
        nll, counted = next_token_nll(
            logits, batch["labels"], next_token=batch.get("next_token"), document_ids=batch.get("document_ids")
        )
        if self.part is None:
            return nll, counted
        around = (self.part.start, self.part.length - self.part.stop)
        return F.pad(nll, around), F.pad(counted, around)


@dataclass(frozen=True)
class SequenceSplit:
    """Deals the tokens of batches to the processes of a group.

    Attributes:
        group: processes that share every sequence; None: there is nothing to share.
        cut: where the model's sequences may be cut.
    """

    group: SequenceGroup | None = None
    cut: Cut | None = None

    @classmethod
    def over(cls, group: SequenceGroup | None, model: nn.Module, *, problem: str | None) -> SequenceSplit:
        """Split the sequences of a model.

        Args:
            group: as above.
            model: says where its sequences may be cut.
            problem: why the training method computes no parts of sequences; None: it does.

        Raises:
            ValueError: the model or the method does not.
        """
        cut: Cut | None = getattr(model, "sequence_cut", None)
        if cut is None:
            problem = f"{type(model).__name__} needs whole sequences"
        if group is not None and problem is not None:
            raise ValueError(
                f"{problem}, trainer=context_parallel splits them: use trainer=ddp, or fsdp2 if it is large"
            )
        return cls(group, cut)

    @property
    def num_copies(self) -> int:
        """Processes that read the same batches."""
        return 1 if self.group is None else self.group.size

    def own(self, batch: dict[str, Tensor]) -> OwnTokens:
        """Return the part of this process.

        Raises:
            ValueError: the sequence is too short, or the batch holds several documents or padding.
        """
        if self.group is None or self.cut is None:
            return OwnTokens(batch)
        for name, instead in INSTEAD.items():
            if name in batch:
                raise ValueError(f"a sequence with {name} cannot be split over processes: use {instead}")
        part = self.group.part(batch["input_ids"].shape[1], self.cut)
        own = {name: batch[name][:, part.start : part.stop] for name in ("input_ids", "labels")}
        if part.stop < part.length:
            own["next_token"] = batch["labels"][:, part.stop]
        elif "next_token" in batch:
            own["next_token"] = batch["next_token"]
        return OwnTokens(own, part)

    def own_or_whole(self, batch: dict[str, Tensor]) -> OwnTokens:
        """Return the part of this process; a sequence that is too short is computed by all and counted by the first."""
        if self.group is None or self.cut is None or self.cut.fits(batch["input_ids"].shape[1], self.group.size):
            return self.own(batch)
        if self.group.rank == 0:
            return OwnTokens(batch)
        nothing = {name: value.new_full(value.shape, IGNORE_INDEX) for name, value in batch.items() if name in TARGETS}
        return OwnTokens(batch | nothing)
