"""Cases A1 to A9: grouped cross attention on a CPU."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import allocations, check, cpu_seconds, poisoned
from benchmarks.peers import causal_sdpa, gca_einsum, gca_sdpa
from benchmarks.registry import Row, case
from kernels.gca import grouped_cross_attention

CHUNK, TOP_K, HEADS, SIZE = 64, 8, 12, 64
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _inputs(tokens: int, dtype: torch.dtype = torch.float32, choice: str = "uniform") -> Inputs:
    """Make random arguments over `tokens` tokens, every slot filled."""
    generator = torch.Generator().manual_seed(0)
    groups = tokens // CHUNK
    q, k, v = (torch.randn(1, groups, CHUNK, HEADS, SIZE, generator=generator).to(dtype) for _ in range(3))
    if choice == "uniform":
        indices = torch.randint(0, groups, (1, groups, TOP_K), generator=generator)
    elif choice == "one":
        indices = torch.zeros(1, groups, TOP_K, dtype=torch.long)
    else:
        zipf = 1.0 / torch.arange(1, groups + 1)
        indices = torch.multinomial(zipf, groups * TOP_K, replacement=True, generator=generator).view(1, groups, TOP_K)
    return q, k, v, indices.int(), torch.rand(1, groups, TOP_K, generator=generator)


def _shape(tokens: int, dtype: torch.dtype = torch.float32) -> str:
    return f"{tokens} tokens, chunk {CHUNK}, K {TOP_K}, {HEADS} x {SIZE}, {str(dtype)[6:]}"


def differentiate(function: Callable[..., Tensor], inputs: Inputs, grad_out: Tensor) -> dict[str, Tensor]:
    """Run forward and backward; returns the output and the gradients."""
    names = ("q", "k", "v", "indices", "weights")
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    out.backward(grad_out)
    grads = {f"grad_{name}": leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf.grad is not None}
    return {"out": out.detach()} | grads


def _causal(q: Tensor, grad_out: Tensor | None) -> None:
    x = q.detach().requires_grad_(grad_out is not None)
    out = causal_sdpa(x)
    if grad_out is not None:
        out.backward(grad_out.flatten(1, 2).transpose(1, 2))


def _compare(dtype: torch.dtype, targets: dict[str, tuple[float, float | None]], *, backward: bool) -> Iterator[Row]:
    """Check, time in turns and compare with the peers named in `targets`: (target, floor)."""
    inputs = _inputs(4096, dtype)
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    peers: dict[str, Callable[..., Tensor]] = {"ours": grouped_cross_attention, "einsum": gca_einsum}
    peers["sdpa per chunk"] = gca_sdpa
    functions: dict[str, Callable[[], object]] = {}
    for name, function in peers.items():
        if name == "ours" or name in targets:
            run = partial(differentiate, function, inputs, grad_out) if backward else partial(function, *inputs)
            functions[name] = run
    if "causal sdpa" in targets:
        functions["causal sdpa"] = partial(_causal, inputs[0], grad_out if backward else None)
    exact = [x.double() if x.is_floating_point() else x for x in _inputs(1024, dtype)]
    small, upstream = _inputs(1024, dtype), grad_out[:, :16]
    with poisoned():
        results = differentiate(grouped_cross_attention, small, upstream)
    expected = differentiate(gca_einsum, tuple(exact), upstream.double())  # type: ignore[arg-type]
    check(results, expected, 2e-6 if dtype == torch.float32 else 6e-3)
    best = cpu_seconds(functions)
    what = "forward + backward" if backward else "forward"
    for name, (target, floor) in targets.items():
        yield Row(_shape(4096, dtype), f"{what}, CPU s", best["ours"], name, best[name], target, floor=floor)


@case("A1", group="gca")
def forward() -> Iterator[Row]:
    yield from _compare(
        torch.float32, {"einsum": (7, 5), "sdpa per chunk": (3, None), "causal sdpa": (4, None)}, backward=False
    )


@case("A2", group="gca")
def forward_bfloat16() -> Iterator[Row]:
    yield from _compare(torch.bfloat16, {"einsum": (5, None)}, backward=False)


@case("A3", group="gca")
def forward_backward() -> Iterator[Row]:
    yield from _compare(
        torch.float32, {"einsum": (4, 2.6), "sdpa per chunk": (3, None), "causal sdpa": (3.5, None)}, backward=True
    )


@case("A4", group="gca")
def forward_backward_bfloat16() -> Iterator[Row]:
    yield from _compare(torch.bfloat16, {"einsum": (3, None)}, backward=True)


@case("A5", group="gca")
def scaling() -> Iterator[Row]:
    functions = {}
    for tokens in (4096, 16384):
        inputs = _inputs(tokens)
        functions[str(tokens)] = partial(differentiate, grouped_cross_attention, inputs, torch.randn_like(inputs[0]))
    best = cpu_seconds(functions)
    measure = "forward + backward, CPU s"
    yield Row(_shape(16384), measure, best["16384"], "4096 tokens", best["4096"], 4.6, "lower")


@case("A9", group="gca")
def skewed_choices() -> Iterator[Row]:
    functions = {}
    for choice in ("uniform", "one", "zipf"):
        inputs = _inputs(4096, choice=choice)
        functions[choice] = partial(differentiate, grouped_cross_attention, inputs, torch.randn_like(inputs[0]))
    best = cpu_seconds(functions)
    for choice in ("one", "zipf"):
        measure = f"forward + backward, all choices {choice}, CPU s"
        yield Row(_shape(4096), measure, best[choice], "uniform choices", best["uniform"], 1.15, "lower")


def measure_memory(function: str) -> None:
    """Print the peak of one forward + backward beyond its inputs; run in a fresh process."""
    inputs = _inputs(4096)
    grad_out = torch.randn_like(inputs[0])
    chosen = {"ours": grouped_cross_attention, "einsum": gca_einsum}[function]
    print(json.dumps(allocations(partial(differentiate, chosen, inputs, grad_out))[0]))


@case("A8", group="gca")
def memory() -> Iterator[Row]:
    def fresh(function: str) -> int:
        code = f"from benchmarks.gca import measure_memory; measure_memory({function!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout.splitlines()[-1]))

    given = sum(x.nbytes for x in _inputs(4096))
    ours, einsum = fresh("ours"), fresh("einsum")
    yield Row(_shape(4096), "forward + backward, peak bytes", ours, "input bytes", given, 3, "lower", floor=3)
    yield Row(_shape(4096), "forward + backward, peak bytes", ours, "einsum", einsum, 0.25, "lower", floor=0.25)
