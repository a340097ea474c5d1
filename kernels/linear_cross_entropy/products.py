"""Matrix products with full-precision results: which operands they take on a device, and the call that is fastest.

On a CPU, operands are upcast to float32 (a product of 16-bit tensors would be rounded to 16 bit). On a GPU, tensor
cores take 16-bit operands and return float32. Global precision flags are read by PyTorch as usual and never set here.
"""

from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of `dtype` inputs take their operands."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def product(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """Compute ``a b^T + shift`` in float32 (float64 for float64).

    Args:
        a: ``[I, K]``, contiguous or the transpose of a contiguous tensor.
        b: ``[J, K]``, likewise.
        shift: ``[J]`` in the dtype of the result, or None.

    Returns:
        ``[I, J]``.
    """
    if a.dtype in (torch.float16, torch.bfloat16):
        out: Tensor = torch.mm(a, b.t(), out_dtype=torch.float32)
    elif a.dtype == torch.float32 and a.device.type == "cpu" and _onednn_is_exact():
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, shift, "none", [], "")
        return fused
    else:
        out = torch.mm(a, b.t())
    return out if shift is None else out.add_(shift)


@cache
def _onednn_is_exact() -> bool:
    """Try oneDNN's float32 product, up to a fifth faster than the default BLAS on some processors."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1.0, 1.0, 64 * 96, dtype=torch.float64).sin().view(64, 96)
    try:
        result = torch.ops.mkldnn._linear_pointwise(x.float(), x.float(), None, "none", [], "")
    except RuntimeError:
        return False
    return bool((result.double() - x @ x.t()).abs().max() < 2e-5)  # 1e-2 if it multiplied in bfloat16


def _count(a: list[int], b: list[int], *_: object, **__: object) -> int:
    return 2 * a[0] * a[1] * b[0]


if torch.ops.mkldnn._linear_pointwise not in flop_registry:  # so that FLOP counters see it
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count)
