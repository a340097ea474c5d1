"""Launching the Triton kernels of grouped cross attention, as one operator with its own backward.

Runs on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before the first import).

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, E stored chunks,
C keys of a chunk, K retrieved chunks.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from kernels.gca.reverse_map import reverse_map
from kernels.gca.triton_backward import key_kernel, query_kernel, reduce_kernel
from kernels.gca.triton_forward import forward_kernel

LOG2E = math.log2(math.e)
STAGES = 2
Kind = Literal["forward", "query", "key"]


@dataclass(frozen=True)
class Launch:
    """Tile sizes and resources of one kernel; the tables are kept free of spills by the offline compile test."""

    block_m: int
    block_c: int
    block_d: int
    num_warps: int


def launch(kind: Kind, rows: int, chunk_size: int, head_dim: int, dtype: torch.dtype) -> Launch:
    """Choose the tiles of a kernel for G S rows, C keys and D channels."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    column = 0 if block_d <= 64 else 1 if block_d == 128 else 2
    limit_m, limit_c, num_warps = (LIMITS[kind] if dtype.itemsize == 2 else FLOAT32_LIMITS)[column]
    block_m = min(limit_m, max(16, triton.next_power_of_2(rows)))
    block_c = max(16, triton.next_power_of_2(chunk_size))
    if block_c > limit_c:  # several tiles a chunk
        block_c = min(limit_c, 32 if kind == "query" or block_m == 16 else 64)
    few = 2048 if kind == "key" else 4096  # the key kernel holds two sums
    if dtype.itemsize == 2 and max(block_m, block_c) * block_d <= few:
        num_warps = 4
    return Launch(block_m, block_c, block_d, num_warps)


# The most rows and keys of a tile, and its warps, for D <= 64, 128, 256. Float32 products (no tensor cores) need many
# registers. Chosen so that the compiler spills nothing.
LIMITS: dict[Kind, list[tuple[int, int, int]]] = {
    "forward": [(128, 128, 8), (64, 128, 8), (32, 64, 8)],
    "query": [(64, 128, 8), (32, 64, 8), (16, 32, 8)],
    "key": [(64, 64, 8), (64, 64, 8), (32, 32, 8)],
}
FLOAT32_LIMITS = [(32, 32, 8), (16, 16, 4), (16, 32, 8)]


def interpreting() -> bool:
    """Say whether the kernels were built for Triton's interpreter."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def check_device(q: Tensor) -> None:
    """Refuse what Triton cannot run here.

    Raises:
        ValueError: on float64, CPU tensors without the interpreter, bfloat16 in the interpreter, or D > 256.
    """
    if q.dtype == torch.float64 or q.shape[-1] > 256:
        raise ValueError(
            f"the triton implementation serves 16 and 32 bit floats and head sizes up to 256, got {q.dtype} and "
            f"{q.shape[-1]}; use implementation='cpu'"
        )
    if q.is_cuda:
        return
    if not interpreting():
        raise ValueError(f"the triton implementation needs CUDA tensors, got {q.device.type}; use implementation='cpu'")
    if q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 there")


def _aligned(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _precision(q: Tensor) -> str:
    # TF32 would break the promise of float32 products; 16-bit inputs ignore the setting.
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _sizes(q: Tensor, k: Tensor, indices: Tensor) -> tuple[int, ...]:
    """Return N, E, K, S, C, Hk, D."""
    return q.shape[1], k.shape[1], indices.shape[2], q.shape[2], k.shape[2], k.shape[3], q.shape[4]


def _run(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the first tensor, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


@torch.library.custom_op("longhaul::gca_triton", mutates_args=())
def gca_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
) -> tuple[Tensor, Tensor]:
    """Return the output and the base 2 log-sum-exp ``[B, N, K, H, S]`` (0 at empty slots)."""
    q, k, v, indices, weights = q.contiguous(), _aligned(k), _aligned(v), indices.contiguous(), weights.contiguous()
    lengths = indices if kv_lengths is None else kv_lengths.contiguous()
    batch, num_groups, rows, num_heads, head_dim = q.shape
    num_kv_heads, group = k.shape[3], num_heads // k.shape[3]
    out = torch.empty_like(q)
    lse = torch.empty(batch, num_groups, indices.shape[2], num_heads, rows, dtype=torch.float32, device=q.device)
    tiles = launch("forward", rows * group, k.shape[2], head_dim, q.dtype)
    grid = (triton.cdiv(rows * group, tiles.block_m) * num_groups * num_kv_heads * batch,)
    _run(
        forward_kernel, grid,
        q, k, v, indices, weights, lengths, out, lse, scale * LOG2E, *_sizes(q, k, indices),
        *k.stride()[:4], *v.stride()[:4],
        G=group, HAS_LENGTHS=kv_lengths is not None, OFF_BY_ONE=softmax_off_by_one,
        SINGLE=k.shape[2] <= tiles.block_c, BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c, BLOCK_D=tiles.block_d,
        PRECISION=_precision(q), num_warps=tiles.num_warps, num_stages=STAGES,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("longhaul::gca_triton_backward", mutates_args=())
def gca_triton_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and weights."""
    grad_out, q, k, v = grad_out.contiguous(), q.contiguous(), _aligned(k), _aligned(v)
    indices, weights = indices.contiguous(), weights.contiguous()
    lengths = indices if kv_lengths is None else kv_lengths.contiguous()
    batch, num_groups, rows, num_heads, head_dim = q.shape
    num_kv_heads, group = k.shape[3], num_heads // k.shape[3]
    tiles = launch("query", rows * group, k.shape[2], head_dim, q.dtype)
    blocks = triton.cdiv(rows * group, tiles.block_m)
    grad_q, delta = torch.empty_like(q), torch.empty_like(lse)
    grad_w = torch.empty(*indices.shape, num_kv_heads * blocks, dtype=torch.float32, device=q.device)
    _run(
        query_kernel, (blocks * num_groups * num_kv_heads * batch,),
        q, k, v, indices, weights, lengths, grad_out, lse, delta, grad_q, grad_w,
        scale, scale * LOG2E, *_sizes(q, k, indices), *k.stride()[:4], *v.stride()[:4],
        G=group, HAS_LENGTHS=kv_lengths is not None, SINGLE=k.shape[2] <= tiles.block_c,
        BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c, BLOCK_D=tiles.block_d, PRECISION=_precision(q),
        num_warps=tiles.num_warps, num_stages=STAGES,
    )  # fmt: skip
    grad_k, grad_v = _key_gradients(
        grad_out, (q, k, v), (indices, weights, lengths), (lse, delta), scale, lengths is not indices
    )
    return grad_q, grad_k, grad_v, grad_w.sum(-1)


