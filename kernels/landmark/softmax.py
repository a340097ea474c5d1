"""The grouped softmax as two softmaxes: over blocks, and inside each block.

Notable: the own block takes part like any other, with the log-sum-exp of its visible tokens in the place of a landmark
score. That makes the rule one product of two ordinary softmaxes, for any number of blocks.

Legend: Tq queries, Tk keys, N blocks, C keys of a block.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def check_block_size(block_size: int) -> None:
    """Raise a ValueError unless a block has a token beside its landmark."""
    if block_size < 2:
        raise ValueError(f"block_size counts the landmark and must be at least 2, got {block_size}")


def grouped_probs(scores: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return the probabilities of `kernels.landmark.landmark_grouped_softmax`, in float32 at least.

    Args:
        scores: ``[..., Tq, Tk]``.
        positions: ``[..., Tq]`` int64, broadcastable.
        block_size: C.
    """
    num_keys = scores.shape[-1]
    missing = -num_keys % block_size
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # Keys that fill the last block lie behind every query.
    scores = F.pad(scores, (0, missing)) if missing else scores
    blocks = scores.unflatten(-1, (-1, block_size))  # [..., Tq, N, C]
    tokens, landmarks = blocks[..., :-1], blocks[..., -1]
    number = torch.arange(landmarks.shape[-1], device=scores.device)
    own, cell = (positions // block_size)[..., None], (positions % block_size)[..., None, None]
    later = torch.arange(block_size - 1, device=scores.device) > cell
    tokens = tokens.masked_fill((number == own)[..., None] & later, float("-inf"))
    inside = torch.logsumexp(tokens, dim=-1)
    shares = torch.where(number < own, landmarks, inside).masked_fill(number > own, float("-inf"))
    probs = torch.exp(tokens + (torch.log_softmax(shares, dim=-1) - inside)[..., None])
    return F.pad(probs, (0, 1)).flatten(-2)[..., :num_keys]
