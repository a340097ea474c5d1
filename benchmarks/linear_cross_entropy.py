"""Cases L1 to L4: the per-token loss of a language-model head on a CPU.

Legend: N targets, M model width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import allocations, check, cpu_seconds, poisoned
from benchmarks.registry import Row, case
from kernels.linear_cross_entropy import token_nll

N, V, M = 4096, 32000, 512
# A run of these sizes takes seconds: one warm-up and two turns.
TURNS = 2
Inputs = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inputs(rows: int = N, dtype: torch.dtype = torch.float32) -> tuple[Inputs, Tensor]:
    """Make hidden, weight, targets, and upstream gradients of any sign."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, M, generator=generator) * M**-0.5).to(dtype)
    hidden = torch.randn(rows, M, generator=generator).to(dtype)
    targets = torch.randint(V, (rows,), generator=generator)
    return (hidden, weight, targets), torch.randn(rows, generator=generator)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Form all logits; float32 losses of logits in the dtype of the inputs."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call PyTorch's own fused loss, which chunks when it is given options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def differentiate(loss: Loss, inputs: Inputs, upstream: Tensor, train_head: bool = True) -> dict[str, Tensor]:
    """Run forward and backward; returns the losses and the gradients."""
    hidden, weight, targets = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in (hidden, weight)[: 1 + train_head]]
    nll = loss(hidden, weight, targets)
    grads = torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))
    return {"nll": nll.detach()} | dict(zip(("hidden", "weight"), grads, strict=False))


def _shape(dtype: torch.dtype = torch.float32) -> str:
    return f"N {N}, V {V}, M {M}, {str(dtype)[6:]}"


def _checked(dtype: torch.dtype) -> float:
    """Compare a few rows with float64 before anything is timed; returns the largest error of a loss."""
    inputs, upstream = _inputs(256, dtype)
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    expected = differentiate(naive_exact, exact, upstream)  # type: ignore[arg-type]
    with poisoned():
        results = differentiate(token_nll, inputs, upstream)
    check(results, expected, 5e-6 if dtype == torch.float32 else 3e-3)
    return (results["nll"] - expected["nll"]).abs().max().item()


def naive_exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Form all logits in the dtype of the inputs, which is float64."""
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")


@case("L1", group="linear_cross_entropy")
def forward_backward() -> Iterator[Row]:
    _checked(torch.float32)
    inputs, upstream = _inputs()
    functions = {
        loss.__name__: partial(differentiate, loss, inputs, upstream) for loss in (token_nll, naive, torch_chunked)
    }
    best, measure = cpu_seconds(functions, TURNS), "forward + backward, CPU s"
    for peer, target in ((naive, 0.9), (torch_chunked, 0.8)):
        yield Row(_shape(), measure, best["token_nll"], peer.__name__, best[peer.__name__], target, "lower")
    ours, peak = (allocations(functions[name])[0] for name in ("token_nll", "naive"))
    yield Row(_shape(), "forward + backward, peak bytes", ours, "naive", peak, 0.12, "lower")


@case("L2", group="linear_cross_entropy")
def forward_backward_bfloat16() -> Iterator[Row]:
    dtype = torch.bfloat16
    error = _checked(dtype)
    inputs, upstream = _inputs(dtype=dtype)
    functions = {loss.__name__: partial(differentiate, loss, inputs, upstream) for loss in (token_nll, torch_chunked)}
    best = cpu_seconds(functions, TURNS)
    measure = "forward + backward, CPU s"
    yield Row(_shape(dtype), measure, best["token_nll"], "torch_chunked", best["torch_chunked"], 0.4, "lower")
    yield Row(_shape(dtype), "largest error of a loss", error, "1e-5", 1e-5, 1, "lower", floor=1)


@case("L3", group="linear_cross_entropy")
def no_grad() -> Iterator[Row]:
    _checked(torch.float32)
    inputs, _ = _inputs()
    square = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    ours = torch.no_grad()(partial(token_nll, *inputs))
    products = {"mm": partial(torch.mm, square, square.T)}
    if torch.backends.mkldnn.is_available():
        products["onednn"] = partial(torch.ops.mkldnn._linear_pointwise, square, square, None, "none", [], "")
    best = cpu_seconds({"ours": ours} | products, 5)
    limit = 2 * N * V * M * min(best[name] for name in products) / (2 * 1024**3)
    yield Row(_shape(), "losses without gradients, CPU s", best["ours"], "matrix product", limit, 0.6)
    yield Row(
        _shape(), "losses without gradients, peak bytes", allocations(ours)[0], "64 MB", 64e6, 1, "lower", floor=1
    )


@case("L4", group="linear_cross_entropy")
def smaller_work() -> Iterator[Row]:
    """A fifth of the targets weighted: 2 + 6/5 of 8 products; a frozen head: 4 of 8."""
    inputs, upstream = _inputs(2048)
    sparse = torch.where(torch.arange(2048) % 5 == 0, upstream, 0.0)
    functions = {
        "all": partial(differentiate, token_nll, inputs, upstream),
        "sparse": partial(differentiate, token_nll, inputs, sparse),
        "frozen head": partial(differentiate, token_nll, inputs, upstream, train_head=False),
    }
    best, shape = cpu_seconds(functions, TURNS), f"N 2048, V {V}, M {M}, float32"
    for name, target in (("sparse", 0.45), ("frozen head", 0.55)):
        yield Row(
            shape,
            f"forward + backward, {name}, CPU s",
            best[name],
            "dense weights, trained head",
            best["all"],
            target,
            "lower",
        )
