"""Checks of the Triton kernels in Triton's interpreter; run as a program: `TRITON_INTERPRET=1 python ... NAMES`."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

import kernels.gca.reverse_map
import kernels.gca.triton
from benchmarks.measure import allocations, poisoned
from kernels.gca import grouped_cross_attention, reverse_index
from kernels.gca.launch import candidates
from kernels.gca.operator import gca_backward_operator, gca_operator

FIXTURES = Path(__file__).parents[1] / "fixtures" / "gca"
NAMES = ("q", "k", "v", "indices", "weights")


def run(tensors, implementation="triton", **options):
    leaves = [tensors[n].detach().clone().requires_grad_(tensors[n].is_floating_point()) for n in NAMES]
    options = {"kv_lengths": tensors.get("kv_lengths"), "implementation": implementation} | options
    out = grouped_cross_attention(*leaves, **options)
    out.backward(tensors["grad_out"])
    return {"out": out.detach()} | {f"grad_{n}": x.grad for n, x in zip(NAMES, leaves, strict=True) if n != "indices"}


def inputs(B=1, N=3, S=5, H=2, Hk=1, D=16, E=4, C=7, K=2, *, dtype=torch.float32, ragged=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v, grad_out = normal(B, N, S, H, D), normal(B, E, C, Hk, D), normal(B, E, C, Hk, D), normal(B, N, S, H, D)
    tensors = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "grad_out": grad_out.to(dtype)}
    tensors["indices"] = torch.randint(-1, E, (B, N, K), generator=generator, dtype=torch.int32)
    tensors["kv_lengths"] = torch.randint(0, C + 1, (B, E), generator=generator, dtype=torch.int32) if ragged else None
    return tensors | {"weights": normal(B, N, K)}


def compare(results, expected, limit):
    for key, reference in expected.items():
        error = (results[key].double() - reference.double()).abs().max().item()
        allowed = (10 if key == "grad_weights" else 1) * limit * max(1.0, reference.abs().max().item())
        assert error <= allowed, f"{key}: {error:.2e}, allowed {allowed:.2e}"


def fixtures():
    for name in ("kernel_causal", "kernel_decode", "kernel_ragged"):
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            tensors, meta = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        options = {"scale": json.loads(meta["scale"]), "softmax_off_by_one": json.loads(meta["softmax_off_by_one"])}
        compare(run(tensors, **options), {key: tensors[key] for key in tensors if key.startswith(("out", "grad_"))
                                          and key != "grad_out"}, 8e-6)  # fmt: skip


def shapes():
    cases = [
        ({"S": 1, "H": 8, "Hk": 2, "B": 2, "N": 1}, torch.float32),
        ({"D": 24, "C": 1, "K": 3, "S": 20}, torch.float32),
        ({"D": 32, "C": 150, "S": 17, "H": 3, "E": 2}, torch.float32),
        ({"D": 256, "C": 20, "N": 2}, torch.float32),
        ({"D": 64, "C": 65, "S": 65, "H": 1, "N": 2}, torch.float16),
        ({"D": 64, "C": 64, "S": 1, "H": 8, "Hk": 2}, torch.float16),
    ]
    for number, (shape, dtype) in enumerate(cases):
        tensors = inputs(**shape, dtype=dtype, ragged=number % 2 == 1)
        options = {"softmax_off_by_one": number % 3 != 0}
        expected = run(tensors, "cpu", **options)
        compare(run(tensors, **options), expected, 8e-6 if dtype == torch.float32 else 2e-3)


def slices():
    """Query groups of a part of the rows over the whole store: the same bits; gradients of the store add up."""
    tensors, rows = inputs(B=2, N=5, H=4, Hk=2, ragged=True), ("q", "indices", "weights", "grad_out")
    whole = run(tensors)
    parts = [run(tensors | {n: tensors[n][:, slice(*cut)] for n in rows}) for cut in ((0, 1), (1, 5))]
    for key in ("out", "grad_q", "grad_weights"):
        assert torch.equal(torch.cat([part[key] for part in parts], 1), whole[key]), key
    for key in ("grad_k", "grad_v"):
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key], atol=5e-6, rtol=1e-5)


def pieces():
    """Long lists are split; the parts give the same sums, and the same bits each time."""
    kernels.gca.reverse_map.PIECE = 2
    tensors = inputs(B=2, N=4, S=3, H=2, Hk=2, K=3, E=2, C=4)
    first, second = run(tensors), run(tensors)
    compare(first, run(tensors, "cpu"), 8e-6)
    assert all(torch.equal(first[key], second[key]) for key in first)


def descriptors():
    """Tiles read by tensor descriptors are those read by pointers: ragged edges, padding, empty slots, long chunks."""
    cases = [
        {"D": 64, "C": 63, "S": 64, "E": 5, "K": 3},
        {"D": 24, "C": 9, "H": 4, "Hk": 2},
        {"D": 32, "C": 150, "S": 17, "E": 2},
    ]
    asked = []

    def choose(shape, device, run):
        tiles = candidates(shape, 0)[0]
        asked.append(shape.descriptors)
        return dataclasses.replace(tiles, descriptors=shape.descriptors)

    for number, shape in enumerate(cases):
        for ragged in (False, True):
            tensors = inputs(**shape, dtype=torch.float16, ragged=ragged)
            tensors["indices"][0, 0, 0] = -1
            expected = run(tensors, softmax_off_by_one=number == 0)
            default, kernels.gca.triton.choose = kernels.gca.triton.choose, choose
            results = run(tensors, softmax_off_by_one=number == 0)
            kernels.gca.triton.choose = default
            assert all(torch.equal(results[key], expected[key]) for key in expected)
    assert asked == [True, True, False] * 6  # forward, query and key kernel


def far():
    """Heads and keys further apart than 2^31 elements, in a file that takes no room."""
    tensors = inputs(N=2, H=3, Hk=3, C=3, dtype=torch.float16)
    step = 2**30 + 8  # as a factor it fits 32 bits, twice it does not
    for strides in ((0, 48, 16, step, 1), (0, 48, step, 16, 1)):
        with tempfile.NamedTemporaryFile() as file:
            whole = torch.from_file(file.name, shared=True, size=2 * step + 1000, dtype=torch.float16)
            starts = (("k", 0), ("v", 400))
            far_off = {name: whole[start:].as_strided((1, 4, 3, 3, 16), strides) for name, start in starts}
            for name, x in far_off.items():
                x.copy_(tensors[name])
            leaves = [(far_off | tensors)[n] if n not in far_off else far_off[n] for n in NAMES]
            out, lse = gca_operator(*leaves, None, None, 0.25, False, "triton")
            grads = gca_backward_operator(tensors["grad_out"], *leaves, None, None, lse, 0.25, "triton")
        expected = run(tensors, "triton", scale=0.25)
        results = dict(zip(expected, (out, *grads), strict=True))
        assert all(torch.equal(results[key], expected[key]) for key in expected)


def reverse():
    """The index of a retrieval, sorted once, gives the same bits; one of another retrieval is refused by its size."""
    tensors = inputs(B=2, N=4, S=3, H=2, Hk=2, K=3, E=2, C=4)
    index = reverse_index(tensors["indices"], 2)
    expected, results = run(tensors), run(tensors, reverse=index)
    assert all(torch.equal(results[key], expected[key]) for key in expected)
    per_head = tensors | {n: tensors[n][:, :, None].expand(-1, -1, 2, -1).contiguous() for n in ("indices", "weights")}
    expected = run(per_head)
    results = run(per_head, reverse=reverse_index(per_head["indices"], 2))
    assert all(torch.equal(results[key], expected[key]) for key in expected)


def poison():
    """NaN in dead memory and in fresh buffers leaves no trace."""
    tensors = inputs(B=2, N=2, E=9, C=6, ragged=True)
    tensors["kv_lengths"][:, 0] = 0
    tensors["indices"][:, 0, 0], tensors["indices"][:, 1, 0] = 0, -1
    selected = torch.zeros(2, 9, dtype=torch.bool)
    for b in range(2):
        selected[b, tensors["indices"][b][tensors["indices"][b] >= 0].long()] = True
    dead = (torch.arange(6) >= tensors["kv_lengths"][..., None]) | ~selected[..., None]
    clean = run(tensors, softmax_off_by_one=True)
    tensors["k"][dead] = tensors["v"][dead] = tensors["weights"][tensors["indices"] < 0] = torch.nan
    with poisoned():
        results = run(tensors, softmax_off_by_one=True)
    assert all(torch.equal(results[key], clean[key]) for key in clean)
    assert not results["grad_k"][dead].any() and not results["grad_v"][dead].any()
    assert not results["grad_weights"][tensors["indices"] < 0].any()


def operator():
    tensors = inputs(N=2, S=2)
    leaves = [tensors[n].requires_grad_(tensors[n].is_floating_point()) for n in NAMES]
    torch.library.opcheck(gca_operator, (*leaves, None, None, 0.5, True, "triton"))
    plain = [leaf.detach() for leaf in leaves]
    lse = gca_operator(*plain, None, None, 0.5, True, "triton")[1]
    index = reverse_index(tensors["indices"], 4)
    torch.library.opcheck(gca_backward_operator, (tensors["grad_out"], *plain, None, index, lse, 0.5, "triton"))
    strided = tensors | {n: tensors[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("k", "v")}
    compare(run(strided), run(tensors, "cpu"), 8e-6)
    compiled = torch.compile(grouped_cross_attention, fullgraph=True, backend="aot_eager")
    expected = run(tensors, "cpu")
    out = compiled(*leaves, implementation="triton", reverse=index)
    out.backward(tensors["grad_out"])
    torch.testing.assert_close(out, expected["out"])
    torch.testing.assert_close(leaves[1].grad, expected["grad_k"])
    try:
        run({key: t.bfloat16() if key in "qkv" else t for key, t in tensors.items()})
    except ValueError as error:
        assert "bfloat16" in str(error)
    else:
        raise AssertionError("bfloat16 was accepted in the interpreter")


def memory():
    """The bounds of the operation, at a size the interpreter can run (the interpreter's own arrays do not count)."""
    tensors = inputs(N=8, S=64, H=2, Hk=2, D=64, E=8, C=64, K=1)
    peak, largest = allocations(lambda: run(tensors))
    copies = sum(tensors[n].nbytes for n in NAMES if n != "indices")  # run() clones its leaves
    q, k = tensors["q"], tensors["k"]
    assert peak - copies <= 1.75 * (2 * q.nbytes + 2 * k.nbytes + 2 * 8 * 1 * 2 * 64 * 4)
    assert largest <= 1.25 * q.nbytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        globals()[name]()
