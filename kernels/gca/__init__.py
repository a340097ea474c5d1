"""Grouped cross attention and its causal retrieval (arXiv 2410.01651): public functions, checks and dispatch.

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kernels.gca.cpu import gca_cpu
from kernels.gca.reference import grouped_cross_attention_reference
from kernels.gca.retrieval import chunk_weights, retrieve_chunks

__all__ = ["chunk_weights", "grouped_cross_attention", "retrieve_chunks"]

Implementation = Literal["auto", "triton", "reference", "cpu"]
IMPLEMENTATIONS = ("auto", "triton", "reference", "cpu")


def grouped_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    kv_lengths: Tensor | None = None,
    scale: float | None = None,
    softmax_off_by_one: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attend from each query group to its retrieved chunks, one softmax per chunk, and fuse them by the weights.

    ``out_t = sum_j w_j softmax_c(scale q_t . K[e_j, c]) V[e_j]`` with ``e_j = indices[b, n, j]``. There is no position
    and no mask between rows and keys. A slot with index -1, or whose chunk has no valid key, adds nothing; whatever
    dead keys, unselected chunks and weights of empty slots hold (even NaN) has no influence and gets gradient 0.

    Args:
        q: ``[B, N, S, H, D]`` queries, float32, float16, bfloat16 (or float64 on "reference" and "cpu").
        k: ``[B, E, C, Hk, D]`` keys of the stored chunks, un-gathered, any strides; H is a multiple of Hk.
        v: ``[B, E, C, Hk, D]`` values.
        indices: ``[B, N, K]`` int32, chunk of each slot; duplicates count separately. ``[B, N, Hk, K]``: one retrieval
            per kv head (then `weights` alike).
        weights: ``[B, N, K]`` float32 (float64 with float64 queries), any sign, need not sum to 1.
        kv_lengths: ``[B, E]`` int32, valid keys of each chunk; None = all.
        scale: factor of the scores; None = ``D ** -0.5``.
        softmax_off_by_one: add 1 to each softmax's denominator.
        implementation: "triton" (fused; CUDA tensors, or CPU tensors in Triton's interpreter), "reference" (dense,
            differentiable twice), "cpu" (tiled PyTorch, any device) or "auto" (triton for CUDA tensors, else cpu).

    Returns:
        ``[B, N, S, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: on an unknown implementation, shapes or dtypes that do not fit, or (CPU tensors) an index out of
            range.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, use one of {', '.join(IMPLEMENTATIONS)}")
    if indices.dim() == 4:
        folded = _fold_heads(q, k, v, indices, weights, kv_lengths)
        out = grouped_cross_attention(
            *folded[:5],
            kv_lengths=folded[5],
            scale=scale,
            softmax_off_by_one=softmax_off_by_one,
            implementation=implementation,
        )
        return out.unflatten(0, (q.shape[0], -1)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
    _check(q, k, v, indices, weights)
    _check_lengths(k, kv_lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):  # products stay in the accumulation type
        if implementation == "reference":
            return grouped_cross_attention_reference(
                q, k, v, indices, weights, kv_lengths=kv_lengths, scale=scale, softmax_off_by_one=softmax_off_by_one
            )
        if implementation == "triton" or (implementation == "auto" and _triton_serves(q)):
            from kernels.gca.triton import check_device, gca_triton  # triton is optional and slow to import

            check_device(q)
            return gca_triton(q, k, v, indices, weights, kv_lengths, scale, softmax_off_by_one)[0]
        return gca_cpu(q, k, v, indices, weights, kv_lengths, scale, softmax_off_by_one, implementation == "auto")[0]


def _triton_serves(q: Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= 256 and find_spec("triton") is not None


def _fold_heads(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor, kv_lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Turn one retrieval per kv head into more batch rows of one kv head each."""
    heads = k.shape[3] if k.dim() == 5 else 0
    if indices.shape[2] != heads or q.dim() != 5 or q.shape[3] % heads or weights.shape != indices.shape:
        raise ValueError(
            "indices and weights of one retrieval per kv head must be [B, N, Hk, K] beside k [B, E, C, Hk, D], "
            f"got {list(indices.shape)}, {list(weights.shape)} and {list(k.shape)}"
        )
    query = q.unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
    key, value = (x.permute(0, 3, 1, 2, 4).flatten(0, 1).unsqueeze(3) for x in (k, v))
    slots, slot_weights = (x.transpose(1, 2).flatten(0, 1) for x in (indices, weights))
    lengths = None if kv_lengths is None else kv_lengths.repeat_interleave(heads, 0)
    return query, key, value, slots, slot_weights, lengths


def _check(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, weights: Tensor) -> None:
    if q.dim() != 5 or k.dim() != 5 or k.shape != v.shape or indices.dim() != 3:
        raise ValueError(
            "expected q [B, N, S, H, D], k and v [B, E, C, Hk, D], indices [B, N, K], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {list(indices.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[4] != k.shape[4] or indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and indices {list(indices.shape)} "
            "differ in batch, query groups or head size"
        )
    if indices.shape != weights.shape:
        raise ValueError(f"indices and weights differ in shape: {list(indices.shape)} and {list(weights.shape)}")
    if q.shape[3] % k.shape[3]:
        raise ValueError(f"{q.shape[3]} query heads are not a multiple of {k.shape[3]} key/value heads")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    wanted = torch.promote_types(q.dtype, torch.float32)
    if weights.dtype != wanted or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"weights must be {wanted} and indices int32, got {weights.dtype} and {indices.dtype}")
    if len({x.device for x in (q, k, v, indices, weights)}) > 1:
        raise ValueError("q, k, v, indices and weights must be on one device")
    # On a GPU this check would wait for the device.
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in indices.aminmax())
        if low < -1 or high >= k.shape[1]:
            raise ValueError(f"indices must lie in [-1, {k.shape[1]}), got values from {low} to {high}")


def _check_lengths(k: Tensor, kv_lengths: Tensor | None) -> None:
    if kv_lengths is None:
        return
    if kv_lengths.shape != k.shape[:2] or kv_lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"kv_lengths must be int32 [B, E] = {list(k.shape[:2])}, got {kv_lengths.dtype} {list(kv_lengths.shape)}"
        )
    if kv_lengths.device.type == "cpu" and kv_lengths.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in kv_lengths.aminmax())
        if low < 0 or high > k.shape[2]:
            raise ValueError(f"kv_lengths must lie in [0, {k.shape[2]}], got values from {low} to {high}")
