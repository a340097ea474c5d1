"""Causal retrieval: the best earlier chunks of each query, and the weights that fuse them.

Notable: nothing of size N x E is kept. Scores are formed in row blocks without gradient; of each block only the columns
that some row may see. Groups of 32 columns whose maximum is not among the best K cannot hold a winner, so the exact
selection runs over K groups. The selected scores alone carry gradients.

Legend: B batch, N queries, E stored chunks, M model width, K retrieved chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

Visible: TypeAlias = Literal["causal"] | Tensor
Noise: TypeAlias = Literal["gumbel"] | Tensor | None

BLOCK = 2**20
COLUMNS = 32


def retrieve_chunks(
    queries: Tensor,
    landmarks: Tensor,
    top_k: int,
    *,
    visible: Visible = "causal",
    noise: Noise = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the ``top_k`` visible chunks of largest ``s + noise``, with ``s = q . l / sqrt(M)``.

    Args:
        queries: ``[B, N, M]``; computed in float32 whatever autocast says (float64 stays float64).
        landmarks: ``[B, E, M]``.
        top_k: number of slots K.
        visible: "causal": row i is chunk number E - N + i and sees strictly earlier chunks; or int ``[B or 1, N, 2]``
            half-open ranges; or bool ``[B or 1, N, E]``.
        noise: None, "gumbel" (one draw of ``-log(Exp(1))`` per row and chunk from `generator`) or ``[B, N, E]``.
        generator: source of the noise; None = the default one of the device.

    Returns:
        ``indices`` int32 ``[B, N, K]``, best first, ties to the lower chunk, -1 where fewer are visible; ``scores``
        ``[B, N, K]`` without noise, -inf at empty slots, differentiable in queries and landmarks.
    """
    _check(queries, landmarks, top_k, visible, noise)
    acc = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False), _exact_products(queries.device):
        q, keys = queries.to(acc), landmarks.to(acc)
        with torch.no_grad():
            indices, scores = _select(q, keys, top_k, visible, noise, generator)
        if torch.is_grad_enabled() and (queries.requires_grad or landmarks.requires_grad):
            scores = _SelectedScores.apply(q, keys, indices)
    return indices, scores


def chunk_weights(scores: Tensor) -> Tensor:
    """Compute ``softmax(scores)`` over the last dimension; -inf gives 0 and a row of only -inf gives zeros.

    Args:
        scores: ``[..., K]``.

    Returns:
        ``[..., K]``; gradients are 0, never NaN, at empty slots.
    """
    empty = scores == float("-inf")
    lonely = empty.all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(lonely, 0.0), -1).masked_fill(empty, 0.0)


@contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Forbid reduced precision products (TF32, bf16) inside; the user's setting is back afterwards."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        # Reading resolves what is inherited from torch.backends; it stays inherited where that gives the same.
        backend.fp32_precision = "none"
        if backend.fp32_precision != before:
            backend.fp32_precision = before


