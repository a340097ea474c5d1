"""What our kernels are compared with: the same operations in the usual PyTorch.

Legend: B batch, N query groups, S rows of a group, H heads, D head size, E stored chunks, C keys of a chunk,
K retrieved chunks.
"""

import torch
from torch import Tensor


def gca_einsum(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Gather the keys and values of every slot, then two einsums and a softmax; one batch row, no empty slot."""
    slots = indices[0].long()
    keys, values = k[0, slots], v[0, slots]  # [N, K, C, H, D]
    scores = torch.einsum("nshd,njchd->nhsjc", q[0], keys).float() * q.shape[-1] ** -0.5
    p = torch.softmax(scores, -1) * weights[0, :, None, None, :, None]
    return torch.einsum("nhsjc,njchd->nshd", p.to(q.dtype), values)[None]


def gca_sdpa(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Call scaled_dot_product_attention once a query group, with the slots as its batch; no empty slot."""
    slots, outs = indices[0].long(), []
    for n in range(q.shape[1]):
        keys, values = (x[0, slots[n]].transpose(1, 2) for x in (k, v))  # [K, H, C, D]
        query = q[0, n].transpose(0, 1).expand(slots.shape[1], -1, -1, -1)
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        outs.append(torch.einsum("j,jhsd->shd", weights[0, n].to(q.dtype), out))
    return torch.stack(outs)[None]


def gather_slots(k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the keys and values of every slot, ``[B, E, C, H, D]`` to ``[B N K, H, C, D]``; no empty slot."""
    rows = torch.arange(k.shape[0], device=k.device)[:, None, None]
    keys, values = (x[rows, indices.long()].flatten(0, 2).transpose(1, 2) for x in (k, v))
    return keys, values


def sdpa_slots(q: Tensor, keys: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Attend from ``[B, N, S, H, D]`` to gathered slots in one call of SDPA, and sum by the weights ``[B, N, K]``."""
    query = q.transpose(2, 3)[:, :, None].expand(-1, -1, weights.shape[2], -1, -1, -1).flatten(0, 2)
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    return torch.einsum("bnk,bnkhsd->bnshd", weights.to(q.dtype), out.unflatten(0, weights.shape))


def gca_gathered(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Gather, then attend; the backward scatters the gradients of keys and values."""
    return sdpa_slots(q, *gather_slots(k, v, indices), weights)


def causal_sdpa(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    """Run full causal attention over the same tokens: ``[B, N, S, H, D]`` as N S tokens; None = the queries."""
    query, key, value = ((q if x is None else x).flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    options = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)


def retrieve_dense(queries: Tensor, landmarks: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Form the whole score matrix, mask it, and take its top k."""
    scores = queries @ landmarks.mT * queries.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu()
    values, indices = scores.masked_fill(hidden, float("-inf")).topk(top_k, -1)
    return indices, values
