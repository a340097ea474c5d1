"""Grouped cross attention in plain PyTorch, tile by tile, with its own backward; runs on any device.

Notable: keys and values are laid out head by head once (in the accumulation type, so low precision inputs are upcast
exactly once); a tile then copies only the chunks of a few query groups. The softmax runs in base 2 (the fastest
exponential of PyTorch on a CPU). An empty slot points at one extra chunk of zeros, so no tile branches on it and NaN in
dead memory is never read. Gradients of keys and values are added in query order: two runs give identical bits.

Legend: B batch, N query groups, R = B N, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, E stored
chunks, C keys of a chunk, K retrieved chunks, U chunks in use, h heads of a block, n query groups of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
# Elements of a working tile: about 1 MB of float32, which stays in the second level cache.
TILE = 2**18


@dataclass(frozen=True)
class _Plan:
    """What forward and backward share: which chunks are in use, and which of them each slot reads."""

    used: tuple[Tensor, Tensor] | None
    """``([U], [U])`` batch row and chunk number of each chunk in use; None: all, U = B E."""
    slots: Tensor
    """``[R, K]`` number among those in use; U (the chunk of zeros) for an empty slot."""
    weights: Tensor
    """``[R, K]`` in the accumulation type, 0 at empty slots."""
    num_used: int
    lengths: Tensor | None
    """``[U + 1]`` valid keys, or None if all are."""
    dtype: torch.dtype


def _plan(q: Tensor, k: Tensor, indices: Tensor, weights: Tensor, kv_lengths: Tensor | None) -> _Plan:
    num_chunks, chunk_size = k.shape[1:3]
    acc = torch.promote_types(q.dtype, torch.float32)
    empty = indices < 0
    slots = indices.long().clamp(min=0)
    slots = slots + torch.arange(k.shape[0], device=q.device)[:, None, None] * num_chunks
    lengths = None if kv_lengths is None else kv_lengths.flatten().long()
    if lengths is not None:
        empty = empty | (lengths[slots] == 0)
    used, num_used = None, k.shape[0] * num_chunks
    if slots.numel() < num_used // 2:  # decoding: read the chosen chunks, not the whole store
        chosen, slots = torch.unique(slots, return_inverse=True)
        used, num_used = (chosen // num_chunks, chosen % num_chunks), chosen.numel()
        lengths = None if lengths is None else lengths[chosen]
    if lengths is not None:
        lengths = torch.nn.functional.pad(lengths, (0, 1), value=chunk_size)
    slots = slots.masked_fill(empty, num_used).flatten(0, 1)
    return _Plan(used, slots, weights.to(acc).masked_fill(empty, 0.0).flatten(0, 1), num_used, lengths, acc)


def _head_blocks(plan: _Plan, k: Tensor) -> Iterator[slice]:
    """Yield blocks of kv heads whose copied chunks fill about two tiles; one head at least."""
    per_head = (plan.num_used + 1) * k.shape[2] * k.shape[4]
    step = max(1, 2 * TILE // per_head)
    return (slice(start, min(start + step, k.shape[3])) for start in range(0, k.shape[3], step))


def _tiles(plan: _Plan, q: Tensor, k: Tensor, heads: slice) -> Iterator[slice]:
    """Yield ranges of query groups whose scores and copied keys fill about one tile."""
    rows = max(q.shape[2] * (q.shape[3] // k.shape[3]), q.shape[4])
    num_rows, top_k = plan.slots.shape
    step = max(1, TILE // ((heads.stop - heads.start) * rows * top_k * k.shape[2]))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _copy_chunks(x: Tensor, plan: _Plan, heads: slice) -> Tensor:
    """Copy the chunks in use, ``[B, E, C, Hk, D]`` to ``[h, U + 1, C D]``; dead keys and the last chunk are 0."""
    heads_of_x = x[:, :, :, heads]
    chosen = heads_of_x if plan.used is None else heads_of_x[plan.used][None]  # [B, E, C, h, D] or [1, U, C, h, D]
    shape = (chosen.shape[3], plan.num_used + 1, x.shape[2], x.shape[4])
    chunks = torch.empty(shape, dtype=plan.dtype, device=x.device)
    chunks[:, -1] = 0.0
    chunks[:, :-1].unflatten(1, chosen.shape[:2]).copy_(chosen.permute(3, 0, 1, 2, 4))
    if plan.lengths is not None:
        dead = torch.arange(x.shape[2], device=x.device) >= plan.lengths[:, None]
        chunks.masked_fill_(dead[..., None], 0.0)
    return chunks.flatten(2)


def _read_rows(x: Tensor, tile: slice, heads: slice, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Read the rows of a tile: ``[B, N, S, H, D]`` to ``[h n, S G, D]`` (a copy or a view)."""
    rows = x.flatten(0, 1)[tile].unflatten(2, (num_kv_heads, -1))[:, :, heads]
    return rows.permute(2, 0, 1, 3, 4).to(dtype).flatten(2, 3).flatten(0, 1)


