"""Landmark attention: one softmax over the own block and the landmarks, one inside each block that a landmark opens.

Legend: B batch, Tq queries, Tk keys, H heads, G kv heads, D head size, C keys of a block (its landmark is the last).
"""

import torch
from torch import Tensor

from kernels.landmark.softmax import check_block_size, grouped_probs
from kernels.landmark.tiled import TiledAttention

__all__ = ["landmark_attention", "landmark_grouped_softmax"]


def landmark_grouped_softmax(scores: Tensor, block_size: int, *, positions: Tensor | None = None) -> Tensor:
    """Turn scores into landmark probabilities.

    Key j belongs to block ``j // C`` and is its landmark when ``j % C == C - 1``. For a query in block b, with
    ``L_n = landmark score of n`` for n < b and ``L_b = logsumexp`` over the own tokens up to the query:
    ``p_j = softmax_n(L)[block of j] * softmax(tokens of that block)[j]``; landmarks and later keys get 0. So the own
    tokens and the earlier landmarks share one softmax, and each landmark hands its share to its block.

    Args:
        scores: ``[..., Tq, Tk]``; computed in float32 at least.
        block_size: C, landmark included.
        positions: key position of each query, int64, broadcastable to ``[..., Tq]``; None: query i is key i.

    Returns:
        ``[..., Tq, Tk]`` in the dtype of ``scores``; rows sum to 1.

    Raises:
        ValueError: on a block of fewer than two keys, or more queries than keys without positions.
    """
    check_block_size(block_size)
    if positions is None:
        if scores.shape[-2] > scores.shape[-1]:
            raise ValueError(f"without positions query i is key i, got scores of shape {list(scores.shape)}")
        positions = torch.arange(scores.shape[-2], device=scores.device)
    return grouped_probs(scores, positions, block_size).to(scores.dtype)


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend with `landmark_grouped_softmax` of ``scale q . k``; memory linear in the keys.

    Args:
        q: ``[B, Tq, H, D]``, any float type; scores are float32 at least.
        k: ``[B, Tk, G, D]`` in the dtype of ``q``, H a multiple of G.
        v: ``[B, Tk, G, D]``.
        block_size: C, landmark included.
        positions: key position of each query ``[B, Tq]`` int64; None: query i is key i.
        scale: factor of the scores; None = ``D ** -0.5``.

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_block_size(block_size)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"expected q [B, Tq, H, D], k and v [B, Tk, G, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if positions is None and q.shape[1] > k.shape[1]:
        raise ValueError(f"without positions query i is key i, got {q.shape[1]} queries and {k.shape[1]} keys")
    if positions is not None and positions.shape != q.shape[:2]:
        raise ValueError(f"positions must be [B, Tq] = {list(q.shape[:2])}, got {list(positions.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):  # scores and softmax stay in the accumulation type
        return TiledAttention.apply(q, k, v, positions, block_size, scale)
