"""Case L5: the per-token loss of a language-model head on a GPU, bfloat16, against matrix products and other losses.

Legend: N targets, M model width, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.linear_cross_entropy import Inputs, Loss, differentiate, naive
from benchmarks.measure import cuda_seconds
from benchmarks.registry import Row, case
from kernels.linear_cross_entropy import token_nll

N, V, M = 32768, 128_256, 4096
SHAPE = f"N {N}, V {V}, M {M}, bfloat16"


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call Liger's fused loss, whose logits are bfloat16."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def _inputs() -> tuple[Inputs, Tensor]:
    weight = (torch.randn(V, M, device="cuda") * M**-0.5).bfloat16()
    hidden = torch.randn(N, M, device="cuda", dtype=torch.bfloat16)
    return (hidden, weight, torch.randint(V, (N,), device="cuda")), torch.randn(N, device="cuda")


def _error(inputs: Inputs, nll: Tensor) -> float:
    """Compare a sample of rows with float64; returns the largest error."""
    hidden, weight, targets = inputs
    sample = torch.arange(0, N, N // 64, device=nll.device)
    logits = torch.cat([hidden[sample].double() @ part.double().T for part in weight.split(8192)], 1)
    exact = logits.logsumexp(1) - logits.gather(1, targets[sample, None])[:, 0]
    return (nll[sample].double() - exact).abs().max().item()


@case("L5", group="linear_cross_entropy_gpu", device="cuda")
def forward_backward() -> Iterator[Row]:
    inputs, upstream = _inputs()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nll = differentiate(token_nll, inputs, upstream)["nll"]
    extra = torch.cuda.max_memory_allocated() - before - inputs[1].nbytes
    if not (error := _error(inputs, nll)) <= 1e-5:
        raise ArithmeticError(f"a loss is wrong by {error:.1e}")
    losses: list[Loss] = [token_nll, naive] + ([liger] if find_spec("liger_kernel") else [])
    square = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    functions = {loss.__name__: partial(differentiate, loss, inputs, upstream) for loss in losses}
    seconds = cuda_seconds(functions | {"product": partial(torch.mm, square[0], square[1])})
    ours, limit = seconds["token_nll"], 8 * N * V * M * seconds["product"] / (2 * 8192**3)
    measure = "forward + backward, GPU s"
    yield Row(SHAPE, measure, ours, "matrix product", limit, 0.7, floor=0.6)
    for name, target in (("liger", 1.0), ("naive", 0.95)):
        if name in seconds:
            yield Row(SHAPE, measure, ours, name, seconds[name], target, "lower")
    yield Row(SHAPE, "forward + backward, peak bytes beyond dW", extra, "1 GiB", 2.0**30, 1, "lower", floor=1)
