"""Sliding-window attention by PyTorch's `flex_attention`, compiled for CUDA: window, ALiBi and documents in one kernel.

Notable: which blocks of keys a block of queries can see follows from the window by arithmetic, so that no mask of size
Tq x Tk is ever formed; inside those blocks `mask_mod` decides key by key.

Legend: B batch, Tq queries, Tk keys, H heads, Hk kv heads, D head size, Q blocks of queries, K blocks of keys.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


def flex_problem(q: Tensor) -> str | None:
    """Say why `flex_attention` cannot serve queries ``[B, Tq, H, D]``; None if it can."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return f"flex attention needs float16 or bfloat16 CUDA tensors, got {q.dtype} on {q.device.type}"
    if q.shape[-1] < 16:
        return f"flex attention needs a head size of at least 16, got {q.shape[-1]}"
    if find_spec("triton") is None:
        return "flex attention needs Triton (pip install triton)"
    return None


def sliding_window_attention_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | None,
    *,
    alibi_slopes: Tensor | None,
    document_ids: Tensor | None,
    scale: float,
    compiled: bool = True,
) -> Tensor:
    """Attend through `flex_attention`; a row that sees nothing is 0.

    Args:
        q: ``[B, Tq, H, D]``, float16 or bfloat16 if compiled, as k and v; query i is key position ``i + Tk - Tq``.
        k: ``[B, Tk, Hk, D]``.
        v: ``[B, Tk, Hk, D]``.
        window_size: keys a query sees, itself included; None = all earlier ones.
        alibi_slopes: ``[H]`` or ``[B, H]``.
        document_ids: ``[B, Tk]``; -1 = padding.
        scale: factor of the scores.
        compiled: fuse; without, the same functions run on dense scores (any device, forward only).

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q``.
    """
    num_queries, num_keys = q.shape[1], k.shape[1]
    offset, window = num_keys - num_queries, window_size or num_keys
    numbers, blocks = visible_blocks(num_queries, num_keys, window, q.device)
    mask = BlockMask.from_kv_blocks(
        numbers,
        blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=window_mask(offset, window, document_ids),
        seq_lengths=(num_queries, num_keys),
    )
    bias = None if alibi_slopes is None else alibi_bias(offset, alibi_slopes.detach().float().expand(q.shape[0], -1))
    attend = _compiled() if compiled else flex_attention
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    out: Tensor = attend(
        query, key, value, score_mod=bias, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def visible_blocks(num_queries: int, num_keys: int, window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """List the key blocks each query block may see.

    Returns:
        How many, int32 ``[1, 1, Q]``, and which, int32 ``[1, 1, Q, K]`` (entries beyond the number mean nothing).
    """
    offset, last_block = num_keys - num_queries, (num_keys - 1) // BLOCK
    first = torch.arange(0, num_queries, BLOCK, device=device) + offset
    last = (first + BLOCK - 1).clamp(max=num_keys - 1)
    low, high = (first - window + 1).clamp(min=0) // BLOCK, last // BLOCK
    blocks = (low[:, None] + torch.arange(last_block + 1, device=device)).clamp(max=last_block)
    return (high - low + 1).int()[None, None], blocks.int()[None, None]


def window_mask(offset: int, window: int, document_ids: Tensor | None) -> Callable[..., Tensor]:
    """Return the `mask_mod`: the last ``window`` keys, of the same document (int ``[B, Tk]``, -1 = padding)."""

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        return (distance >= 0) & (distance < window)

    def seen_in_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert document_ids is not None
        own = document_ids[batch, query + offset]
        return seen(batch, head, query, key) & (own == document_ids[batch, key]) & (own >= 0)

    return seen if document_ids is None else seen_in_document


def alibi_bias(offset: int, slopes: Tensor) -> Callable[..., Tensor]:
    """Return the `score_mod`: minus slope ``[B, H]`` (float32) times distance."""

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[batch, head] * (query + offset - key)

    return biased