def _write_rows(x: Tensor, rows: Tensor, tile: slice, heads: slice, num_kv_heads: int) -> None:
    """Undo `_read_rows` into ``x``."""
    target = x.flatten(0, 1)[tile].unflatten(2, (num_kv_heads, -1))[:, :, heads].permute(2, 0, 1, 3, 4)
    target.copy_(rows.view(target.shape))


def _scores(q: Tensor, keys: Tensor, plan: _Plan, slots: Tensor) -> Tensor:
    """Multiply ``[h n, S G, D]`` with ``[h n, K C, D]`` to scores ``[h, n, S G, K, C]``, -inf at dead keys."""
    groups, top_k = slots.shape
    scores = torch.bmm(q, keys.transpose(1, 2))
    scores = scores.view(-1, groups, q.shape[1], top_k, scores.shape[-1] // top_k)
    if plan.lengths is not None:
        position = torch.arange(scores.shape[-1], device=q.device)
        scores.masked_fill_((position >= plan.lengths[slots][..., None])[:, None], float("-inf"))
    return scores


def _add_chunks(total: Tensor, part: Tensor, slots: Tensor) -> None:
    """Add ``[h n, K C, D]`` to the chunks ``[h, U + 1, C D]`` of the slots, in a fixed order."""
    index, part = slots.flatten(), part.view(total.shape[0], -1, total.shape[2])
    if total.is_cuda:  # index_add_ uses atomics there; index_put_ sorts
        total.transpose(0, 1).index_put_((index,), part.transpose(0, 1), accumulate=True)
    else:
        total.index_add_(1, index, part)


def _write_chunks(x: Tensor, chunks: Tensor, plan: _Plan, heads: slice) -> None:
    """Undo `_copy_chunks` into ``x``."""
    part = x[:, :, :, heads]
    source = chunks[:, :-1].unflatten(2, (x.shape[2], x.shape[4])).permute(1, 2, 0, 3)  # [U, C, h, D]
    if plan.used is None:
        part.copy_(source.unflatten(0, x.shape[:2]))
    else:
        part[plan.used] = source.to(x.dtype)


def _attend(
    query: Tensor, all_keys: Tensor, all_values: Tensor, plan: _Plan, tile: slice, *, softmax_off_by_one: bool
) -> tuple[Tensor, Tensor]:
    """Attend one tile: scaled queries ``[h n, S G, D]`` to outputs alike and the log-sum-exp ``[h, n, S G, K]``."""
    index, shape = plan.slots[tile].flatten(), (query.shape[0], -1, query.shape[2])
    p = _scores(query, all_keys.index_select(1, index).view(shape), plan, plan.slots[tile])
    peak = p.amax(-1, keepdim=True)
    if softmax_off_by_one:
        peak.clamp_(min=0.0)
    total = p.sub_(peak).exp2_().sum(-1, keepdim=True)
    if softmax_off_by_one:
        total.add_(torch.exp2(-peak))
    p.mul_(plan.weights[tile][:, None, :, None] / total)  # w folds into P: one product sums over all slots
    out = torch.bmm(p.flatten(3).flatten(0, 1), all_values.index_select(1, index).view(shape))
    return out, total.log2_().add_(peak).squeeze(-1)


def _attend_backward(
    query: Tensor, upstream: Tensor, lse: Tensor, chunks: tuple[Tensor, ...], plan: _Plan, tile: slice
) -> tuple[Tensor, Tensor]:
    """Differentiate one tile: returns ``dA K`` and ``dw``, adds ``dA' Q`` and ``dV`` to the sums in ``chunks``."""
    all_keys, all_values, sum_k, sum_v = chunks
    slots, w, shape = plan.slots[tile], plan.weights[tile][:, None, :, None], (query.shape[0], -1, query.shape[2])
    keys = all_keys.index_select(1, slots.flatten()).view(shape)
    p = _scores(query, keys, plan, slots).sub_(lse.unsqueeze(-1)).exp2_()
    values = all_values.index_select(1, slots.flatten()).view(shape)
    grad_a = torch.bmm(upstream, values.transpose(1, 2)).view(p.shape).mul_(p)
    delta = grad_a.sum(-1, keepdim=True)
    grad_a.addcmul_(p, delta, value=-1.0).mul_(w)
    grad_a, p = (x.flatten(3).flatten(0, 1) for x in (grad_a, p.mul_(w)))
    _add_chunks(sum_k, torch.bmm(grad_a.transpose(1, 2), query), slots)
    _add_chunks(sum_v, torch.bmm(p.transpose(1, 2), upstream), slots)
    return torch.bmm(grad_a, keys), delta.sum((0, 2, 4))


@torch.library.custom_op("longhaul::gca_cpu", mutates_args=())
def gca_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the output and the base 2 log-sum-exp of every slot, ``[Hk, R, S G, K]``."""
    plan = _plan(q, k, indices, weights, kv_lengths)
    num_kv_heads, (num_rows, top_k) = k.shape[3], plan.slots.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (num_kv_heads, num_rows, q.shape[2] * q.shape[3] // num_kv_heads, top_k)
    lse = torch.empty(shape, dtype=plan.dtype, device=q.device)
    for heads in _head_blocks(plan, k):
        all_keys, all_values = _copy_chunks(k, plan, heads), _copy_chunks(v, plan, heads)
        for tile in _tiles(plan, q, k, heads):
            query = _read_rows(q, tile, heads, num_kv_heads, plan.dtype) * (scale * LOG2E)
            rows, lse[heads, tile] = _attend(
                query, all_keys, all_values, plan, tile, softmax_off_by_one=softmax_off_by_one
            )
            _write_rows(out, rows, tile, heads, num_kv_heads)
    return out, lse


@torch.library.custom_op("longhaul::gca_cpu_backward", mutates_args=())
def gca_cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and weights, recomputing the probabilities from the log-sum-exp.

    With ``dP = dO V'`` and ``delta = sum_c P dP`` of each slot: ``dw = sum delta``, ``dA = w P (dP - delta)``,
    ``dQ = scale dA K``, ``dK = scale dA' Q``, ``dV = w P' dO``.
    """
    plan = _plan(q, k, indices, weights, kv_lengths)
    num_kv_heads = k.shape[3]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    grad_weights = torch.zeros_like(plan.weights)
    for heads in _head_blocks(plan, k):
        copies = _copy_chunks(k, plan, heads), _copy_chunks(v, plan, heads)
        chunks = (*copies, torch.zeros_like(copies[0]), torch.zeros_like(copies[1]))
        for tile in _tiles(plan, q, k, heads):
            query = _read_rows(q, tile, heads, num_kv_heads, plan.dtype) * (scale * LOG2E)
            upstream = _read_rows(grad_out, tile, heads, num_kv_heads, plan.dtype)
            rows, part = _attend_backward(query, upstream, lse[heads, tile], chunks, plan, tile)
            _write_rows(grad_q, rows.mul_(scale), tile, heads, num_kv_heads)
            grad_weights[tile] += part
        _write_chunks(grad_k, chunks[2].mul_(1.0 / LOG2E), plan, heads)  # the scaled queries carry log2(e)
        _write_chunks(grad_v, chunks[3], plan, heads)
        del copies, chunks  # before the next block allocates its own
    return grad_q, grad_k, grad_v, grad_weights.view(weights.shape).to(weights.dtype)


@gca_cpu.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
) -> tuple[Tensor, Tensor]:
    batch, num_groups, rows, heads, _ = q.shape
    shape = (k.shape[3], batch * num_groups, rows * heads // k.shape[3], indices.shape[2])
    lse = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@gca_cpu_backward.register_fake
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad_out.device.type, enabled=False):
        grads = gca_cpu_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    grad_q, grad_k, grad_v, grad_weights = grads
    return grad_q, grad_k, grad_v, None, grad_weights, None, None, None


gca_cpu.register_autograd(_differentiate, setup_context=_save)
