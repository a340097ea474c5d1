"""Landmark attention in tiles of queries: scores exist for one tile at a time, and the backward forms them again.

Legend: B batch, Tq queries, Tk keys, H heads, G kv heads, D head size, C keys of a block, R queries of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.landmark.softmax import grouped_probs

# Scores of a tile: some MB of float32 on a CPU, enough to fill a GPU.
TILE = {"cpu": 2**20, "cuda": 2**27}


def _tiles(q: Tensor, num_keys: int, block_size: int, *, aligned: bool) -> Iterator[tuple[slice, int]]:
    """Yield queries and the number of keys they can see (all of them where query i is not key i)."""
    budget = TILE.get(q.device.type, TILE["cpu"])
    rows = max(1, budget // max(1, q.shape[0] * q.shape[2] * num_keys))
    for start in range(0, q.shape[1], rows):
        stop = min(start + rows, q.shape[1])
        # Keys up to the block border: a complete block costs nothing more.
        seen = min(-(-stop // block_size) * block_size, num_keys) if aligned else num_keys
        yield slice(start, stop), seen


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, block_size: int, scale: float) -> Tensor:
    """Attend from ``[B, R, H, D]`` at ``positions`` [B or 1, R] to ``[B, Tk, G, D]``."""
    exact = torch.promote_types(q.dtype, torch.float32)
    query = q.to(exact).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("brgsd,bkgd->bgsrk", query * scale, k.to(exact))
    probs = grouped_probs(scores, positions[:, None, None], block_size)
    return torch.einsum("bgsrk,bkgd->brgsd", probs, v.to(exact)).flatten(2, 3).to(q.dtype)


class TiledAttention(torch.autograd.Function):
    """Keeps the inputs only."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, block_size: int, scale: float
    ) -> Tensor:
        """Return ``[B, Tq, H, D]`` in the dtype of ``q``."""
        ctx.aligned, ctx.block_size, ctx.scale = positions is None, block_size, scale
        places = torch.arange(q.shape[1], device=q.device)[None] if positions is None else positions
        ctx.save_for_backward(q, k, v, places)
        out = torch.empty_like(q)
        for rows, seen in _tiles(q, k.shape[1], block_size, aligned=ctx.aligned):
            keys, values = k[:, :seen], v[:, :seen]
            out[:, rows] = _attend(q[:, rows], keys, values, places[:, rows], block_size=block_size, scale=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v, in their shapes and dtypes, from ``grad_out`` ``[B, Tq, H, D]``."""
        q, k, v, places = ctx.saved_tensors
        exact = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        sum_k, sum_v = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            for rows, seen in _tiles(q, k.shape[1], ctx.block_size, aligned=ctx.aligned):
                with torch.enable_grad():
                    # Sums of the tiles run in the accumulation type, whatever the inputs are.
                    query, key, value = (
                        x.to(exact).detach().requires_grad_() for x in (q[:, rows], k[:, :seen], v[:, :seen])
                    )
                    out = _attend(query, key, value, places[:, rows], block_size=ctx.block_size, scale=ctx.scale)
                grads = torch.autograd.grad(out, (query, key, value), grad_out[:, rows].to(exact))
                grad_q[:, rows] = grads[0].to(q.dtype)
                sum_k[:, :seen] += grads[1]
                sum_v[:, :seen] += grads[2]
        return grad_q, sum_k.to(k.dtype), sum_v.to(v.dtype), None, None, None
