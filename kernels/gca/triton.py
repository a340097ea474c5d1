"""Grouped cross attention by the Triton kernels.

Runs on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before the first import).

Legend: B batch, N query groups, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size, E stored chunks,
C keys of a chunk, K retrieved chunks.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gca.arguments import Arguments
from kernels.gca.autotune import choose
from kernels.gca.launch import Launch, Shape
from kernels.gca.reverse_map import ReverseMap
from kernels.gca.triton_backward import key_kernel, query_kernel, reduce_kernel
from kernels.gca.triton_forward import forward_kernel

LOG2E = math.log2(math.e)


def interpreting() -> bool:
    """Say whether the kernels were built for Triton's interpreter."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def check_device(q: Tensor) -> None:
    """Refuse queries ``[B, N, S, H, D]`` that Triton cannot run here.

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


@dataclass(frozen=True)
class _Inputs(Arguments):
    """The arguments, laid out as the kernels want them, and the factor of the scores."""

    scale: float

    @classmethod
    def lay_out(cls, arguments: Arguments, scale: float) -> "_Inputs":
        """Copy what is not contiguous; keys and values only where their channels are apart."""
        q, k, v, indices, weights, kv_lengths = arguments.tensors()
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        lengths = None if kv_lengths is None else kv_lengths.contiguous()
        return cls(q.contiguous(), k, v, indices.contiguous(), weights.contiguous(), lengths, scale)

    @property
    def lengths(self) -> Tensor:
        """What stands for the lengths: any integers if there are none."""
        return self.indices if self.kv_lengths is None else self.kv_lengths

    @property
    def sizes(self) -> tuple[int, ...]:
        """N, E, K, S, C, Hk, D."""
        q, k = self.q.shape, self.k.shape
        return q[1], k[1], self.indices.shape[2], q[2], k[2], k[3], q[4]

    @property
    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Strides of the first four dimensions of keys and of values."""
        return self.k.stride()[:4], self.v.stride()[:4]

    def shape(self, kind: Any) -> Shape:
        """Return what decides how a kernel is launched."""
        rows = self.q.shape[2] * self.group
        described = kind != "key" and all(_describable(x) for x in (self.k, self.v))
        return Shape(kind, rows, self.k.shape[2], self.q.shape[4], self.q.dtype, described)

    def blocks(self, tiles: Launch) -> int:
        """Count the blocks of rows of a query group."""
        return triton.cdiv(self.q.shape[2] * self.group, tiles.block_m)

    def programs(self, tiles: Launch) -> tuple[int]:
        """Count the programs that walk query groups."""
        return (self.blocks(tiles) * self.q.shape[0] * self.q.shape[1] * self.k.shape[3],)

    def options(self, tiles: Launch) -> dict[str, Any]:
        """Return the constants that the three large kernels share."""
        # TF32 would break the promise of float32 products; 16-bit inputs ignore the setting.
        precision = "ieee" if self.q.dtype == torch.float32 else "tf32"
        return {
            "G": self.group,
            "HAS_LENGTHS": self.kv_lengths is not None,
            "BLOCK_M": tiles.block_m,
            "BLOCK_C": tiles.block_c,
            "BLOCK_D": tiles.block_d,
            "PRECISION": precision,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    def stores(self, tiles: Launch) -> tuple[Any, Any]:
        """Return keys and values as the kernel reads them: the tensors, or descriptors of their tiles."""
        if not tiles.descriptors:
            return self.k, self.v
        block = [1, 1, tiles.block_c, 1, tiles.block_d]
        key, value = (TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in (self.k, self.v))
        return key, value


def _describable(x: Tensor) -> bool:
    """Say whether the hardware can copy tiles of a tensor: 16 bit, and everything aligned to 16 bytes."""
    aligned = all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:4]) and x.data_ptr() % 16 == 0
    return x.itemsize == 2 and aligned


