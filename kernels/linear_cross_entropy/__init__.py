"""Per-token loss of a language-model head without its logits: the public function, checks and dispatch.

Legend: N targets, M model width, V vocabulary.
"""

import math
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from kernels.linear_cross_entropy.chunked import IGNORED, Options
from kernels.linear_cross_entropy.operator import chunked_nll
from kernels.linear_cross_entropy.reference import token_nll_reference

__all__ = ["token_nll"]

Implementation = Literal["auto", "triton", "reference", "chunked"]
IMPLEMENTATIONS = ("auto", "triton", "reference", "chunked")
HAS_TRITON = find_spec("triton") is not None
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
    """Compute ``logsumexp(z) - z[target]`` of every target without the ``[N, V]`` logits.

    ``z = hidden weight^T + bias``, then ``z = c tanh(z / c)`` with a softcap c; float32 for 16-bit inputs too. Ignored
    rows, and in the backward rows whose gradient is 0, cost nothing, whatever they hold. Differentiable once. Under
    autocast, hidden and weight are rounded to its dtype, as in a linear layer; their gradients are not.

    Args:
        hidden: ``[N, M]`` float32, bfloat16, float16 or float64.
        weight: ``[V, M]`` in the dtype of ``hidden``.
        targets: ``[N]`` int64 in ``[0, V)`` or `ignore_index`.
        bias: ``[V]``, added as it is, in any float dtype.
        ignore_index: target whose rows give exactly 0.
        chunk_size: rows whose logits may be alive at once, of no influence beyond rounding; None: `default_chunk_size`.
        softcap: c > 0, or None.
        implementation: "chunked" (plain PyTorch, any device), "triton" (fused; CUDA tensors, or CPU tensors in Triton's
            interpreter), "reference" (dense logits, for tests) or "auto" (triton for CUDA tensors, else chunked).

    Returns:
        ``[N]`` float32 (float64 for float64 inputs).

    Raises:
        ValueError: on an unknown or unavailable implementation, shapes or dtypes that do not fit, a chunk_size or
            softcap that is not positive, or (CPU tensors) a target out of range; on a GPU its loss is NaN.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}, use one of {', '.join(IMPLEMENTATIONS)}")
    _check(hidden, weight, targets, bias)
    _check_targets(targets, weight.shape[0], ignore_index)
    _check_numbers(chunk_size, softcap)
    dtype = _product_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):  # products must not be rounded to 16 bit
        if implementation == "reference":
            return token_nll_reference(
                hidden.to(dtype), weight.to(dtype), targets, bias=bias, ignore_index=ignore_index, softcap=softcap
            )
        rows = chunk_size or default_chunk_size(weight.shape[0], hidden.device)
        keep_rows, fused = _only_hidden(hidden, weight, bias), _use_triton(implementation, hidden, dtype)
        targets = torch.where(targets == ignore_index, IGNORED, targets)
        return chunked_nll((hidden, weight, bias), targets, Options(rows, softcap, dtype, keep_rows, fused))


def _use_triton(implementation: str, hidden: Tensor, dtype: torch.dtype) -> bool:
    if implementation == "auto":
        return hidden.is_cuda and dtype != torch.float64 and HAS_TRITON
    if implementation != "triton":
        return False
    if not HAS_TRITON:
        raise ValueError("the triton implementation needs pip install triton; use implementation='chunked'")
    from kernels.linear_cross_entropy.triton import problem  # triton is optional and slow to import

    if reason := problem(hidden, dtype):
        raise ValueError(f"the triton implementation {reason}; use implementation='chunked'")
    return True


def _only_hidden(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether hidden alone is differentiated: then one sweep gives its gradient up to the upstream factors."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return torch.is_grad_enabled() and hidden.requires_grad and frozen


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Return the largest power of two of rows whose float32 logits fit 16 MiB (CPU) or 256 MiB (GPU), at least 16."""
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


def _check_numbers(chunk_size: int | None, softcap: float | None) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    # On a GPU this check would wait for the device.
    if targets.device.type != "cpu" or not targets.numel() or torch.compiler.is_compiling():
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
    if wrong.numel():
        raise ValueError(
            f"targets must lie in [0, {vocabulary}) or be ignore_index {ignore_index}, got {int(wrong[0])}"
        )