def _select(
    q: Tensor, keys: Tensor, top_k: int, visible: Visible, noise: Noise, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Run the selection in row blocks: ``[B, N, M]``, ``[B, E, M]`` to indices and scores ``[B, N, K]``."""
    batch, num_rows, width = q.shape
    num_chunks = keys.shape[1]
    indices = torch.full((batch, num_rows, top_k), -1, dtype=torch.int32, device=q.device)
    scores = torch.full((batch, num_rows, top_k), float("-inf"), dtype=q.dtype, device=q.device)
    step = max(1, BLOCK // max(1, batch * num_chunks))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        # Row i of "causal" is chunk E - N + i: no row of the block sees more columns than its last one.
        stop = max(0, num_chunks - num_rows + rows.stop - 1) if isinstance(visible, str) else num_chunks
        if stop == 0:
            continue
        stop = min(num_chunks, stop + -stop % COLUMNS)
        block = torch.bmm(q[:, rows] * width**-0.5, keys[:, :stop].transpose(1, 2))
        noisy = _add_noise(block, noise, rows, generator)
        noisy.masked_fill_(_hidden(visible, rows, num_chunks - num_rows, stop, q.device), float("-inf"))
        best, where = _top(noisy, min(top_k, stop))
        filled = best > float("-inf")
        found = slice(0, best.shape[-1])
        indices[:, rows, found] = where.masked_fill(~filled, -1).int()
        scores[:, rows, found] = block.gather(-1, where).masked_fill(~filled, float("-inf"))
    return indices, scores


def _add_noise(block: Tensor, noise: Noise, rows: slice, generator: torch.Generator | None) -> Tensor:
    if noise is None:
        return block
    if isinstance(noise, Tensor):
        return block + noise[:, rows, : block.shape[-1]]
    draw = torch.empty(block.shape, dtype=torch.float32, device=block.device).exponential_(generator=generator)
    return block - draw.log_()


def _hidden(visible: Visible, rows: slice, offset: int, stop: int, device: torch.device) -> Tensor:
    """Return what the rows may not see: bool ``[B or 1, rows, stop]``."""
    column = torch.arange(stop, device=device)
    if isinstance(visible, str):
        own = torch.arange(rows.start, rows.stop, device=device) + offset
        return (column >= own[:, None])[None]
    if visible.dtype == torch.bool:
        return ~visible[:, rows, :stop]
    first, last = visible[:, rows].unsqueeze(-1).unbind(2)
    return (column < first) | (column >= last)


def _top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select the largest of each row, ties to the lower column: ``[B, R, E]`` to values and columns ``[B, R, K]``.

    The K best columns lie in the K groups of largest maximum (ties to the lower group): each group ahead of a column's
    own holds something that goes before it.
    """
    num_columns = scores.shape[-1]
    if num_columns <= 2 * COLUMNS * top_k:
        return _exact_top(scores, top_k)
    if num_columns % COLUMNS:
        scores = torch.nn.functional.pad(scores, (0, -num_columns % COLUMNS), value=float("-inf"))
    groups = scores.unflatten(-1, (-1, COLUMNS))
    chosen = _exact_top(groups.amax(-1), top_k)[1].sort(-1).values  # ascending, so that columns stay in order
    candidates = groups.gather(2, chosen.unsqueeze(-1).expand(*chosen.shape, COLUMNS)).flatten(2)
    values, place = _exact_top(candidates, top_k)
    return values, chosen.gather(-1, place // COLUMNS) * COLUMNS + place % COLUMNS


def _exact_top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    if scores.dtype == torch.float64:
        values, columns = scores.sort(dim=-1, descending=True, stable=True)
        return values[..., :top_k], columns[..., :top_k]
    # One integer orders by score, then by lower column: the score's bits above, the flipped column below.
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = scores.shape[-1] - 1
    key = (ordered << 32) + (last - torch.arange(last + 1, device=scores.device))
    columns = last - (key.topk(top_k, -1).values & 0xFFFFFFFF)
    return scores.gather(-1, columns), columns


class _SelectedScores(torch.autograd.Function):
    """The scores of the selected chunks alone, so that the backward reads K chunks of a row, never E."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(q, keys, indices)
        scores = torch.empty(indices.shape, dtype=q.dtype, device=q.device)
        for rows in _row_blocks(q, indices):
            chosen = _gather(keys, indices[:, rows])
            scores[:, rows] = torch.matmul(chosen, q[:, rows].unsqueeze(-1)).squeeze(-1)
        return scores.mul_(q.shape[-1] ** -0.5).masked_fill_(indices < 0, float("-inf"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        q, keys, indices = ctx.saved_tensors
        grad = (grad * q.shape[-1] ** -0.5).masked_fill(indices < 0, 0.0)
        grad_q, grad_keys = torch.empty_like(q), torch.zeros_like(keys)
        with torch.autocast(q.device.type, enabled=False), _exact_products(q.device):
            for rows in _row_blocks(q, indices):
                part = grad[:, rows]
                grad_q[:, rows] = torch.matmul(part.unsqueeze(2), _gather(keys, indices[:, rows])).squeeze(2)
                for b in range(q.shape[0]):
                    update = (part[b].unsqueeze(-1) * q[b, rows, None]).flatten(0, 1)
                    _add_rows(grad_keys[b], indices[b, rows].flatten().long().clamp(min=0), update)
        return grad_q, grad_keys, None


def _row_blocks(q: Tensor, indices: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, q.shape[0] * q.shape[2] * indices.shape[2]))
    return (slice(start, min(start + step, q.shape[1])) for start in range(0, q.shape[1], step))


def _gather(keys: Tensor, indices: Tensor) -> Tensor:
    """Gather ``[B, E, M]`` at ``[B, R, K]`` to ``[B, R, K, M]``; zeros at -1."""
    batch = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
    return keys[batch, indices.long().clamp(min=0)].masked_fill((indices < 0).unsqueeze(-1), 0.0)


def _add_rows(total: Tensor, index: Tensor, update: Tensor) -> None:
    """Add rows in a fixed order (on a GPU index_add_ uses atomics, index_put_ sorts)."""
    if total.is_cuda:
        total.index_put_((index,), update, accumulate=True)
    else:
        total.index_add_(0, index, update)


def _check(queries: Tensor, landmarks: Tensor, top_k: int, visible: Visible, noise: Noise) -> None:
    if queries.dim() != 3 or landmarks.dim() != 3 or queries.shape[::2] != landmarks.shape[::2]:
        raise ValueError(
            f"expected queries [B, N, M] and landmarks [B, E, M], got {list(queries.shape)} and {list(landmarks.shape)}"
        )
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    batch, rows, chunks = queries.shape[0], queries.shape[1], landmarks.shape[1]
    if isinstance(visible, str):
        if visible != "causal":
            raise ValueError(f"visible must be 'causal', int [B, N, 2] or bool [B, N, E], got {visible!r}")
        if chunks < rows:
            raise ValueError(f"visible='causal' needs at least as many chunks as queries, got {chunks} and {rows}")
    else:
        last = chunks if visible.dtype == torch.bool else 2
        if visible.is_floating_point() or visible.shape not in ((batch, rows, last), (1, rows, last)):
            raise ValueError(
                f"visible must be int [B or 1, N, 2] or bool [B or 1, N, E], got {visible.dtype} {list(visible.shape)}"
            )
    if isinstance(noise, Tensor) and noise.shape != (batch, rows, chunks):
        raise ValueError(f"noise must be [B, N, E] = {[batch, rows, chunks]}, got {list(noise.shape)}")
    if isinstance(noise, str) and noise != "gumbel":
        raise ValueError(f"noise must be None, 'gumbel' or a tensor, got {noise!r}")
