"""Grouped cross attention by the compiled `native.c`: the layout around it, one kv head a thread.

Notable: PyTorch copies a few heads at a time into plain float32 buffers (which upcasts low precision), so the C code
knows one layout and one type. It is used only after it has reproduced `tiles.py` on a small problem in this process.

Legend: B batch, N query groups, R = B N, S rows of a group, H heads, Hk kv heads, G = H / Hk, D head size (W: rounded
up to whole vectors), C keys of a chunk, K retrieved chunks, U chunks in use, h heads of a block.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.gca import tiles
from kernels.gca.arguments import Arguments
from kernels.gca.build import Problem, library
from kernels.gca.layout import Plan, copy_chunks, make_plan, view_rows, write_chunks

VECTOR = 16


def serves(q: Tensor, k: Tensor) -> bool:
    """Say whether the compiled code works and pays: not where more than half of the threads would have no head.

    Args:
        q: ``[B, N, S, H, D]``; not float64, which the code does not know.
        k: ``[B, E, C, Hk, D]``.
    """
    if q.device.type != "cpu" or q.dtype == torch.float64 or 0 in q.shape or 0 in k.shape:
        return False
    return torch.get_num_threads() <= 2 * _num_heads_at_once(q, k) and _works()


@functools.cache
def _works() -> bool:
    """Compare with `tiles.py` once, at odd sizes; False also where there is no compiler."""
    if library() is None:
        return False
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, grad_out = normal(1, 4, 35, 4, 24), normal(1, 4, 35, 4, 24)
    k, v, weights = normal(1, 5, 19, 2, 24), normal(1, 5, 19, 2, 24), normal(1, 4, 3)
    indices = torch.randint(-1, 5, (1, 4, 3), generator=generator)
    plan = make_plan(Arguments(q, k, v, indices, weights, torch.tensor([[19, 7, 0, 16, 19]])))
    results = []
    for engine in (forward, tiles.forward):
        out, lse = engine(plan, q, k, v, 0.3, softmax_off_by_one=True)
        gradients = backward if engine is forward else tiles.backward
        results.append((out, *gradients(plan, grad_out, q, k, v, lse, 0.3)))
    return all(torch.allclose(ours, wanted, atol=1e-4, rtol=1e-4) for ours, wanted in zip(*results, strict=True))


def forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float, *, softmax_off_by_one: bool
) -> tuple[Tensor, Tensor]:
    """Compute as `tiles.forward` ``[B, N, S, H, D]`` in the dtype of q, and the log-sum-exps ``[Hk, R, K, S G]``.

    q, k and v are float32 or 16 bit, the log-sum-exps float32, 0 at empty slots.
    """
    work = _Work(plan, q, k, scale, softmax_off_by_one)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.zeros(k.shape[3], *plan.slots.shape, q.shape[2] * q.shape[3] // k.shape[3])
    query, result, keys, values = work.row_buffer(), work.row_buffer(), work.chunk_buffer(), work.chunk_buffer()
    total = torch.ones(work.heads_at_once, *lse.shape[1:])
    for heads in work.head_blocks():
        work.read_rows(query, q, heads)
        work.read_chunks(keys, k, heads)
        work.read_chunks(values, v, heads)
        result.zero_()
        work.run("gca_forward", heads, query, keys, values, result, lse[heads], total)
        lse[heads] += total[: heads.stop - heads.start].log2()
        work.write_rows(out, result, heads)
    return out, lse


def backward(
    plan: Plan, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute as `tiles.backward`, from ``grad_out`` ``[B, N, S, H, D]`` and float32 ``lse`` ``[Hk, R, K, S G]``."""
    work = _Work(plan, q, k, scale, False)
    grad_q = torch.empty(q.shape, dtype=q.dtype)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype) for x in (k, v))
    grad_weights = torch.zeros(k.shape[3], *plan.slots.shape)
    upstream, query, result = (work.row_buffer() for _ in range(3))
    keys, values = work.chunk_buffer(), work.chunk_buffer()
    for heads in work.head_blocks():
        work.read_rows(upstream, grad_out, heads)
        work.read_rows(query, q, heads)
        work.read_chunks(keys, k, heads)
        work.read_chunks(values, v, heads)
        result.zero_()
        work.run("gca_backward", heads, upstream, query, lse[heads], keys, values, result, grad_weights[heads])
        work.write_rows(grad_q, result, heads)
        work.write_chunks(grad_k, keys, heads)  # the keys have become their gradients
        work.write_chunks(grad_v, values, heads)
    return grad_q, grad_k, grad_v, grad_weights.sum(0)


