"""The per-token loss beyond plain PyTorch on a CPU: Triton's interpreter, compiled kernels without a device, CUDA."""

from pathlib import Path

import pytest
import torch

from kernels.linear_cross_entropy import token_nll

pytest.importorskip("triton")
CHECKS = Path(__file__).parent / "linear_cross_entropy_checks.py"


@pytest.mark.parametrize("check", ["numbers", "operands"])
def test_in_the_interpreter(run_program, check):
    """The interpreter must be chosen before Triton is imported: each check is a process."""
    run_program(CHECKS, check, interpret=True)


def compile_code(selection):
    return (
        "from benchmarks.linear_cross_entropy_compile import compile_kernels, problem\n"
        f"rows = list(compile_kernels({selection}))\n"
        "assert len(rows) >= 6 and not any(problem(row) for row in rows), rows"
    )


def test_compiles_without_spills(run_program):
    run_program("-c", compile_code("[4095], every_option=False"), interpret=False)


@pytest.mark.slow
def test_every_variant_compiles_without_spills(run_program):
    run_program("-c", compile_code(""), interpret=False)


def inputs(N, M, V, dtype, bias=False):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(N, M, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, M, device="cuda", generator=generator) * 2 * M**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device="cuda", generator=generator)
    b = torch.randn(V, device="cuda", generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, targets, b, torch.randn(N, device="cuda", generator=generator)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 5.0)])
def test_on_a_gpu(dtype, implementation, bias, softcap):
    hidden, weight, targets, b, upstream = inputs(1001, 96, 5003, dtype, bias)
    targets[::7], upstream[1::7] = -100, 0.0
    leaves = [x for x in (hidden, weight, b) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = token_nll(
        *exact[:2], targets, bias=exact[2] if bias else None, softcap=softcap, implementation="reference"
    )
    limit = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}[dtype]
    for frozen, chunk_size in ((False, None), (False, 50), (True, None)):
        wanted, reference = (leaves[:1], exact[:1]) if frozen else (leaves, exact)
        head = [x.detach() if frozen and x is not None else x for x in (weight, b)]
        options = {"softcap": softcap, "chunk_size": chunk_size, "implementation": implementation}
        results = []
        for _ in range(2):
            nll = token_nll(hidden, head[0], targets, bias=head[1], **options)
            results.append([nll, *torch.autograd.grad(nll, wanted, upstream)])
        assert all(torch.equal(a, c) for a, c in zip(*results, strict=True))
        assert ((nll - expected).abs() <= 3e-6 * (1 + expected.abs())).all()
        grads = torch.autograd.grad(expected, reference, upstream.double(), retain_graph=True)
        for result, grad in zip(results[0][1:], grads, strict=True):
            assert (result.double() - grad).norm() <= limit * grad.norm()


@pytest.mark.gpu
def test_llama_size_on_a_gpu():
    """bfloat16 losses of 32K targets are those of float64, in 1 GiB beyond the inputs and the weight's gradient."""
    hidden, weight, targets, _, upstream = inputs(32767, 4096, 128_256, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nll = token_nll(hidden, weight, targets)
    nll.backward(upstream)
    assert torch.cuda.max_memory_allocated() - before <= weight.nbytes + 2**30
    rows = torch.arange(0, 32767, 997, device="cuda")
    with torch.no_grad():
        logits = torch.cat([hidden[rows].double() @ part.double().T for part in weight.split(8192)], 1)
        exact = logits.logsumexp(1) - logits.gather(1, targets[rows, None])[:, 0]
    assert (nll[rows] - exact).abs().max() <= 1e-5
