"""Grouped cross attention, written densely: the equation in plain PyTorch, differentiable twice.

Legend: B batch, N query groups, S rows of a group, H heads, G heads per kv head, D head size, E stored chunks,
C keys of a chunk, K retrieved chunks.
"""

import torch
from torch import Tensor


def grouped_cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    *,
    scale: float,
    softmax_off_by_one: bool,
) -> Tensor:
    """Compute ``out_t = sum_j w_j softmax_c(scale q_t . K[e_j, c]) V[e_j]`` with gathered keys and values.

    Args:
        q: ``[B, N, S, H, D]``.
        k: ``[B, E, C, Hk, D]``.
        v: ``[B, E, C, Hk, D]``.
        indices: ``[B, N, K]`` chunk of each slot, -1 = empty.
        weights: ``[B, N, K]`` fusion weights.
        kv_lengths: ``[B, E]`` valid keys of each chunk, or None.
        scale: factor of the scores.
        softmax_off_by_one: add 1 to the denominator (a key of score 0 and value 0).

    Returns:
        ``[B, N, S, H, D]`` in the dtype of ``q``.
    """
    batch, _, chunk_size, num_kv_heads, _ = k.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    rows = torch.arange(batch, device=q.device)[:, None, None]
    chunk = indices.clamp(min=0).long()
    length = torch.full_like(chunk, chunk_size) if kv_lengths is None else kv_lengths[rows, chunk].long()
    length = torch.where(indices < 0, 0, length)  # [B, N, K]
    alive = torch.arange(chunk_size, device=q.device) < length[..., None]  # [B, N, K, C]

    # Dead keys are replaced, not multiplied by zero: they may hold NaN.
    keys = k[rows, chunk].to(acc).masked_fill(~alive[..., None, None], 0.0)  # [B, N, K, C, Hk, D]
    values = v[rows, chunk].to(acc).masked_fill(~alive[..., None, None], 0.0)
    w = weights.to(acc).masked_fill(length == 0, 0.0)

    query = q.to(acc).unflatten(3, (num_kv_heads, -1))  # [B, N, S, Hk, G, D]
    scores = scale * torch.einsum("bnshgd,bnkchd->bnkhgsc", query, keys)
    scores = scores.masked_fill(~alive[:, :, :, None, None, None, :], float("-inf"))
    peak = scores.detach().amax(-1, keepdim=True).clamp(min=0.0 if softmax_off_by_one else -1e30)
    p = torch.exp(scores - peak)
    denominator = p.sum(-1, keepdim=True) + (torch.exp(-peak) if softmax_off_by_one else 0.0)
    p = p / denominator.masked_fill(denominator == 0, 1.0)
    return torch.einsum("bnk,bnkhgsc,bnkchd->bnshgd", w, p, values).flatten(3, 4).to(q.dtype)
