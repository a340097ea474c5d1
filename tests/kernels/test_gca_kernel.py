import math

import pytest
import torch

from kernels.gca import grouped_cross_attention

FLOAT32 = ["kernel_causal", "kernel_decode", "kernel_ragged"]
PUBLISHED = ["kernel_published_" + name for name in ("d128", "gqa4", "k1", "q1", "zero_landmark")]
IMPLEMENTATIONS = ["reference", "cpu"]
RESULTS = ["out", "grad_q", "grad_k", "grad_v", "grad_weights"]


def error(result, expected):
    return (result.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FLOAT32)
def test_float32_fixtures(load, run_gca, name, implementation):
    tensors, meta = load(name)
    options = {"scale": meta["scale"], "softmax_off_by_one": meta["softmax_off_by_one"]}
    results = run_gca(tensors, implementation, **options)
    for key in RESULTS:
        limit = 5e-5 if key == "grad_weights" else 4e-6
        assert error(results[key], tensors[key]) <= limit * max(1.0, tensors[key].abs().max().item()), key
    assert torch.all(results["grad_weights"][tensors["indices"] < 0] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_bfloat16_fixtures(load, run_gca, name, implementation):
    tensors, meta = load(name)
    options = {"scale": meta["scale"], "softmax_off_by_one": meta["softmax_off_by_one"]}
    results = run_gca(tensors, implementation, **options)
    for key, published in meta["published_bf16_max_abs_error"].items():
        limit = max(1.2 * published, 2**-8 * tensors[key].abs().max().item())
        assert error(results[key], tensors[key]) <= limit, key


@pytest.mark.parametrize("name", FLOAT32)
def test_float64_reference_reproduces_the_fixtures(load, run_gca, name):
    tensors, meta = load(name)
    doubled = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    options = {"scale": meta["scale"], "softmax_off_by_one": meta["softmax_off_by_one"]}
    results = run_gca(doubled, "reference", **options)
    for key in RESULTS:
        assert error(results[key], tensors[key]) <= 4e-7 * max(1.0, tensors[key].abs().max().item()), key


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zeroed_last_key_is_off_by_one_over_the_others(load, run_gca, implementation):
    tensors, meta = load("kernel_published_zero_landmark")
    tensors = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    assert not tensors["k"][:, :, -1].any()
    with_zero = run_gca(tensors, implementation, scale=meta["scale"])
    shorter = tensors | {"k": tensors["k"][:, :, :-1], "v": tensors["v"][:, :, :-1]}
    without = run_gca(shorter, implementation, scale=meta["scale"], softmax_off_by_one=True)
    assert error(with_zero["out"], without["out"]) <= 2e-6
    assert error(with_zero["grad_k"][:, :, :-1], without["grad_k"]) <= 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_off_by_one_probe(implementation):
    q, k = torch.full((1, 1, 1, 1, 16), -1.0), torch.full((1, 1, 64, 1, 16), 0.25)
    indices, weights = torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1)
    options = {"scale": 1.0, "implementation": implementation}
    plain = grouped_cross_attention(q, k, torch.ones_like(k), indices, weights, **options)
    shifted = grouped_cross_attention(q, k, torch.ones_like(k), indices, weights, softmax_off_by_one=True, **options)
    assert torch.allclose(plain, torch.ones_like(plain), atol=1e-6)
    assert torch.allclose(shifted, torch.full_like(shifted, 0.539637), atol=1e-6)
    for sign in (-1.0, 1.0):
        far = grouped_cross_attention(
            q, sign * 15 * k, torch.ones_like(k), indices, weights, softmax_off_by_one=True, **options
        )
        assert torch.isfinite(far).all()
        assert math.isclose(far.max().item(), 1.0 if sign < 0 else 0.0, abs_tol=1e-6)


