"""Cases A10 to A14: grouped cross attention on a GPU, bfloat16, against matrix products and the gathered path."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gca import Inputs, differentiate
from benchmarks.measure import check, cuda_seconds, poisoned
from benchmarks.peers import gca_einsum
from benchmarks.registry import Row, case
from kernels.gca import grouped_cross_attention

CHUNK = 64
SMALL = {"batch": 8, "groups": 256, "top_k": 8, "heads": 12, "kv_heads": 12, "size": 64}
LARGE = {"batch": 1, "groups": 1024, "top_k": 16, "heads": 32, "kv_heads": 8, "size": 128}


def _inputs(batch: int, groups: int, top_k: int, heads: int, kv_heads: int, size: int) -> Inputs:
    def normal(count: int) -> Tensor:
        return torch.randn(batch, groups, CHUNK, count, size, device="cuda", dtype=torch.bfloat16)

    indices = torch.randint(0, groups, (batch, groups, top_k), device="cuda", dtype=torch.int32)
    weights = torch.rand(batch, groups, top_k, device="cuda")
    return normal(heads), normal(kv_heads), normal(kv_heads), indices, weights


def _shape(shape: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items()) + ", bfloat16"


def _rotate(function: Callable[..., object], sets: list[tuple[object, ...]]) -> Callable[[], object]:
    """Call the function with the next set of inputs each time, so that none is found in the cache."""
    turn = iter(range(10**9))
    return lambda: function(*sets[next(turn) % len(sets)])


def _checked() -> None:
    """Compare a small problem with float64 before anything is timed."""
    inputs = _inputs(1, 16, 4, 4, 4, 64)
    grad_out = torch.randn_like(inputs[0])
    with poisoned():
        results = differentiate(grouped_cross_attention, inputs, grad_out)
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    check(results, differentiate(gca_einsum, exact, grad_out.double()), 1e-2)


def _compare(shape: dict[str, int], share: tuple[float, float], *, backward: bool) -> Iterator[Row]:
    """Report the share of the matrix product rate: two products forward, seven backward (two recomputed)."""
    _checked()
    sets: list[tuple[object, ...]] = []
    for _ in range(2):
        inputs = _inputs(**shape)
        sets.append((grouped_cross_attention, inputs, torch.randn_like(inputs[0])) if backward else inputs)
    square = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    ours = _rotate(differentiate if backward else grouped_cross_attention, sets)
    seconds = cuda_seconds({"ours": ours, "product": partial(torch.mm, square[0], square[1])})
    rows = shape["batch"] * shape["groups"] * CHUNK
    flops = (18 if backward else 4) * rows * shape["top_k"] * CHUNK * shape["heads"] * shape["size"]
    limit = flops * seconds["product"] / (2 * 8192**3)
    what = "forward + backward" if backward else "forward"
    yield Row(_shape(shape), f"{what}, GPU s", seconds["ours"], "matrix product", limit, share[0], floor=share[1])


@case("A10", group="gca_gpu", device="cuda")
def forward() -> Iterator[Row]:
    yield from _compare(SMALL, (0.32, 0.22), backward=False)


@case("A11", group="gca_gpu", device="cuda")
def forward_long() -> Iterator[Row]:
    yield from _compare(LARGE, (0.55, 0.38), backward=False)


@case("A12", group="gca_gpu", device="cuda")
def forward_backward() -> Iterator[Row]:
    yield from _compare(SMALL, (0.26, 0.16), backward=True)
    yield from _compare(LARGE, (0.42, 0.28), backward=True)


@case("A14", group="gca_gpu", device="cuda")
def memory() -> Iterator[Row]:
    """Nothing may grow with K N D: the gathered path would hold two copies of K keys and values a group."""
    shape = LARGE | {"top_k": 32}
    inputs = _inputs(**shape)
    grad_out = torch.randn_like(inputs[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    differentiate(grouped_cross_attention, inputs, grad_out)
    ours = torch.cuda.max_memory_allocated() - before
    gathered = 4 * shape["batch"] * shape["groups"] * 32 * CHUNK * shape["kv_heads"] * shape["size"] * 2
    yield Row(_shape(shape), "forward + backward, peak bytes", ours, "gathered K, V", gathered, 0.125, "lower")
