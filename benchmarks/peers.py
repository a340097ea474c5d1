"""What our kernels are compared with: the same operations in the usual PyTorch.

Legend: B batch (1), N query groups, S rows of a group, H heads, D head size, E stored chunks, C keys of a chunk,
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


def causal_sdpa(q: Tensor) -> Tensor:
    """Run full causal attention over the same tokens: ``[1, N, S, H, D]`` as N S tokens."""
    x = q.flatten(1, 2).transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def retrieve_dense(queries: Tensor, landmarks: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Form the whole score matrix, mask it, and take its top k."""
    scores = queries @ landmarks.mT * queries.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu()
    values, indices = scores.masked_fill(hidden, float("-inf")).topk(top_k, -1)
    return indices, values
