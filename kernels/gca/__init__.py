"""Grouped cross attention and its causal retrieval (arXiv 2410.01651): the public functions and their dispatch.

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, D head size, E stored chunks, C keys of a
chunk, K retrieved chunks.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kernels.gca.arguments import Arguments, check_arguments
from kernels.gca.operator import gca_operator
from kernels.gca.reference import grouped_cross_attention_reference
from kernels.gca.retrieval import chunk_weights, retrieve_chunks
from kernels.gca.reverse_map import reverse_index

__all__ = ["chunk_weights", "grouped_cross_attention", "retrieve_chunks", "reverse_index"]

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
    reverse: Tensor | None = None,
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
            differentiable twice), "cpu" (tiled PyTorch, any device) or "auto" (triton for CUDA tensors; else as "cpu",
            by compiled C where a compiler is found and its results pass a check).
        reverse: ``reverse_index(indices, E)``, sorted once for several layers; the backward of "triton" reads it.

    Returns:
        ``[B, N, S, H, D]`` in the dtype of ``q``.

    Raises:
        ValueError: on an unknown implementation, shapes or dtypes that do not fit, or (CPU tensors) an index out of
            range.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, use one of {', '.join(IMPLEMENTATIONS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = Arguments(q, k, v, indices, weights, kv_lengths)
    if indices.dim() != 4:
        return _attend(arguments, reverse, scale, softmax_off_by_one, implementation)
    out = _attend(arguments.fold_heads(), reverse, scale, softmax_off_by_one, implementation)
    return out.unflatten(0, (q.shape[0], -1)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4)


def _attend(
    arguments: Arguments,
    reverse: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
    implementation: Implementation,
) -> Tensor:
    check_arguments(arguments, reverse)
    q, tensors = arguments.q, arguments.tensors()
    with torch.autocast(q.device.type, enabled=False):  # products stay in the accumulation type
        if implementation == "reference":
            return grouped_cross_attention_reference(*tensors, scale=scale, softmax_off_by_one=softmax_off_by_one)
        engine = "native" if implementation == "auto" else implementation
        if implementation == "triton" or (implementation == "auto" and _triton_serves(q)):
            from kernels.gca.triton import check_device  # triton is optional and slow to import

            check_device(q)
            engine = "triton"
        return gca_operator(*tensors, reverse, scale, softmax_off_by_one, engine)[0]


def _triton_serves(q: Tensor) -> bool:
    return q.is_cuda and q.dtype != torch.float64 and q.shape[-1] <= 256 and find_spec("triton") is not None
