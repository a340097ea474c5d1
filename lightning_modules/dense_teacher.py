"""Distillation from the model itself: its adapters off, its past not compressed.

Letters: B batch, T original tokens, S columns of a row with sentinels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.distillation import distillation_loss
from losses.output_head import evaluation_mode
from patches.compressed_rows import Compression, forward_under, plain_rows
from patches.sentinel import SpanLayout
from patches.sentinel.sentinels import Sentinels


@dataclass(frozen=True)
class DenseTeacher:
    """How much the divergence from the dense model counts.

    Attributes:
        weight: of the divergence; 0: there is no teacher.
        temperature: of both distributions in it.

    Raises:
        ValueError: a number out of range.
    """

    weight: float
    temperature: float

    def __post_init__(self) -> None:
        if self.weight < 0 or not self.temperature > 0:
            raise ValueError(
                "distillation_weight must be at least 0 and distillation_temperature above 0, "
                f"got {self.weight} and {self.temperature}"
            )

    @torch.no_grad()
    def logits(self, model: Any, layout: SpanLayout, document_ids: Tensor | None) -> Tensor:
        """Logits [B, T, V] of the dense model on the original tokens.

        Args:
            model: with adapters.
            layout: the rows of the student.
            document_ids: int64 [B, S]; documents do not see each other.
        """
        at = layout.plain_index.clamp(min=0)
        rows = plain_rows(layout.input_ids.gather(1, at), layout.plain_index >= 0)
        documents = None if document_ids is None else document_ids.gather(1, at)
        with evaluation_mode(model), model.disable_adapter():
            return forward_under(model, rows, Compression("dense").rule(rows, document_ids=documents))

    def divergence(
        self, student: Tensor, teacher: Tensor, layout: SpanLayout, *, exclude: Sentinels | None
    ) -> tuple[Tensor, Tensor]:
        """Divergence of the student [B, S, V] from the teacher [B, T, V] where a token follows, and their number.

        Args:
            student: its logits on the rows of the layout.
            teacher: what `logits` returned.
            layout: the rows.
            exclude: sentinels that neither distribution holds.
        """
        at = layout.plain_index[:, :-1].clamp(min=0)
        student = student.gather(1, at[..., None].expand(-1, -1, student.shape[-1]))
        excluded = () if exclude is None else exclude.ids
        follows = layout.plain_index[:, 1:] >= 0
        return distillation_loss(student, teacher[:, :-1], follows, temperature=self.temperature, exclude_ids=excluded)
