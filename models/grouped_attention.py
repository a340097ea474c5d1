"""Attention in which heads that share keys become rows, so that keys are never repeated.

Legend: B batch, P queries, L keys, H heads, G kv heads, D head size.
"""

from torch import Tensor
from torch.nn import functional as F


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Return softmax(q . k / sqrt(D)) v without positions.

    Args:
        query: ``[B, P, H, D]``.
        key: ``[B, L, G, D]``.
        value: ``[B, L, G, D]``.
        allowed: Keys that may be seen ``[B, P or 1, L]`` bool, at least one for each query; None = all.

    Returns:
        ``[B, P, H, D]`` in the dtype of ``query``.
    """
    rows = query.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, G, H / G, P, D]
    share = rows.shape[2]
    mask = None if allowed is None else allowed[:, None]
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, share, 1)
    key, value = (x.transpose(1, 2).to(query.dtype) for x in (key, value))
    out = F.scaled_dot_product_attention(rows.flatten(2, 3), key, value, attn_mask=mask)
    return out.unflatten(2, (share, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