def _num_heads_at_once(q: Tensor, k: Tensor) -> int:
    """A head a thread, and a few for wide copies, while the copies of five tensors stay well below the results."""
    return max(1, min(max(torch.get_num_threads(), 4), k.shape[3] * q.dtype.itemsize // 8))


class _Work:
    """The slots in the order of their chunks, buffers and calls: what forward and backward share."""

    def __init__(self, plan: Plan, q: Tensor, k: Tensor, scale: float, softmax_off_by_one: bool) -> None:
        self.plan, self.num_kv_heads, self.head_dim = plan, k.shape[3], q.shape[4]
        self.heads_at_once = _num_heads_at_once(q, k)
        self.group = q.shape[3] // k.shape[3]
        self.rows, self.keys = q.shape[2], k.shape[2]
        self.width = q.shape[4] + -q.shape[4] % VECTOR
        chunks, slots = plan.slots.flatten().sort(stable=True)
        lengths = torch.full((plan.num_used + 1,), self.keys) if plan.lengths is None else plan.lengths
        self.unchosen = torch.bincount(chunks, minlength=plan.num_used + 1) == 0
        self.tensors = chunks, slots, lengths, plan.weights.contiguous()  # the problem points into them
        entries = int(torch.searchsorted(chunks, plan.num_used))
        self.sizes = entries, plan.slots.shape[1], self.rows * self.group, self.keys, self.width
        self.options = scale, softmax_off_by_one

    def head_blocks(self) -> Iterator[slice]:
        """Yield the kv heads, some at a time."""
        for start in range(0, self.num_kv_heads, self.heads_at_once):
            yield slice(start, min(start + self.heads_at_once, self.num_kv_heads))

    def row_buffer(self) -> Tensor:
        """Make room for the rows of some heads, ``[h, R, S, G, W]``; channels beyond D are 0."""
        return self._buffer(self.plan.slots.shape[0], self.rows, self.group)

    def chunk_buffer(self) -> Tensor:
        """Make room for the chunks of some heads, ``[h, U + 1, C, W]``; channels beyond D are 0."""
        return self._buffer(self.plan.num_used + 1, self.keys)

    def _buffer(self, *shape: int) -> Tensor:
        buffer = torch.empty(self.heads_at_once, *shape, self.width)
        buffer[..., self.head_dim :] = 0.0
        return buffer

    def read_rows(self, buffer: Tensor, x: Tensor, heads: slice) -> None:
        """Copy the rows of some heads, ``[B, N, S, H, D]`` of any dtype to float32 ``[h, R, S, G, W]``."""
        rows = view_rows(x, slice(None), heads, self.num_kv_heads)
        buffer[: rows.shape[0], ..., : self.head_dim].copy_(rows)

    def write_rows(self, x: Tensor, buffer: Tensor, heads: slice) -> None:
        """Undo `read_rows`: ``[h, R, S, G, W]`` to ``[B, N, S, H, D]``."""
        rows = view_rows(x, slice(None), heads, self.num_kv_heads)
        rows.copy_(buffer[: rows.shape[0], ..., : self.head_dim])

    def read_chunks(self, buffer: Tensor, x: Tensor, heads: slice) -> None:
        """Copy the chunks of some heads, ``[B, E, C, Hk, D]`` of any dtype to float32 ``[h, U + 1, C, W]``."""
        copy_chunks(x, self.plan, heads, buffer[: heads.stop - heads.start])

    def write_chunks(self, x: Tensor, buffer: Tensor, heads: slice) -> None:
        """Undo `read_chunks`, ``[h, U + 1, C, W]`` to ``[B, E, C, Hk, D]``; what no slot chose is 0."""
        buffer[:, self.unchosen] = 0.0
        write_chunks(x, buffer[: heads.stop - heads.start], self.plan, heads)

    def run(self, name: str, heads: slice, *tensors: Tensor) -> None:
        """Call a compiled function for each head of a block, the first dimension of the tensors."""
        functions = library()
        assert functions is not None  # `serves` was asked first
        function = getattr(functions, name)

        def call(head: int) -> None:
            problem = Problem(*self.sizes, *self.options, *(x.data_ptr() for x in self.tensors))
            scratch = torch.empty(functions.gca_scratch(problem))
            problem.scratch = scratch.data_ptr()
            function(problem, *(x[head].data_ptr() for x in tensors))

        if torch.get_num_threads() == 1:
            for head in range(heads.stop - heads.start):
                call(head)
            return
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(call, range(heads.stop - heads.start)))  # waits, and raises what a call raised
