"""Sliding-window attention by the optional `flash-attn` package (CUDA, float16 and bfloat16)."""

from importlib.util import find_spec

import torch
from torch import Tensor


def flash_problem(q: Tensor, document_ids: Tensor | None) -> str | None:
    """Say why `flash-attn` cannot serve ``q`` ``[B, Tq, H, D]`` and ``document_ids`` ``[B, Tk]``; None if it can."""
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn needs float16 or bfloat16 CUDA tensors, got {q.dtype} on {q.device.type}"
    if document_ids is not None:
        return "flash-attn has no document mask for padded batches"
    return None


def sliding_window_attention_flash(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | None, *, alibi_slopes: Tensor | None, scale: float
) -> Tensor:
    """Call ``flash_attn_func``, whose window ``(w, 0)`` sees ``w + 1`` keys and is aligned bottom right.

    Args:
        q: ``[B, Tq, H, D]``, float16 or bfloat16, as k and v.
        k: ``[B, Tk, Hk, D]``.
        v: ``[B, Tk, Hk, D]``.
        window_size: keys a query sees, itself included; None = all earlier ones.
        alibi_slopes: ``[H]`` or ``[B, H]``.
        scale: factor of the scores.

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q``.
    """
    from flash_attn import flash_attn_func

    slopes = None if alibi_slopes is None else alibi_slopes.float()
    left = -1 if window_size is None else window_size - 1
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, window_size=(left, 0), alibi_slopes=slopes)
    return out
