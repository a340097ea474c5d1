"""Causal retrieval: the best earlier chunks of each query, and the weights that fuse them.

Notable: the selection (`selection.py`) has no gradient; the K selected scores of a row are formed again with one.

Legend: B batch, N queries, E stored chunks, M model width, K retrieved chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from kernels.gca.noise import draw_seed
from kernels.gca.selection import Place, Rules, select

Visible: TypeAlias = Literal["causal"] | Tensor
Noise: TypeAlias = Literal["gumbel"] | Tensor | None

# Elements of the gathered landmarks of a block of rows.
BLOCK = 2**20


def retrieve_chunks(
    queries: Tensor,
    landmarks: Tensor,
    top_k: int,
    *,
    visible: Visible = "causal",
    noise: Noise = None,
    generator: torch.Generator | Tensor | None = None,
    first_row: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the ``top_k`` visible chunks of largest ``s + noise``, with ``s = q . l / sqrt(M)``.

    Args:
        queries: ``[B, N, M]``, any float type; computed in float32 whatever autocast says (float64 stays float64).
        landmarks: ``[B, E, M]``, any float type.
        top_k: number of slots K.
        visible: "causal": row i is chunk number E - N + i and sees strictly earlier chunks; or int ``[B or 1, N, 2]``
            half-open ranges; or bool ``[B or 1, N, E]``; rows are those of `queries` in each form.
        noise: None, "gumbel" (independent ``-log(Exp(1))`` per row and chunk) or ``[B, N, E]``.
        generator: source of the seed of the noise; None = the default one of the device. Or the seeds, int64 ``[B]``:
            a row's noise then depends on its seed alone.
        first_row: the queries are rows ``first_row ... first_row + N - 1`` of a sequence with a row a chunk, a slice:
            for "causal", row i is chunk number ``first_row + i``, and its noise is that of row ``first_row + i``.
            Slices give, bit by bit, what the whole sequence (``first_row=0``) gives with the same seeds; chunks behind
            their last row need not be there. For that they multiply whole blocks of rows. On a GPU, scores that carry
            a gradient may differ by rounding. None = no slice (decoding is none).

    Returns:
        ``indices`` int32 ``[B, N, K]``, best first, ties to the lower chunk, -1 where fewer are visible; ``scores``
        float32 (or float64) ``[B, N, K]`` without noise, -inf at empty slots, differentiable in queries and landmarks.
    """
    _check(queries, landmarks, top_k, visible, noise, generator)
    place = _place(queries, landmarks, visible, first_row)
    acc = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False), _exact_products(queries.device):
        q = queries.to(acc)
        with torch.no_grad():
            seed = draw_seed(q.device, generator) if isinstance(noise, str) else None
            seen = visible if isinstance(visible, Tensor) else None
            rules = Rules(seen, noise if isinstance(noise, Tensor) else None, seed, place)
            indices, scores = select(q, landmarks, top_k, rules)
        if torch.is_grad_enabled() and (queries.requires_grad or landmarks.requires_grad):
            scores = _SelectedScores.apply(q, landmarks.to(acc), indices)
    return indices, scores


def chunk_weights(scores: Tensor) -> Tensor:
    """Compute ``softmax(scores)`` over the last dimension; -inf gives 0 and a row of only -inf gives zeros.

    Args:
        scores: ``[..., K]``, float32 or float64.

    Returns:
        ``[..., K]`` in the same dtype; gradients are 0, never NaN, at empty slots.
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


class _SelectedScores(torch.autograd.Function):
    """``q . l / sqrt(M)`` of the selected chunks alone, so that the backward reads K chunks of a row, never E.

    Queries ``[B, N, M]`` and keys ``[B, E, M]`` at int32 indices to scores ``[B, N, K]``, -inf at -1; one float type.
    """

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


def _check(
    queries: Tensor,
    landmarks: Tensor,
    top_k: int,
    visible: Visible,
    noise: Noise,
    generator: torch.Generator | Tensor | None,
) -> None:
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
    else:
        last = chunks if visible.dtype == torch.bool else 2
        if visible.is_floating_point() or visible.shape not in ((batch, rows, last), (1, rows, last)):
            raise ValueError(
                f"visible must be int [B or 1, N, 2] or bool [B or 1, N, E], got {visible.dtype} {list(visible.shape)}"
            )
    if isinstance(noise, Tensor) and noise.shape != (batch, rows, chunks):
        raise ValueError(f"noise must be [B, N, E] = {[batch, rows, chunks]}, got {list(noise.shape)}")
    if isinstance(generator, Tensor) and (generator.shape != (batch,) or generator.dtype != torch.int64):
        raise ValueError(f"seeds must be int64 [B] = {[batch]}, got {generator.dtype} {list(generator.shape)}")
    if isinstance(noise, str) and noise != "gumbel":
        raise ValueError(f"noise must be None, 'gumbel' or a tensor, got {noise!r}")


def _place(queries: Tensor, landmarks: Tensor, visible: Visible, first_row: int | None) -> Place:
    if first_row is not None and first_row < 0:
        raise ValueError(f"first_row must be the number of a row, 0 or more, got {first_row}")
    rows, chunks = (first_row or 0) + queries.shape[1], landmarks.shape[1]
    if isinstance(visible, str) and chunks < rows:
        raise ValueError(
            f"visible='causal' needs at least as many chunks as rows up to the last query, got {chunks} and {rows}"
        )
    return Place.make(queries.shape[1], chunks, first_row)
