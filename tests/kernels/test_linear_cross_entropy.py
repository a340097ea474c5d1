"""token_nll against dense autograd in float64: values and gradients, every option, odd sizes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kernels.linear_cross_entropy import gradients as sums
from kernels.linear_cross_entropy import token_nll
from kernels.linear_cross_entropy.products import multiplies_bfloat16

FIXTURES = Path(__file__).parents[1] / "fixtures" / "token_weighting"
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 1e-3}


def make(N=37, M=16, V=101, *, dtype=torch.float32, bias=False, ignore_index=-100):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(N, M, generator=generator).to(dtype),
        "weight": torch.randn(V, M, generator=generator).to(dtype),
        "targets": torch.randint(V, (N,), generator=generator),
    }
    if bias:
        tensors["bias"] = torch.randn(V, generator=generator).to(dtype)
    tensors["targets"][3::5] = ignore_index
    return tensors, torch.randn(N, generator=generator)


def run(tensors, upstream, *, frozen=(), **options):
    """Losses and the gradients by name."""
    leaves = {k: x.detach().clone() for k, x in tensors.items()}
    wanted = [k for k in leaves if k not in ("targets", *frozen)]
    for k in wanted:
        leaves[k].requires_grad_()
    nll = token_nll(**leaves, **options)
    nll.backward(upstream(nll) if callable(upstream) else upstream.to(nll.dtype))
    return {"nll": nll.detach()} | {k: leaves[k].grad for k in wanted}


def exact(tensors, upstream, **options):
    double = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    return run(double, upstream, implementation="reference", **options)


def compare(results, expected, limit):
    assert results.keys() == expected.keys()
    nll, reference = results["nll"].double(), expected["nll"].double()
    assert ((nll - reference).abs() <= 3e-6 * (1 + reference.abs())).all()
    for name in expected.keys() - {"nll"}:
        error = (results[name].double() - expected[name]).norm() / expected[name].norm()
        assert error <= limit, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", ["plain", "ignore", "bias_softcap", "bf16"])
def test_fixtures(case):
    fixtures, options = (
        load_file(FIXTURES / "token_nll.safetensors"),
        json.loads((FIXTURES / "token_nll.json").read_text()),
    )
    tensors = {k.split(".")[1]: x for k, x in fixtures.items() if k.startswith(f"{case}.")}
    inputs = {k: tensors[k] for k in ("hidden", "weight", "targets", "bias") if k in tensors}
    results = run(inputs, tensors["upstream"], softcap=options[case].get("softcap"))
    expected = {"nll": tensors["nll"]} | {k: tensors[f"grad_{k}"] for k in inputs if k != "targets"}
    compare(results, expected, LIMITS[tensors["hidden"].dtype])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 3.0}])
def test_matches_dense_float64(dtype, options):
    tensors, upstream = make(dtype=dtype, bias=options.get("bias", False))
    softcap = options.get("softcap")
    expected = exact(tensors, upstream, softcap=softcap)
    for chunk_size in (1, 7, 16, 36, 37, 370, None):
        results = run(tensors, upstream, softcap=softcap, chunk_size=chunk_size)
        assert results["nll"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(results[k].dtype == dtype for k in expected if k != "nll")
        compare(results, expected, LIMITS[dtype])


UPSTREAMS = {
    "signed": lambda nll: torch.randn(nll.shape, generator=torch.Generator().manual_seed(1)).to(nll),
    "expanded": lambda nll: nll.new_ones(()).expand(nll.shape),
    "strided": lambda nll: torch.arange(2.0 * len(nll)).to(nll)[::2],
    "self-derived": lambda nll: nll.detach() / nll.detach().sum(),
    "mostly zero": lambda nll: (torch.arange(len(nll)) % 7 == 0).to(nll),
    "huge": lambda nll: torch.full_like(nll, 1e20),
}


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",), ("weight", "hidden"), ("hidden", "bias")])
@pytest.mark.parametrize("name", UPSTREAMS)
def test_any_upstream_and_frozen_inputs(name, frozen):
    tensors, _ = make(bias=True)
    tensors["targets"][tensors["targets"] == -100] = -1
    results = run(tensors, UPSTREAMS[name], frozen=frozen, ignore_index=-1, chunk_size=5)
    compare(results, exact(tensors, UPSTREAMS[name], frozen=frozen, ignore_index=-1), 5e-6)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_frozen_head_in_one_sweep(dtype, softcap):
    """Rows kept by the forward, confident ones included, where softmax minus one cancels."""
    tensors, upstream = make(dtype=dtype)
    tensors["targets"][::2] = (tensors["hidden"].float() @ tensors["weight"].float().T).argmax(1)[::2]
    tensors["hidden"][::4] *= 4
    for chunk_size in (1, 7, None):
        results = run(tensors, upstream, frozen=("weight",), softcap=softcap, chunk_size=chunk_size)
        compare(results, exact(tensors, upstream, frozen=("weight",), softcap=softcap), LIMITS[dtype])


def test_ignore_index_inside_the_vocabulary():
    tensors, upstream = make(ignore_index=0)
    results = run(tensors, upstream, ignore_index=0)
    assert not results["nll"][tensors["targets"] == 0].any() and not results["hidden"][tensors["targets"] == 0].any()
    compare(results, exact(tensors, upstream, ignore_index=0), 5e-6)


def test_tied_embedding():
    generator = torch.Generator().manual_seed(0)
    weight, ids = torch.randn(50, 8, generator=generator), torch.randint(50, (21,), generator=generator)
    grads = []
    for dtype, implementation in ((torch.float32, "auto"), (torch.float64, "reference")):
        table = weight.detach().to(dtype, copy=True).requires_grad_()
        token_nll(table[ids[:-1]].tanh(), table, ids[1:], implementation=implementation).sum().backward()
        grads.append(table.grad)
    assert (grads[0] - grads[1]).norm() <= 5e-6 * grads[1].norm()


def test_large_logits():
    tensors, upstream = make(M=64)
    tensors["hidden"] *= 20
    compare(run(tensors, upstream), exact(tensors, upstream), 5e-6)
    tensors["weight"][0] = tensors["hidden"][
        0
    ]  # a certain prediction: the loss is 0, not a difference of large numbers
    tensors["targets"][0] = 0
    assert run(tensors, upstream)["nll"][0] == 0


def test_strided_inputs():
    tensors, upstream = make(bias=True)
    expected = run(tensors, upstream)
    strided = {k: x.repeat_interleave(2, 0)[::2] if k != "hidden" else x.T.contiguous().T for k, x in tensors.items()}
    nll = token_nll(**strided)
    assert torch.equal(nll, expected["nll"])
    sideways = tensors | {"weight": tensors["weight"].T.contiguous().T}
    compare({"nll": token_nll(**sideways)}, {"nll": expected["nll"]}, 0.0)


def test_gradcheck():
    tensors, _ = make(N=7, M=3, V=11, dtype=torch.float64, bias=True)
    leaves = [tensors[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def losses(hidden, weight, bias):
        return token_nll(hidden, weight, tensors["targets"], bias=bias, softcap=2.0, chunk_size=3)

    assert torch.autograd.gradcheck(losses, leaves)
    (grad,) = torch.autograd.grad(losses(*leaves).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not multiplies_bfloat16(torch.device("cpu")), reason="no bfloat16 products on this processor")
@pytest.mark.parametrize("confident", [False, True])
def test_bfloat16_products_round_once_or_little_more(monkeypatch, confident):
    monkeypatch.setattr(sums, "SMALL", 0)
    tensors, upstream = make(N=300, M=64, V=1000, dtype=torch.bfloat16, bias=True)
    if confident:
        tensors["targets"][::2] = (tensors["hidden"].float() @ tensors["weight"].float().T).argmax(1)[::2]
    expected = exact(tensors, upstream)
    for chunk_size in (1, 16, None):
        compare(run(tensors, upstream, chunk_size=chunk_size), expected, 2.5e-3)


def test_two_runs_give_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        tensors, upstream = make(N=300, V=5000, dtype=dtype, bias=True)
        first, second = (run(tensors, upstream, chunk_size=50) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)
