"""One tile of logits in Triton: the same two steps as `tiles.py`, each one pass over the product.

Notable: the products stay with cuBLAS; a kernel reads a row of the tile once, in registers, where plain PyTorch makes
six to ten passes over memory. Runs on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1
before the first import). tanh is written with exp, since the interpreter has no other.

Legend: S rows of a tile, U vocabulary entries of a tile.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments are typed by Triton at launch.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_cross_entropy.products import product
from kernels.linear_cross_entropy.tiles import Running, Tile

BLOCK = 2048


@triton.jit
def capped(z, cap):
    """Compute ``cap tanh(z / cap)``; the series avoids the cancellation near 0."""
    x = z / cap
    square = x * x
    series = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return cap * tl.where(square < 0.04, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def load_logits(z, bias, column, U, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Load logits of a row, with bias and softcap; -inf beyond the tile."""
    inside = column < U
    x = tl.load(z + column, mask=inside, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=inside, other=0.0)
    if HAS_CAP:
        x = capped(x, cap)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def accumulate_kernel(
    z, bias, targets, peak, total, chosen, out, U, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update peak, total and chosen of a row; with KEEP write ``exp(z - peak)``, 0 at the target, times the slope."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    z += row * U
    high, norm = tl.load(peak + row), tl.load(total + row)
    target = tl.load(targets + row)
    for start in range(0, U, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(z, bias, column, U, cap, HAS_BIAS, HAS_CAP)
        new = tl.maximum(high, tl.max(x, 0))
        norm = norm * tl.exp2((high - new) * LOG2E) + tl.sum(tl.exp2((x - new) * LOG2E), 0)
        high = new
        if (target >= start) & (target < start + BLOCK) & (target < U):
            tl.store(chosen + row, tl.sum(tl.where(column == target, x, 0.0), 0))
    tl.store(peak + row, high)
    tl.store(total + row, norm)
    if KEEP:
        for start in range(0, U, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = load_logits(z, bias, column, U, cap, HAS_BIAS, HAS_CAP)
            p = tl.where(column == target, 0.0, tl.exp2((x - high) * LOG2E))
            if HAS_CAP:
                p *= 1.0 - (x / cap) * (x / cap)
            tl.store(out + row * U + column, p.to(out.dtype.element_ty), mask=column < U)


@triton.jit
def differentiate_kernel(
    z, bias, targets, lse, upstream, out, U, cap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``(softmax - onehot) g`` of a row, times the slope of the softcap."""
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    z += row * U
    norm, g, target = tl.load(lse + row), tl.load(upstream + row), tl.load(targets + row)
    for start in range(0, U, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = load_logits(z, bias, column, U, cap, HAS_BIAS, HAS_CAP)
        dz = (tl.exp2((x - norm) * LOG2E) - tl.where(column == target, 1.0, 0.0)) * g
        if HAS_CAP:
            dz *= 1.0 - (x / cap) * (x / cap)
        tl.store(out + row * U + column, dz.to(out.dtype.element_ty), mask=column < U)


def interpreting() -> bool:
    """Say whether the kernels were built for Triton's interpreter."""
    return not isinstance(differentiate_kernel, triton.runtime.JITFunction)


def problem(hidden: Tensor, dtype: torch.dtype) -> str | None:
    """Say why Triton cannot serve ``hidden`` ``[N, M]`` multiplied in a dtype; None if it can."""
    if dtype == torch.float64:
        return "serves 16 and 32 bit floats, got float64"
    if not hidden.is_cuda and not interpreting():
        return f"needs CUDA tensors, got {hidden.device.type}"
    return None


def _launch(kernel: Any, z: Tensor, tile: Tile, tensors: tuple[Tensor, ...], **options: bool) -> None:
    """Launch one program a row."""
    rows, width = z.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    bias, cap = (z if tile.bias is None else tile.bias), (1.0 if tile.softcap is None else tile.softcap)
    with torch.cuda.device_of(z):  # which need not be the current one
        kernel[(rows,)](
            z, bias, tile.targets, *tensors, width, cap,
            HAS_BIAS=tile.bias is not None, HAS_CAP=tile.softcap is not None, BLOCK=block,
            num_warps=8 if block > 1024 else 4, **options,
        )  # fmt: skip


def accumulate(tile: Tile, running: Running, keep: bool) -> Tensor | None:
    """Update the log-sum-exps; with `keep`, return ``exp(z - peak)`` ``[U, S]``, see `tiles.accumulate`."""
    z = product(tile.hidden, tile.entries)
    out = torch.empty_like(z, dtype=tile.hidden.dtype) if keep else z
    _launch(accumulate_kernel, z, tile, (running.peak, running.total, running.chosen, out), KEEP=keep)
    return out.t() if keep else None


def differentiate(tile: Tile, lse: Tensor, upstream: Tensor) -> Tensor:
    """Compute ``dz`` ``[U, S]`` in the dtype of the operands, see `tiles.differentiate`."""
    z = product(tile.hidden, tile.entries)
    out = torch.empty_like(z, dtype=tile.hidden.dtype)
    _launch(differentiate_kernel, z, tile, (lse, upstream, out))
    return out.t()