@pytest.mark.parametrize("shape", [
    {"N": 1, "S": 1, "K": 1, "C": 1, "E": 1, "D": 1, "H": 1, "Hk": 1},
    {"H": 6, "Hk": 2, "S": 1, "D": 24},
    {"H": 3, "Hk": 1, "C": 150, "K": 2, "E": 4},
    {"N": 40, "S": 16, "C": 16, "K": 8, "E": 40, "D": 64, "H": 4, "Hk": 4},
])  # fmt: skip
@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_cpu_equals_reference(gca_inputs, run_gca, shape, off_by_one, ragged):
    tensors = gca_inputs(**shape, ragged=ragged, dtype=torch.float64)
    expected = run_gca(tensors, "reference", softmax_off_by_one=off_by_one)
    results = run_gca(tensors, "cpu", softmax_off_by_one=off_by_one)
    for key in RESULTS:
        assert error(results[key], expected[key]) <= 1e-11, key


@pytest.mark.parametrize("tile", [1, 2000])
def test_any_tile_size_gives_the_same_result(monkeypatch, gca_inputs, run_gca, tile):
    tensors = gca_inputs(dtype=torch.float64, ragged=True)
    expected = run_gca(tensors, "reference")
    monkeypatch.setattr("kernels.gca.tiles.TILE", tile)
    results = run_gca(tensors, "cpu")
    for key in RESULTS:
        assert error(results[key], expected[key]) <= 1e-11, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_upcast_exactly(gca_inputs, run_gca, dtype):
    tensors = gca_inputs(dtype=dtype)
    wide = {key: t.float() if key in ("q", "k", "v", "grad_out") else t for key, t in tensors.items()}
    expected, results = run_gca(wide, "cpu"), run_gca(tensors, "cpu")
    for key in RESULTS:
        assert torch.equal(results[key], expected[key].to(results[key].dtype)), key


def test_autocast_changes_nothing(gca_inputs, run_gca):
    tensors = gca_inputs()
    for implementation in IMPLEMENTATIONS:
        expected = run_gca(tensors, implementation)
        with torch.autocast("cpu", torch.bfloat16):
            results = run_gca(tensors, implementation)
        compared = RESULTS if implementation == "cpu" else RESULTS[:1]  # plain autograd follows autocast
        assert all(torch.equal(results[key], expected[key]) for key in compared)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dead_memory_has_no_influence(gca_inputs, run_gca, implementation, poison):
    tensors = gca_inputs(E=12, ragged=True)
    tensors["kv_lengths"][:, 0] = 0
    tensors["indices"][:, 0, 0] = 0
    batch = torch.arange(2)[:, None, None]
    selected = torch.zeros(2, 12, dtype=torch.bool)
    selected[batch, tensors["indices"].clamp(min=0).long()] = True
    selected[:, 0] = (tensors["indices"] == 0).flatten(1).any(1)
    dead = (torch.arange(9) >= tensors["kv_lengths"][..., None]) | ~selected[..., None]
    assert dead.any() and not dead.all()
    empty = tensors["indices"] < 0
    clean = run_gca(tensors, implementation)
    tensors["k"][dead], tensors["v"][dead], tensors["weights"][empty] = poison, poison, poison
    results = run_gca(tensors, implementation)
    for key in RESULTS:
        assert torch.equal(results[key], clean[key]), key
    assert not results["grad_k"][dead].any() and not results["grad_v"][dead].any()
    assert not results["grad_weights"][empty].any()


def test_uninitialised_outputs_leave_no_nan(monkeypatch, gca_inputs, run_gca):
    real = torch.empty

    def poisoned(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    results = run_gca(gca_inputs(N=40, S=17, ragged=True), "cpu")
    assert all(torch.isfinite(result).all() for result in results.values())


def test_runs_are_bit_identical(gca_inputs, run_gca):
    tensors = gca_inputs(N=50, S=8, E=4, K=6)
    first, second, third = (run_gca(tensors, "cpu") for _ in range(3))
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], third[key]) for key in RESULTS)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("off_by_one", [False, True])
def test_gradcheck(gca_inputs, implementation, off_by_one):
    t = gca_inputs(B=1, N=2, S=2, H=2, Hk=1, D=3, E=3, C=3, K=3, dtype=torch.float64, ragged=True)

    def function(q, k, v, weights):
        options = {"kv_lengths": t["kv_lengths"], "softmax_off_by_one": off_by_one, "implementation": implementation}
        return grouped_cross_attention(q, k, v, t["indices"], weights, **options)

    leaves = tuple(t[name].requires_grad_() for name in ("q", "k", "v", "weights"))
    assert torch.autograd.gradcheck(function, leaves)
    if implementation == "reference":
        assert torch.autograd.gradgradcheck(function, leaves)


