"""Per-token loss of a language-model head without its logits: the public function, checks and dispatch.

Legend: N targets, M model width, V vocabulary.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from kernels.linear_cross_entropy.chunked import Options
from kernels.linear_cross_entropy.operator import TokenNLL
from kernels.linear_cross_entropy.reference import token_nll_reference

__all__ = ["token_nll"]

Implementation = Literal["auto", "reference", "chunked"]
IMPLEMENTATIONS = ("auto", "reference", "chunked")
# Bytes of one chunk of float32 logits.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**28}


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    softcap: float | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Compute the loss of every target, ``logsumexp(z) - z[target]``, without the ``[N, V]`` logits.

    ``z = hidden weight^T + bias``, then ``z = c tanh(z / c)`` with a softcap c. Logits are float32 for 16-bit inputs
    too. The backward takes any gradient ``[N]`` and recomputes the logits; rows that are ignored, and in the backward
    rows whose gradient is 0, are left out: they cost nothing, whatever they hold. Differentiable once.

    Under autocast, hidden and weight are rounded to its dtype, as in a linear layer; their gradients are not.

    Args:
        hidden: ``[N, M]`` float32, bfloat16, float16 or float64.
        weight: ``[V, M]`` in the dtype of ``hidden``.
        targets: ``[N]`` int64 in ``[0, V)`` or `ignore_index`.
        bias: ``[V]``.
        ignore_index: target whose rows give exactly 0.
        chunk_size: rows whose logits may be alive at once, at least 1; None = as many as fill 16 MiB on a CPU and 256
            MiB on a GPU, a power of two and at least 16. Changes results only by rounding.
        softcap: c > 0, or None.
        implementation: "chunked" (plain PyTorch, any device), "reference" (dense logits, for tests) or "auto"
            (chunked).

    Returns:
        ``[N]`` float32 (float64 for float64 inputs).

    Raises:
        ValueError: on an unknown implementation, shapes or dtypes that do not fit, a chunk_size or softcap that is not
            positive, or (CPU tensors) a target out of range.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, use one of {', '.join(IMPLEMENTATIONS)}")
    _check(hidden, weight, targets, bias)
    _check_targets(targets, weight.shape[0], ignore_index)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if chunk_size is None:
        chunk_size = default_chunk_size(weight.shape[0], hidden.device)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype = _product_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):  # products must not be rounded to 16 bit
        if implementation == "reference":
            return token_nll_reference(
                hidden.to(dtype), weight.to(dtype), targets, bias=bias, ignore_index=ignore_index, softcap=softcap
            )
        options = Options(ignore_index, chunk_size, softcap, dtype)
        nll: Tensor = TokenNLL.apply(hidden, weight, bias, targets, options)
        return nll


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Return the largest power of two of rows whose float32 logits fit the device's budget, at least 16."""
    rows = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary)
    return max(16, 1 << max(rows, 1).bit_length() - 1)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype a linear layer would multiply in: the autocast dtype (float64 is left alone), or their own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight differ in dtype: {hidden.dtype} and {weight.dtype}; cast one or use autocast"
        )
    return hidden.dtype


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [N, M] and weight [V, M], got {list(hidden.shape)} and {list(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [N] = {list(hidden.shape[:1])}, got {list(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    floats = [x for x in (hidden, weight, bias) if x is not None]
    if not all(x.is_floating_point() for x in floats):
        raise ValueError(f"hidden, weight and bias must be floats, got {', '.join(str(x.dtype) for x in floats)}")
    if len({x.device for x in (*floats, targets)}) > 1:
        raise ValueError("hidden, weight, targets and bias must be on one device")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    # On a GPU this check would wait for the device.
    if targets.device.type != "cpu" or not targets.numel() or torch.compiler.is_compiling():
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
    if wrong.numel():
        raise ValueError(
            f"targets must lie in [0, {vocabulary}) or be ignore_index {ignore_index}, got {int(wrong[0])}"
        )
