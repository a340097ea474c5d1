"""Causal attention over the last `window_size` keys, with ALiBi and packed documents.

Legend: B batch, Tq queries, Tk keys, H heads, Hk kv heads, D head size.
"""

from typing import Literal, TypedDict

import torch
from torch import Tensor

from kernels.sliding_window.blocked import BlockedAttention
from kernels.sliding_window.flash import flash_problem, sliding_window_attention_flash
from kernels.sliding_window.flex import flex_problem, sliding_window_attention_flex
from kernels.sliding_window.reference import sliding_window_attention_reference

__all__ = ["sliding_window_attention"]

Implementation = Literal["auto", "flash", "flex", "sdpa", "reference"]
IMPLEMENTATIONS = ("auto", "flash", "flex", "sdpa", "reference")


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | None,
    *,
    alibi_slopes: Tensor | None = None,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attend to the last ``window_size`` keys of the same document.

    ``out_i = sum_j softmax_j(scale q_i . k_j - slope (i' - j)) v_j`` over ``i' - window_size < j <= i'``, where query i
    is key position ``i' = i + Tk - Tq`` (aligned bottom right). A row that sees nothing is 0, with gradient 0.

    Args:
        q: ``[B, Tq, H, D]``.
        k: ``[B, Tk, Hk, D]``, Tk >= Tq and H a multiple of Hk.
        v: ``[B, Tk, Hk, D]``.
        window_size: keys a query sees, itself included (a flash-attention window ``(w, 0)`` is ``w + 1``); None = all.
        alibi_slopes: ``[H]`` or ``[B, H]``; not differentiated.
        document_ids: ``[B, Tk]`` integers, non-decreasing over real tokens; only equal ids attend; -1 = padding.
        scale: factor of the scores; None = ``D ** -0.5``.
        implementation: "flash" (the flash-attn package), "flex" (PyTorch's compiled flex attention), "sdpa" (blocks of
            scaled dot products in PyTorch, memory linear in T), "reference" (dense) or "auto" (the first of flash, flex
            and sdpa that applies; flash and flex need 16-bit CUDA tensors).

    Returns:
        ``[B, Tq, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: on an unknown implementation, shapes that do not fit, or "flash" or "flex" where it cannot serve.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, use one of {', '.join(IMPLEMENTATIONS)}")
    _check(q, k, v, window_size, alibi_slopes, document_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if implementation in ("auto", "flash", "flex"):
        implementation = _choose(implementation, q, document_ids)
    if implementation == "flash":
        return sliding_window_attention_flash(q, k, v, window_size, alibi_slopes=alibi_slopes, scale=scale)
    options: _Options = {"alibi_slopes": alibi_slopes, "document_ids": document_ids, "scale": scale}
    if implementation == "flex":
        return sliding_window_attention_flex(q, k, v, window_size, **options)
    with torch.autocast(q.device.type, enabled=False):  # scores and softmax stay in the accumulation type
        if implementation == "reference":
            return sliding_window_attention_reference(q, k, v, window_size, **options)
        return BlockedAttention.apply(q, k, v, window_size, alibi_slopes, document_ids, scale)


class _Options(TypedDict):
    alibi_slopes: Tensor | None
    document_ids: Tensor | None
    scale: float


def _choose(wanted: Implementation, q: Tensor, document_ids: Tensor | None) -> Implementation:
    """Return the implementation asked for, or, for "auto", the first that applies."""
    problems = {"flash": flash_problem(q, document_ids), "flex": flex_problem(q)}
    if wanted != "auto":
        if problems[wanted] is not None:
            raise ValueError(f"{problems[wanted]}; use implementation='sdpa'")
        return wanted
    return "flash" if problems["flash"] is None else "flex" if problems["flex"] is None else "sdpa"


def _check(
    q: Tensor, k: Tensor, v: Tensor, window_size: int | None, slopes: Tensor | None, documents: Tensor | None
) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"expected q [B, Tq, H, D], k and v [B, Tk, Hk, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"there must be at least as many keys as queries, got {k.shape[1]} and {q.shape[1]}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size counts the query itself and must be at least 1 or None, got {window_size}")
    heads = q.shape[2]
    if slopes is not None and slopes.shape not in ((heads,), (q.shape[0], heads)):
        raise ValueError(f"alibi_slopes must be [H] or [B, H], got {list(slopes.shape)} for {heads} heads")
    if documents is not None and (documents.shape != k.shape[:2] or documents.dtype.is_floating_point):
        raise ValueError(f"document_ids must be integers [B, Tk], got {documents.dtype} {list(documents.shape)}")
    if documents is not None and documents.dtype == torch.bool:
        raise ValueError("document_ids must be integers [B, Tk], got a bool mask")
