"""The losses of targets with a short context only, scored by the model that is trained.

Letters: B batch, C tokens, T = C - 1 targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from evaluation.equal_calls import EqualCalls
from losses.base_scoring import plan_windows, score_base_nll


@dataclass(frozen=True)
class ShortContexts:
    """Which short contexts there are, and how they are run; see `losses.base_scoring.score_base_nll`.

    Attributes:
        base_length: tokens of a short context.
        base_stride: distance of two short contexts.
        tail: what happens to a last window that does not fit.
        layout: how windows are laid out.
        windows_per_forward: bound of the windows scored at once.
        bos_token_id: token that replaces the first of every window in rows that begin with it.
        chunk_size: rows of the output head at once.

    Raises:
        ValueError: sizes of which no windows can be made.
    """

    base_length: int
    base_stride: int
    tail: Literal["align", "short", "strict"] = "align"
    layout: Literal["auto", "batched", "packed"] = "auto"
    windows_per_forward: int | None = None
    bos_token_id: int | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        plan_windows(2 * self.base_length, self.base_length, self.base_stride, "align")

    def nll(
        self, model: nn.Module, input_ids: Tensor, valid: Tensor, *, strategy: Strategy | None, parity: bool
    ) -> Tensor:
        """Loss of every target with a short context, float32 [B, T], NaN where there is none.

        Args:
            model: the causal LM.
            input_ids: int64 [B, C].
            valid: bool [B, T], the targets to score.
            strategy: the trainer's; under one that shards weights, the ranks wait for each other.
            parity: leave out the target behind the first window, as the published code does.
        """
        # Which windows are scored depends on the rows of a rank; a layer in slices is gathered by all ranks together.
        with EqualCalls(strategy, model, head_is_read=True) as calls:
            scores = score_base_nll(
                model,
                input_ids,
                valid=valid,
                base_length=self.base_length,
                base_stride=self.base_stride,
                tail=self.tail,
                layout=self.layout,
                windows_per_forward=self.windows_per_forward,
                bos_token_id=self.bos_token_id,
                chunk_size=self.chunk_size,
            )
            calls.meet()
        if parity:
            scores[:, self.base_length - 1 : self.base_length] = torch.nan
        return scores