def _run(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
    """Launch on the device of the first tensor, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)


def _forward(inputs: _Inputs, off_by_one: bool, results: tuple[Tensor, Tensor], tiles: Launch) -> None:
    key, value = inputs.stores(tiles)
    _run(
        forward_kernel, inputs.programs(tiles),
        inputs.q, key, value, inputs.indices, inputs.weights, inputs.lengths, *results,
        inputs.scale * LOG2E, inputs.sizes, *inputs.strides,
        OFF_BY_ONE=off_by_one, SINGLE=inputs.k.shape[2] <= tiles.block_c, DESCRIPTORS=tiles.descriptors,
        **inputs.options(tiles),
    )  # fmt: skip


def _query_gradient(
    inputs: _Inputs, grad_out: Tensor, lse: Tensor, results: tuple[Tensor, Tensor, Tensor], tiles: Launch
) -> None:
    """Write delta, dq and the parts of dw ``[B N K, parts]``."""
    key, value = inputs.stores(tiles)
    delta, grad_q, grad_w = results
    _run(
        query_kernel, inputs.programs(tiles),
        inputs.q, key, value, inputs.indices, inputs.weights, inputs.lengths, grad_out, lse, delta, grad_q, grad_w,
        inputs.scale, inputs.scale * LOG2E, inputs.sizes, *inputs.strides,
        SINGLE=inputs.k.shape[2] <= tiles.block_c, DESCRIPTORS=tiles.descriptors, **inputs.options(tiles),
    )  # fmt: skip


def _key_gradients(
    inputs: _Inputs,
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor],
    table: ReverseMap,
    results: tuple[Tensor, Tensor],
    tiles: Launch,
) -> None:
    """Write dk and dv, a few heads at a time so that the parts of split lists need little memory."""
    batch, num_chunks, chunk_size, num_kv_heads, head_dim = inputs.k.shape
    per_head = max(1, table.max_parts) * chunk_size * head_dim
    step = max(1, min(num_kv_heads, inputs.q.nbytes // (2 * 4 * per_head)))
    parts = torch.empty(2, step * per_head, dtype=torch.float32, device=grad_out.device)
    for first in range(0, num_kv_heads, step):
        heads = min(step, num_kv_heads - first)
        _run(
            key_kernel, (table.piece_chunk.numel() * heads * triton.cdiv(chunk_size, tiles.block_c),),
            inputs.q, inputs.k, inputs.v, inputs.weights, inputs.lengths, grad_out, *statistics,
            table.order, table.piece_chunk, table.piece_start, table.piece_stop, table.piece_part,
            *results, *parts, inputs.scale, inputs.scale * LOG2E, first, heads, inputs.sizes, *inputs.strides,
            **inputs.options(tiles),
        )  # fmt: skip
        _run(
            reduce_kernel, (batch * num_chunks * heads * triton.cdiv(chunk_size, 16),),
            table.chunk_part, table.chunk_pieces, *results, *parts, first, heads,
            chunk_size, num_kv_heads, head_dim, BLOCK_C=16, BLOCK_D=tiles.block_d, num_warps=4,
        )  # fmt: skip


class TritonEngine:
    """The kernels in their order."""

    def statistics_shape(self, arguments: Arguments) -> tuple[int, ...]:
        """Return ``[B, N, K, H, S]``."""
        return (*arguments.indices.shape, arguments.q.shape[3], arguments.q.shape[2])

    def forward(self, arguments: Arguments, scale: float, *, softmax_off_by_one: bool) -> tuple[Tensor, Tensor]:
        """Compute the output ``[B, N, S, H, D]`` in the dtype of q and the float32 log-sum-exps ``[B, N, K, H, S]``.

        They are 0 at empty slots.
        """
        inputs = _Inputs.lay_out(arguments, scale)
        device, out = inputs.q.device, torch.empty_like(inputs.q)
        lse = torch.empty(self.statistics_shape(arguments), dtype=torch.float32, device=device)
        run = functools.partial(_forward, inputs, softmax_off_by_one, (out, lse))
        run(choose(inputs.shape("forward"), device, run))
        return out, lse

    def backward(
        self, arguments: Arguments, reverse: Tensor | None, grad_out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the gradients of q, k, v and weights from ``grad_out`` ``[B, N, S, H, D]``, in their dtypes."""
        inputs, grad_out = _Inputs.lay_out(arguments, scale), grad_out.contiguous()
        indices, device, num_chunks = inputs.indices, inputs.q.device, inputs.k.shape[1]
        grad_q, delta = torch.empty_like(inputs.q), torch.empty_like(lse)
        grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (inputs.k, inputs.v))

        def run_query(tiles: Launch) -> Tensor:
            shape = (*indices.shape, inputs.k.shape[3] * inputs.blocks(tiles))
            parts_of_grad_w = torch.empty(shape, dtype=torch.float32, device=device)
            _query_gradient(inputs, grad_out, lse, (delta, grad_q, parts_of_grad_w), tiles)
            return parts_of_grad_w.sum(-1)

        grad_w = run_query(choose(inputs.shape("query"), device, run_query))
        table = ReverseMap.of(indices, num_chunks, reverse)
        run_key = functools.partial(_key_gradients, inputs, grad_out, (lse, delta), table, (grad_k, grad_v))
        run_key(choose(inputs.shape("key"), device, run_key))
        return grad_q, grad_k, grad_v, grad_w
