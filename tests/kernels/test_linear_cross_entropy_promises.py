"""What token_nll promises besides its numbers: cost, memory, autocast, errors, compilers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels.linear_cross_entropy as room
from kernels.linear_cross_entropy import gradients, products, tiles, token_nll
from kernels.linear_cross_entropy.chunked import Options, backward, forward
from kernels.linear_cross_entropy.operator import token_nll_backward_operator, token_nll_operator


def make(N=300, M=16, V=500, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, M, generator=generator).to(dtype) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.randn(N, generator=generator)


def count_flops(targets, upstream, **options):
    hidden, weight, *_ = make()
    weight.requires_grad_(options.pop("train_head", True))
    with FlopCounterMode(display=False) as counter:
        nll = token_nll(hidden, weight, targets, **options)
        first = counter.get_total_flops()
        nll.backward(upstream)
    return first, counter.get_total_flops() - first


def test_cost_follows_the_active_rows():
    *_, targets, upstream = make()
    product = 2 * 300 * 500 * 16
    count_flops(targets, upstream)  # the first call tries the product once
    assert count_flops(targets, upstream) == (product, 3 * product)
    assert count_flops(targets, upstream, train_head=False) == (2 * product, 0)
    few = torch.where(torch.arange(300) % 4 == 0, targets, -100)
    assert count_flops(few, upstream) == (product / 4, 3 * product / 4)
    sparse = torch.where(torch.arange(300) % 5 == 0, upstream, 0.0)
    assert count_flops(targets, sparse) == (product, 3 * product / 5)
    assert count_flops(torch.full_like(targets, -100), upstream) == (0, 0)
    assert count_flops(targets, torch.zeros_like(upstream)) == (product, 0)


@pytest.mark.parametrize("train_head", [True, False])
def test_nan_in_rows_without_part_does_not_spread(train_head):
    hidden, weight, targets, upstream = make()
    weight.requires_grad_(train_head)
    leaves = [hidden, weight] if train_head else [hidden]
    targets[::3] = -100
    upstream[1::3] = 0.0
    expected = torch.autograd.grad(token_nll(hidden, weight, targets), leaves, upstream)
    with torch.no_grad():
        hidden[::3] = torch.nan
        hidden[1::3] = torch.nan
    nll = token_nll(hidden, weight, targets)
    assert not nll[::3].any() and nll[1::3].isnan().all() and nll[2::3].isfinite().all()
    upstream[::3] = torch.nan
    for grad, reference in zip(torch.autograd.grad(nll, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5)


def test_nothing_active():
    hidden, weight, targets, upstream = make()
    bias = torch.zeros(500, requires_grad=True)
    for ids, g in ((torch.full_like(targets, -100), upstream), (targets, torch.zeros_like(upstream))):
        grads = torch.autograd.grad(token_nll(hidden, weight, ids, bias=bias), (hidden, weight, bias), g)
        assert not any(grad.any() for grad in grads)
    none = token_nll(hidden[:0], weight, targets[:0])
    assert none.shape == (0,) and not torch.autograd.grad(none.sum(), weight)[0].any()


class Largest(TorchDispatchMode):
    """The most bytes of any tensor an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "frozen head", "no_grad"])
def test_largest_tensor(monkeypatch, dtype, mode):
    monkeypatch.setattr(gradients, "SMALL", 0)
    for N, M, V, chunk_size in ((200, 16, 900, 16), (64, 4, 900, 1), (64, 48, 2000, 8), (600, 8, 40, None)):
        hidden, weight, targets, upstream = make(N, M, V, dtype)
        weight.requires_grad_(mode == "train")
        rows = chunk_size or room.default_chunk_size(V, hidden.device)
        with Largest() as largest, torch.set_grad_enabled(mode != "no_grad"):
            nll = token_nll(hidden, weight, targets, chunk_size=chunk_size, softcap=9.0)
            if mode != "no_grad":
                nll.backward(upstream)
        assert largest.bytes <= 1.05 * 4 * max(min(rows, N) * V, V * M, N * M)


