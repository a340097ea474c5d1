"""Sliding-window attention in blocks: memory and time linear in T, forward and backward, on any device.

Notable: a block of queries sees one stretch of keys of fixed length, so all blocks share one additive mask (window and
ALiBi), built once. Several blocks make a tile, whose stretches are copied side by side and attended by one batched
product. The backward recomputes the probabilities from the base 2 log-sum-exp, tile by tile.

Legend: B batch, Tq queries, Tk keys, H heads, Hk kv heads, G = H / Hk, D head size, Q queries of a block, L keys of its
stretch, n blocks of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
# Scores of a working tile: about 1 MB of float32 on a CPU (second level cache), enough to fill a GPU.
TILE = {"cpu": 2**18, "cuda": 2**25}
MAX_BLOCK = {"cpu": 64, "cuda": 128}


@dataclass(frozen=True)
class _Plan:
    """How queries are cut into blocks and what every block adds to its scores."""

    bias: Tensor
    """``[B or 1, Hk or 1, G or 1, Q, L]`` base 2 bias of the window and the distance, -inf outside the window."""
    stretch: int
    block: int
    tile: int
    """Blocks of a tile."""
    offset: int
    """Key position of the first query."""
    documents: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class _Tile:
    """Queries ``[first, last)`` in blocks of Q, and keys ``[start, stop)``; both may be ragged at the ends."""

    first: int
    last: int
    start: int
    stop: int
    blocks: int


def _plan(q: Tensor, k: Tensor, window: int | None, slopes: Tensor | None, documents: Tensor | None) -> _Plan:
    batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    acc = torch.promote_types(q.dtype, torch.float32)
    window = min(window or num_keys, num_keys)
    block = min(MAX_BLOCK.get(q.device.type, 64), num_queries)
    stretch = window - 1 + block
    tile = max(1, TILE.get(q.device.type, 2**18) // (batch * num_heads * block * stretch))
    distance = torch.arange(block, device=q.device)[:, None] + window - 1 - torch.arange(stretch, device=q.device)
    bias = torch.zeros(1, 1, 1, 1, 1, dtype=acc, device=q.device)
    if slopes is not None:
        bias = (slopes.to(acc) * -LOG2E).view(-1, num_kv_heads, num_heads // num_kv_heads, 1, 1) * distance
    bias = bias.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return _Plan(bias, stretch, block, min(tile, -(-num_queries // block)), num_keys - num_queries, documents, acc)


def _tiles(plan: _Plan, num_queries: int) -> Iterator[_Tile]:
    for first in range(0, num_queries, plan.tile * plan.block):
        last = min(first + plan.tile * plan.block, num_queries)
        blocks = -(-(last - first) // plan.block)
        stop = first + plan.offset + blocks * plan.block
        start = first + plan.offset + plan.block - plan.stretch
        # A single block needs no keys before the first one; several must keep the common length.
        yield _Tile(first, last, max(start, 0) if blocks == 1 else start, stop, blocks)


def _cut(x: Tensor, start: int, stop: int, value: float = 0.0) -> Tensor:
    """Return ``x[:, start:stop]``, filled with ``value`` where the range leaves ``x``."""
    length = x.shape[1]
    part = x[:, max(start, 0) : min(stop, length)]
    missing = (max(0, -start), max(0, stop - length))
    if not any(missing):
        return part
    return torch.nn.functional.pad(part, (0, 0) * (x.dim() - 2) + missing, value=value)


def _read_queries(x: Tensor, plan: _Plan, tile: _Tile, num_kv_heads: int) -> Tensor:
    """Read ``[B, Tq, H, D]`` as ``[B n Hk, G Q, D]``."""
    rows = _cut(x, tile.first, tile.first + tile.blocks * plan.block).to(plan.dtype)
    rows = rows.unflatten(2, (num_kv_heads, -1)).unflatten(1, (tile.blocks, plan.block))  # [B, n, Q, Hk, G, D]
    return rows.permute(0, 1, 3, 4, 2, 5).flatten(3, 4).flatten(0, 2)


def _write_queries(x: Tensor, rows: Tensor, plan: _Plan, tile: _Tile, num_kv_heads: int) -> None:
    """Undo `_read_queries` into ``x``."""
    rows = rows.view(x.shape[0], tile.blocks, num_kv_heads, -1, plan.block, x.shape[3]).permute(0, 1, 4, 2, 3, 5)
    x[:, tile.first : tile.last] = rows.flatten(3, 4).flatten(1, 2)[:, : tile.last - tile.first]


def _read_keys(x: Tensor, plan: _Plan, tile: _Tile) -> Tensor:
    """Copy ``[B, Tk, Hk, D]`` to the stretches of the blocks ``[B n Hk, L, D]``."""
    part = _cut(x, tile.start, tile.stop).to(plan.dtype)
    if tile.blocks == 1:
        return part.transpose(1, 2).flatten(0, 1)
    return part.unfold(1, plan.stretch, plan.block).permute(0, 1, 2, 4, 3).flatten(0, 2)  # [B, n, Hk, L, D]


def _add_keys(total: Tensor, part: Tensor, plan: _Plan, tile: _Tile) -> None:
    """Add the gradients ``[B n Hk, L, D]`` of the stretches, which overlap, to ``[B, Tk, Hk, D]``."""
    part = part.view(total.shape[0], tile.blocks, total.shape[2], -1, total.shape[3])
    for number in range(tile.blocks):
        start = tile.start + number * plan.block
        stop = min(start + part.shape[3], total.shape[1])
        if stop > max(start, 0):
            inside = part[:, number, :, max(0, -start) : stop - start]
            total[:, max(start, 0) : stop] += inside.transpose(1, 2)


def _scores(q: Tensor, keys: Tensor, plan: _Plan, tile: _Tile, num_kv_heads: int) -> Tensor:
    """Compute the base 2 scores ``[B, n, Hk, G, Q, L]`` of a tile, -inf where a query may not look."""
    length = keys.shape[1]
    scores = torch.bmm(q, keys.transpose(1, 2)).view(
        -1, tile.blocks, num_kv_heads, q.shape[1] // plan.block, plan.block, length
    )
    scores += plan.bias[:, None, ..., plan.stretch - length :]
    outside = tile.start < 0 or tile.stop > plan.offset + tile.last
    if plan.documents is None and not outside:
        return scores
    documents = plan.documents
    if documents is None:
        documents = torch.zeros(1, plan.offset + tile.last, dtype=torch.long, device=q.device)
    key_documents = _cut(documents, tile.start, tile.stop, -1)
    own = _cut(documents, tile.first + plan.offset, tile.stop, -1).unflatten(1, (tile.blocks, plan.block))
    seen = key_documents.unfold(1, length, plan.block)  # [B, n, L]
    hidden = (own.unsqueeze(-1) != seen.unsqueeze(2)) | (own < 0).unsqueeze(-1)
    return scores.masked_fill_(hidden[:, :, None, None], float("-inf"))


def _backward(
    grad_out: Tensor, plan: _Plan, scale: float, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients; with ``delta = dO . O`` of a row, ``dA = P (dO V' - delta)``."""
    heads = k.shape[2]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sum_k, sum_v = (torch.zeros(x.shape, dtype=plan.dtype, device=x.device) for x in (k, v))
    for tile, lse in zip(_tiles(plan, q.shape[1]), statistics, strict=True):
        query = _read_queries(q, plan, tile, heads) * (scale * LOG2E)
        upstream = _read_queries(grad_out, plan, tile, heads)
        keys, values = _read_keys(k, plan, tile), _read_keys(v, plan, tile)
        p = _scores(query, keys, plan, tile, heads).sub_(lse).exp2_().flatten(3, 4).flatten(0, 2)
        _add_keys(sum_v, torch.bmm(p.transpose(1, 2), upstream), plan, tile)
        delta = (_read_queries(out, plan, tile, heads) * upstream).sum(-1, keepdim=True)
        grad_a = torch.bmm(upstream, values.transpose(1, 2)).sub_(delta).mul_(p)
        _write_queries(grad_q, torch.bmm(grad_a, keys).mul_(scale), plan, tile, heads)
        _add_keys(sum_k, torch.bmm(grad_a.transpose(1, 2), query), plan, tile)
    sum_k.mul_(1.0 / LOG2E)  # the copied queries carry log2(e)
    return grad_q, sum_k.to(k.dtype), sum_v.to(v.dtype)


