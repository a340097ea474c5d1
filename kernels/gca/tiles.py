"""Grouped cross attention in plain PyTorch, tile by tile, with its own backward; runs on any device.

Notable: a tile copies only the chunks of a few query groups. The softmax runs in base 2 (the fastest exponential of
PyTorch on a CPU). Gradients of keys and values are added in query order: two runs give identical bits.

Legend: B batch, N query groups, R = B N, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, C keys of a
chunk, K retrieved chunks, U chunks in use, h heads of a block, n query groups of a tile.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.gca.layout import Plan, copy_chunks, view_rows, write_chunks

LOG2E = math.log2(math.e)
# Elements of a working tile: about 1 MB of float32, which stays in the second level cache.
TILE = 2**18


def _head_blocks(plan: Plan, k: Tensor) -> Iterator[slice]:
    """Yield blocks of kv heads whose copied chunks fill about two tiles; one head at least."""
    per_head = (plan.num_used + 1) * k.shape[2] * k.shape[4]
    step = max(1, 2 * TILE // per_head)
    return (slice(start, min(start + step, k.shape[3])) for start in range(0, k.shape[3], step))


def _tiles(plan: Plan, q: Tensor, k: Tensor, heads: slice) -> Iterator[slice]:
    """Yield ranges of query groups whose scores and copied keys fill about one tile."""
    rows = max(q.shape[2] * (q.shape[3] // k.shape[3]), q.shape[4])
    num_rows, top_k = plan.slots.shape
    step = max(1, TILE // ((heads.stop - heads.start) * rows * top_k * k.shape[2]))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _read_rows(x: Tensor, tile: slice, heads: slice, num_kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Read the rows of a tile: ``[B, N, S, H, D]`` to ``[h n, S G, D]`` (a copy or a view)."""
    return view_rows(x, tile, heads, num_kv_heads).to(dtype).flatten(2, 3).flatten(0, 1)


def _write_rows(x: Tensor, rows: Tensor, tile: slice, heads: slice, num_kv_heads: int) -> None:
    """Undo `_read_rows` into ``x``."""
    target = view_rows(x, tile, heads, num_kv_heads)
    target.copy_(rows.view(target.shape))


def _scores(q: Tensor, keys: Tensor, plan: Plan, slots: Tensor) -> Tensor:
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


def _attend(
    query: Tensor, all_keys: Tensor, all_values: Tensor, plan: Plan, tile: slice, *, softmax_off_by_one: bool
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
    query: Tensor, upstream: Tensor, lse: Tensor, chunks: tuple[Tensor, ...], plan: Plan, tile: slice
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


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softmax_off_by_one: bool
) -> tuple[Tensor, Tensor]:
    """Compute the output and the base 2 log-sum-exp of every slot, ``[Hk, R, K, S G]``.

    Args:
        plan: what each slot reads, and the weights.
        q: ``[B, N, S, H, D]``, any float type.
        k: ``[B, E, C, Hk, D]`` in the dtype of ``q``.
        v: ``[B, E, C, Hk, D]`` likewise.
        scale: factor of the scores.
        softmax_off_by_one: add 1 to each denominator.

    Returns:
        ``[B, N, S, H, D]`` in the dtype of ``q``; the log-sum-exps in the accumulation type.
    """
    num_kv_heads, (num_rows, top_k) = k.shape[3], plan.slots.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (num_kv_heads, num_rows, top_k, q.shape[2] * q.shape[3] // num_kv_heads)
    lse = torch.empty(shape, dtype=plan.dtype, device=q.device)
    for heads in _head_blocks(plan, k):
        all_keys, all_values = (copy_chunks(x, plan, heads).flatten(2) for x in (k, v))
        for tile in _tiles(plan, q, k, heads):
            query = _read_rows(q, tile, heads, num_kv_heads, plan.dtype) * (scale * LOG2E)
            rows, part = _attend(query, all_keys, all_values, plan, tile, softmax_off_by_one=softmax_off_by_one)
            lse[heads, tile] = part.transpose(2, 3)
            _write_rows(out, rows, tile, heads, num_kv_heads)
    return out, lse


def backward(
    plan: Plan, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of q, k, v and weights, recomputing the probabilities from the log-sum-exp.

    Args:
        plan: as in `forward`.
        grad_out: ``[B, N, S, H, D]`` in the dtype of ``q``.
        q: ``[B, N, S, H, D]``, any float type.
        k: ``[B, E, C, Hk, D]`` in the dtype of ``q``.
        v: ``[B, E, C, Hk, D]`` likewise.
        lse: ``[Hk, R, K, S G]`` of `forward`.
        scale: factor of the scores.

    Returns:
        Gradients in the shapes and dtypes of q, k and v, and that of the weights ``[R, K]`` in the accumulation type.
    """
    num_kv_heads = k.shape[3]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    grad_weights = torch.zeros_like(plan.weights)
    for heads in _head_blocks(plan, k):
        copies = tuple(copy_chunks(x, plan, heads).flatten(2) for x in (k, v))
        chunks = (*copies, torch.zeros_like(copies[0]), torch.zeros_like(copies[1]))
        for tile in _tiles(plan, q, k, heads):
            query = _read_rows(q, tile, heads, num_kv_heads, plan.dtype) * (scale * LOG2E)
            upstream = _read_rows(grad_out, tile, heads, num_kv_heads, plan.dtype)
            statistics = lse[heads, tile].transpose(2, 3)
            rows, part = _attend_backward(query, upstream, statistics, chunks, plan, tile)
            _write_rows(grad_q, rows.mul_(scale), tile, heads, num_kv_heads)
            grad_weights[tile] += part
        chunks[2].mul_(1.0 / LOG2E)  # the scaled queries carry log2(e)
        for target, total in ((grad_k, chunks[2]), (grad_v, chunks[3])):
            write_chunks(target, total.unflatten(2, k.shape[2::2]), plan, heads)
        del copies, chunks  # before the next block allocates its own
    return grad_q, grad_k, grad_v, grad_weights