def _key_gradients(
    grad_out: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    choice: tuple[Tensor, Tensor, Tensor],
    statistics: tuple[Tensor, Tensor],
    scale: float,
    has_lengths: bool,
) -> tuple[Tensor, Tensor]:
    """Run the key kernel over the reverse map, a few heads at a time so that split lists need little memory."""
    (q, k, v), (indices, weights, lengths) = inputs, choice
    batch, num_chunks, chunk_size, num_kv_heads, head_dim = k.shape
    group = q.shape[3] // num_kv_heads
    tiles = launch("key", q.shape[2] * group, chunk_size, head_dim, q.dtype)
    key_tiles, table = triton.cdiv(chunk_size, tiles.block_c), reverse_map(indices, num_chunks)
    grad_k, grad_v = (torch.empty(k.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    per_head = max(1, table.max_parts) * chunk_size * head_dim
    step = max(1, min(num_kv_heads, q.numel() * q.element_size() // (2 * 4 * per_head)))
    parts = torch.empty(2, step * per_head, dtype=torch.float32, device=q.device)
    for first in range(0, num_kv_heads, step):
        heads = min(step, num_kv_heads - first)
        _run(
            key_kernel, (table.piece_chunk.numel() * heads * key_tiles,),
            q, k, v, weights, lengths, grad_out, *statistics,
            table.order, table.piece_chunk, table.piece_start, table.piece_stop, table.piece_part,
            grad_k, grad_v, parts[0], parts[1], scale, scale * LOG2E, first, heads, *_sizes(q, k, indices)[1:],
            *k.stride()[:4], *v.stride()[:4],
            G=group, HAS_LENGTHS=has_lengths, BLOCK_M=tiles.block_m, BLOCK_C=tiles.block_c, BLOCK_D=tiles.block_d,
            PRECISION=_precision(q), num_warps=tiles.num_warps, num_stages=STAGES,
        )  # fmt: skip
        _run(
            reduce_kernel, (batch * num_chunks * heads * triton.cdiv(chunk_size, 16),),
            table.chunk_part, table.chunk_pieces, grad_k, grad_v, parts[0], parts[1], first, heads,
            chunk_size, num_kv_heads, head_dim, BLOCK_C=16, BLOCK_D=tiles.block_d, num_warps=4,
        )  # fmt: skip
    return grad_k, grad_v


@gca_triton.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    scale: float,
    softmax_off_by_one: bool,
) -> tuple[Tensor, Tensor]:
    batch, num_groups, rows, num_heads, _ = q.shape
    lse = q.new_empty((batch, num_groups, indices.shape[2], num_heads, rows), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@gca_triton_backward.register_fake
def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    weights: Tensor,
    kv_lengths: Tensor | None,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, weights))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_q, grad_k, grad_v, grad_weights = gca_triton_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return grad_q, grad_k, grad_v, None, grad_weights, None, None, None


gca_triton.register_autograd(_differentiate, setup_context=_save)
