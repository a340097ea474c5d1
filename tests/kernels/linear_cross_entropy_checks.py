"""Checks of the Triton tiles of the per-token loss in Triton's interpreter, run as a program.

`TRITON_INTERPRET=1 python tests/kernels/linear_cross_entropy_checks.py NAME`
"""

import sys

import torch

from benchmarks.measure import poisoned
from kernels.linear_cross_entropy import tiles, token_nll, triton
from kernels.linear_cross_entropy.tiles import Running, Tile


def make(dtype, bias, N=19, M=8, V=300):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, M, generator=generator).to(dtype) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[::5], upstream = -100, torch.randn(N, generator=generator)
    upstream[1::5] = 0.0
    return hidden, weight, targets, torch.randn(V, generator=generator).to(dtype) if bias else None, upstream


def run(hidden, weight, targets, bias, upstream, *, frozen, **options):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)[: 1 if frozen else 3] if x is not None]
    head = [weight, bias] if frozen else [leaves[1], leaves[2] if bias is not None else None]
    nll = token_nll(leaves[0], head[0], targets, bias=head[1], **options)
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def numbers():
    """Every option against dense float64; the columns of a row need several blocks."""
    triton.BLOCK = 128
    for dtype, limit in ((torch.float32, 5e-6), (torch.float16, 1e-3), (torch.bfloat16, 3e-3)):
        for bias, softcap, chunk_size, frozen in (
            (False, None, None, False),
            (True, 5.0, None, False),
            (False, 30.0, None, True),
            (True, None, 7, True),
        ):
            tensors = make(dtype, bias)
            exact = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
            with poisoned():
                results = run(*tensors, frozen=frozen, softcap=softcap, chunk_size=chunk_size, implementation="triton")
            expected = run(*exact, frozen=frozen, softcap=softcap, implementation="reference")
            assert ((results[0] - expected[0]).abs() <= 3e-6 * (1 + expected[0].abs())).all()
            for result, reference in zip(results[1:], expected[1:], strict=True):
                error = (result.double() - reference).norm() / reference.norm()
                assert error <= limit, (dtype, bias, softcap, chunk_size, frozen, error)


def operands():
    """The steps write what the plain ones compute, rounded once to the operands' dtype (float16, as on a GPU)."""
    triton.BLOCK = 64
    generator = torch.Generator().manual_seed(0)
    hidden, entries = (torch.randn(n, 8, generator=generator).half() for n in (5, 150))
    lse, upstream = torch.full((5,), 6.0), torch.randn(5, generator=generator)
    for cap in (None, 4.0):
        bias, targets = torch.randn(150, generator=generator), torch.tensor([0, 149, -3, 150, 70])
        half = Tile(hidden, entries, bias, targets, cap)
        full = Tile(hidden.float(), entries.float(), bias, targets, cap)
        triton.product = lambda a, b: a.float() @ b.float().T
        plain = tiles.differentiate(full, lse, upstream), *_accumulate(tiles, full)
        fused = triton.differentiate(half, lse, upstream), *_accumulate(triton, half)
        assert fused[0].dtype == fused[1].dtype == torch.float16
        for result, reference in zip(fused, plain, strict=True):
            torch.testing.assert_close(result.float(), reference, rtol=2e-3, atol=1e-5, equal_nan=True)


def _accumulate(steps, tile):
    running = Running(torch.full((5,), 1.0), torch.full((5,), 2.0), torch.full((5,), torch.nan))
    return steps.accumulate(tile, running, True), running.peak, running.total, running.chosen


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
