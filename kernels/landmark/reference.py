"""Landmark attention, one query and one block at a time.

Legend: B batch, Tq queries, Tk keys, H heads, G kv heads, D head size, C keys of a block.
"""

import torch
from torch import Tensor


def landmark_softmax_row(scores: Tensor, position: int, block_size: int) -> Tensor:
    """Return the probabilities ``[Tk]`` of one query at ``position`` from its scores ``[Tk]``, in their float type.

    The visible tokens of the own block and the landmarks of earlier blocks share a softmax; the share of a landmark
    is spread over the tokens of its block by a softmax of their own.
    """
    own_block = position // block_size
    start = own_block * block_size
    own = [key for key in range(start, position + 1) if key % block_size != block_size - 1]
    landmarks = [block * block_size + block_size - 1 for block in range(own_block)]
    top = torch.softmax(scores[own + landmarks], dim=0)
    probs = torch.zeros_like(scores)
    probs[own] = top[: len(own)]
    for block, share in enumerate(top[len(own) :]):
        tokens = slice(block * block_size, (block + 1) * block_size - 1)
        probs[tokens] = share * torch.softmax(scores[tokens], dim=0)
    return probs


def landmark_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, *, positions: Tensor, scale: float
) -> Tensor:
    """Compute ``out_i = sum_j p_j v_j`` row by row, with ``p`` of `landmark_softmax_row` of ``scale q_i . k_j``.

    Args:
        q: ``[B, Tq, H, D]``, a float type, as k and v.
        k: ``[B, Tk, G, D]``.
        v: ``[B, Tk, G, D]``.
        block_size: C.
        positions: key position of each query ``[B, Tq]``, int64.
        scale: factor of the scores.

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q``.
    """
    share = q.shape[2] // k.shape[2]
    rows = []
    for b, i, h in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        scores = scale * (k[b, :, h // share] @ q[b, i, h])
        rows.append(landmark_softmax_row(scores, int(positions[b, i]), block_size) @ v[b, :, h // share])
    return torch.stack(rows).view(q.shape)
