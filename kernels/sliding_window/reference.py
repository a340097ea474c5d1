"""Sliding-window attention, written densely: one score matrix, one mask, one softmax.

Legend: B batch, Tq queries, Tk keys, H heads, Hk kv heads, D head size.
"""

import torch
from torch import Tensor


def sliding_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | None,
    *,
    alibi_slopes: Tensor | None,
    document_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute ``softmax(scale q . k - slope (i - j)) v`` over ``i - window_size < j <= i`` of the same document.

    Args:
        q: ``[B, Tq, H, D]``; query i is key position ``i + Tk - Tq``.
        k: ``[B, Tk, Hk, D]``.
        v: ``[B, Tk, Hk, D]``.
        window_size: keys a query sees, itself included; None = all earlier ones.
        alibi_slopes: ``[H]`` or ``[B, H]``.
        document_ids: ``[B, Tk]``; -1 = padding.
        scale: factor of the scores.

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q``.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    acc = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(acc).repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    distance = torch.arange(num_queries, device=q.device)[:, None] + num_keys - num_queries
    distance = distance - torch.arange(num_keys, device=q.device)  # [Tq, Tk]
    allowed = (distance >= 0)[None]
    if window_size is not None:
        allowed = allowed & (distance < window_size)
    if document_ids is not None:
        own = document_ids[:, num_keys - num_queries :, None]
        allowed = allowed & (own == document_ids[:, None]) & (own >= 0)

    scores = scale * torch.einsum("bihd,bjhd->bhij", q.to(acc), keys)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(acc).view(-1, q.shape[2], 1, 1) * distance
    allowed = allowed[:, None]
    # A row that sees nothing would be NaN: it gets finite scores, then probability 0.
    p = torch.softmax(scores.masked_fill(~allowed, torch.finfo(acc).min), -1).masked_fill(~allowed, 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, values).to(q.dtype)
