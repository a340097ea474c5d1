"""The one batch dict that every datamodule yields and every Lightning module reads.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from typing import Required, TypedDict

import torch

IGNORED = -100
"""Label of a position that is not scored."""


class TokenBatch(TypedDict, total=False):
    """A micro-batch of B windows of T tokens; every tensor is int64.

    Attributes:
        input_ids: ``[B, T]`` tokens.
        labels: ``[B, T]`` un-shifted targets (position t is predicted at t - 1); -100 is ignored.
        attention_mask: ``[B, T]`` 1 for text, 0 for padding; absent when nothing is padded.
        document_ids: ``[B, T]`` number of the document a token belongs to, non-decreasing along T; present only
            with ``documents="packed"``. Whoever computes the loss ignores targets across a border.
        sample_index: ``[B]`` global number of the sample. Training: step * samples per optimiser step + index
            inside the step. Validation: number of the window.
        window_start: ``[B]`` corpus position of the first token.
        num_step_targets: scalar, targets of this rank in the whole optimiser step. Training only.
        next_token: ``[B]`` validation only: the token after the window, the target of position T - 1 (-100: none).
    """

    input_ids: Required[torch.Tensor]
    labels: Required[torch.Tensor]
    attention_mask: torch.Tensor
    document_ids: torch.Tensor
    sample_index: Required[torch.Tensor]
    window_start: Required[torch.Tensor]
    num_step_targets: torch.Tensor
    next_token: torch.Tensor
