"""Matrix products with full-precision results: what operands they take on a device, and the fastest call.

On a CPU operands are upcast to float32, because a product of 16-bit tensors would be rounded to 16 bit. On a GPU tensor
cores take 16-bit operands and return float32. Global precision flags are read by PyTorch as usual and never set here.

Legend: I, J rows of the factors, K their common length.
"""

from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

HALVES = (torch.float16, torch.bfloat16)


def operand_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of `dtype` inputs take their operands."""
    return dtype if device.type == "cuda" and dtype in HALVES else torch.promote_types(dtype, torch.float32)


def product(a: Tensor, b: Tensor, shift: Tensor | None = None) -> Tensor:
    """Compute ``a b^T + shift`` in float32 (float64 for float64).

    Args:
        a: ``[I, K]``; contiguous, or the transpose of a contiguous tensor.
        b: ``[J, K]``, likewise.
        shift: ``[J]`` in the dtype of the result, or None.

    Returns:
        ``[I, J]``.
    """
    if a.dtype in HALVES:
        out = torch.mm(a, b.t(), out_dtype=torch.float32)
    elif a.dtype == torch.float32 and a.device.type == "cpu" and _onednn_is_exact():
        return torch.ops.mkldnn._linear_pointwise(a, b, shift, "none", [], "")
    else:
        out = torch.mm(a, b.t())
    return out if shift is None else out.add_(shift)


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a b^T``, ``[I, K]`` times ``[J, K]``, to a float32 sum ``[I, J]`` (in place), or begin one."""
    if total is None:
        return product(a, b)
    if a.dtype in HALVES:
        return torch.addmm(total, a, b.t(), out_dtype=torch.float32, out=total)
    return total.add_(product(a, b))


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a b^T`` ``[I, J]`` of bfloat16 factors on a CPU: summed in float32, rounded to bfloat16."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def transposed(x: Tensor) -> Tensor:
    """Return ``x^T``, ``[I, J]`` to ``[J, I]`` of any dtype; a copy on a CPU, where products read it faster."""
    return x.t().contiguous() if x.device.type == "cpu" else x.t()


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Say whether a device is a CPU with bfloat16 products twice as fast as float32 ones (rounded to bfloat16)."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16")) and _onednn_is_exact()


@cache
def _onednn_is_exact() -> bool:
    """Try oneDNN's float32 product, up to a fifth faster than the default BLAS on some processors."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1.0, 1.0, 8 * 32, device="cpu").sin().view(8, 32)
    try:
        result = torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
    except RuntimeError:
        return False
    exact = (x[:, None].double() * x).sum(-1)
    return bool((result - exact).norm() < 1e-6 * exact.norm())  # 2e-3 if it multiplied in bfloat16


def _count_flops(a: list[int], b: list[int], *_: object, **__: object) -> int:
    return 2 * a[0] * a[1] * b[0]


if torch.ops.mkldnn._linear_pointwise not in flop_registry:  # so that FLOP counters see it
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_count_flops)