def test_saves_its_inputs_and_one_number_a_row():
    hidden, weight, targets, _ = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_nll(hidden, weight, targets)
    extra = [x for x in saved if x.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert [(x.dtype, x.shape) for x in extra] == [(torch.int64, (300,)), (torch.float32, (300,))]


def test_default_chunk_size():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [room.default_chunk_size(v, cuda) for v in (128_256, 50_257, 10**8)] == [512, 1024, 16]
    assert [room.default_chunk_size(v, cpu) for v in (128_256, 32_000, 10**6)] == [32, 128, 16]


@pytest.mark.parametrize("bias", [False, True])
def test_autocast(bias):
    hidden, weight, targets, upstream = make(M=64)
    b = torch.randn(500, requires_grad=True) if bias else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = token_nll(hidden, weight, targets, bias=b)
        mixed = token_nll(hidden.bfloat16(), weight, targets, bias=b)
    assert nll.dtype == torch.float32 and torch.equal(nll, mixed)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    exact = token_nll(*rounded, targets, bias=None if b is None else b.double(), implementation="reference")
    assert (nll - exact).abs().max() <= 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward too may run under autocast
        grads = torch.autograd.grad(nll, (hidden, weight), upstream)
    for grad, reference in zip(grads, torch.autograd.grad(exact, rounded, upstream.double()), strict=True):
        assert grad.dtype == torch.float32 and (grad - reference).norm() <= 5e-6 * reference.norm()


def test_errors():
    hidden, weight, targets, _ = make()
    for message, change in {
        "unknown implementation 'fast', use one of auto, triton, reference, chunked": {"implementation": "fast"},
        "torch.bfloat16 and torch.float32": {"hidden": hidden.bfloat16()},
        "chunk_size must be at least 1, got 0": {"chunk_size": 0},
        "softcap must be a positive number or None, got 0.0": {"softcap": 0.0},
        r"expected hidden \[N, M\] and weight \[V, M\]": {"weight": weight.T},
        r"targets must be \[N\] = \[300\]": {"targets": targets[None]},
        "targets must be int64": {"targets": targets.int()},
        r"bias must be \[V\] = \[500\]": {"bias": torch.zeros(300)},
        "must be floats": {"hidden": hidden.long(), "weight": weight.long()},
        r"lie in \[0, 500\) or be ignore_index -1, got -100": {"targets": targets - targets - 100, "ignore_index": -1},
        "got 500": {"targets": torch.full_like(targets, 500)},
        "use implementation='chunked'": {"implementation": "triton"},
    }.items():
        with pytest.raises(ValueError, match=message):
            token_nll(**({"hidden": hidden, "weight": weight, "targets": targets} | change))


def test_float16_operands_survive_small_upstream_gradients(monkeypatch):
    """As on a GPU, where dz is rounded to float16: 1e-7 g of a probability would vanish unscaled."""

    def tensor_core(a, b, shift=None):
        assert a.dtype == b.dtype
        out = a.float() @ b.float().T
        return out if shift is None else out + shift

    for module in (products, tiles):
        monkeypatch.setattr(module, "product", tensor_core)
    monkeypatch.setattr(products, "HALVES", ())
    monkeypatch.setattr("kernels.linear_cross_entropy.chunked.operand_dtype", lambda dtype, device: dtype)
    hidden, weight, targets, upstream = make(dtype=torch.float16)
    options = Options(64, None, torch.float16, keep_rows=False, fused=False)
    lse = forward((hidden, weight, None), targets, options)[1]
    grads = backward((hidden, weight.float(), None), targets, lse, upstream * 1e-7, (True, True, False), options)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    nll = token_nll(*exact, targets, implementation="reference")
    expected = torch.autograd.grad(nll, exact, upstream.double() * 1e-7)
    assert grads[1].dtype == torch.float32 and (grads[1] - expected[1]).norm() <= 1e-3 * expected[1].norm()


def test_compiles_without_a_graph_break():
    hidden, weight, targets, upstream = make()
    bias = torch.randn(500, requires_grad=True)

    def loss(hidden, weight, bias):
        return (token_nll(hidden * 2, weight, targets, bias=bias, softcap=9.0) * upstream).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for frozen in ((), (weight, bias), (hidden, bias)):
        leaves = [x for x in (hidden, weight, bias) if not any(x is y for y in frozen)]
        for x in (hidden, weight, bias):
            x.requires_grad_(any(x is leaf for leaf in leaves))
        expected = torch.autograd.grad(loss(hidden, weight, bias), leaves)
        results = torch.autograd.grad(compiled(hidden, weight, bias), leaves)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_operators():
    hidden, weight, targets, upstream = make(N=9, M=4, V=11)
    arguments = (5, None, torch.float32)
    torch.library.opcheck(token_nll_operator, (hidden, weight, None, targets, *arguments, False, False))
    torch.library.opcheck(token_nll_operator, (hidden, weight.detach(), None, targets, *arguments, True, False))
    saved = [x if x is None else x.detach() for x in (hidden, weight, None, targets, torch.zeros(9))]
    torch.library.opcheck(token_nll_backward_operator, (saved, upstream, [True, True, False], *arguments, False))


def test_products_of_a_gpu_return_float32():
    """Without a GPU the meta device at least checks the calls: 16-bit factors, float32 results, sums in place."""
    a, b = (torch.empty(n, 8, dtype=torch.bfloat16, device="meta") for n in (4, 3))
    total = products.product(a, b)
    assert total.dtype == torch.float32 and total.shape == (4, 3)
    assert products.add_product(total, a, b) is total