class BlockedAttention(torch.autograd.Function):
    """Blocked attention that keeps the log-sum-exp and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        slopes: Tensor | None,
        documents: Tensor | None,
        scale: float,
    ) -> Tensor:
        """Return ``[B, Tq, H, D]`` in the dtype of ``q``."""
        plan, heads = _plan(q, k, window, slopes, documents), k.shape[2]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        statistics = []
        for tile in _tiles(plan, q.shape[1]):
            query = _read_queries(q, plan, tile, heads) * (scale * LOG2E)
            p = _scores(query, _read_keys(k, plan, tile), plan, tile, heads)
            peak = p.amax(-1, keepdim=True).clamp_(min=-1e30)  # rows that see nothing stay finite
            total = p.sub_(peak).exp2_().sum(-1, keepdim=True)
            p, rows = p.flatten(3, 4).flatten(0, 2), total.flatten(3, 4).flatten(0, 2)
            product = torch.bmm(p, _read_keys(v, plan, tile)).div_(rows.clamp(min=torch.finfo(p.dtype).tiny))
            _write_queries(out, product, plan, tile, heads)
            statistics.append(torch.where(total == 0, float("inf"), total.log2().add_(peak)))
        ctx.save_for_backward(q, k, v, out, *statistics)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of q, k and v, in their shapes and dtypes, from ``grad_out`` ``[B, Tq, H, D]``."""
        with torch.autocast(grad_out.device.type, enabled=False):
            return (*_backward(grad_out, ctx.plan, ctx.scale, *ctx.saved_tensors), None, None, None, None)