def test_operator_passes_opcheck(gca_inputs):
    from kernels.gca.operator import gca_operator

    t = gca_inputs(B=1, N=3, S=2, H=2, Hk=1, D=4, E=3, C=3, K=2, ragged=True)
    leaves = [
        t[n].requires_grad_() if t[n].is_floating_point() else t[n] for n in ("q", "k", "v", "indices", "weights")
    ]
    torch.library.opcheck(gca_operator, (*leaves, t["kv_lengths"], None, 0.5, True, "cpu"))


def test_compiles_without_graph_break(gca_inputs, run_gca):
    tensors = gca_inputs(B=1, N=3, S=2, D=4)
    expected = run_gca(tensors, "auto")
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend="aot_eager")
    leaves = [tensors[n].requires_grad_(tensors[n].is_floating_point()) for n in ("q", "k", "v", "indices", "weights")]
    out = compiled(*leaves)
    out.backward(tensors["grad_out"])
    assert torch.equal(out, expected["out"])
    for name in ("q", "k", "v", "weights"):
        assert torch.equal(tensors[name].grad, expected[f"grad_{name}"]), name


def test_strided_stores_and_one_retrieval_per_kv_head(gca_inputs, run_gca):
    tensors = gca_inputs(dtype=torch.float64)
    expected = run_gca(tensors, "reference")
    strided = tensors | {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k", "v")}
    per_head = tensors | {name: tensors[name][:, :, None].expand(-1, -1, 2, -1) for name in ("indices", "weights")}
    for implementation in IMPLEMENTATIONS:
        assert error(run_gca(strided, implementation)["grad_k"], expected["grad_k"]) <= 1e-12
        results = run_gca(per_head, implementation)
        for key in ("out", "grad_q", "grad_k", "grad_v"):
            assert error(results[key], expected[key]) <= 1e-12, key
        assert error(results["grad_weights"].sum(2), expected["grad_weights"]) <= 1e-12


@pytest.mark.parametrize(("change", "message"), [
    ({"q": torch.zeros(2, 5, 7, 3, 16)}, "multiple"),
    ({"q": torch.zeros(2, 5, 7, 4, 8)}, "differ"),
    ({"q": torch.zeros(2, 5, 7, 4, 16, dtype=torch.float64)}, "dtype"),
    ({"v": torch.zeros(2, 6, 8, 2, 16)}, "expected"),
    ({"weights": torch.zeros(2, 5, 2)}, "shape"),
    ({"weights": torch.zeros(2, 5, 3, dtype=torch.float64)}, "weights must"),
    ({"indices": torch.full((2, 5, 3), 6, dtype=torch.int32)}, "lie in"),
    ({"indices": torch.full((2, 5, 3), -2, dtype=torch.int32)}, "lie in"),
    ({"indices": torch.zeros(2, 5, 3, 3, dtype=torch.int32)}, "per kv head"),
    ({"kv_lengths": torch.full((2, 6), 10, dtype=torch.int32)}, "kv_lengths"),
    ({"kv_lengths": torch.ones(2, 5, dtype=torch.int32)}, "kv_lengths"),
])  # fmt: skip
def test_wrong_arguments_are_refused(gca_inputs, run_gca, change, message):
    with pytest.raises(ValueError, match=message):
        run_gca(gca_inputs() | change, "cpu")


def test_unknown_implementation_is_refused(gca_inputs, run_gca):
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        run_gca(gca_inputs(), "fast")
