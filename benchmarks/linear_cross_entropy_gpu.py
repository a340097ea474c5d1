"""Case L5: the per-token loss of a language-model head on a GPU, bfloat16, against matrix products and other losses.

Legend: N targets, M model width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.linear_cross_entropy import Inputs, Loss, differentiate, naive
from benchmarks.measure import Product, fitting, peak_bytes_on, seconds_on
from benchmarks.registry import Row, case
from kernels.linear_cross_entropy import token_nll


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Call Liger's fused loss, whose logits are bfloat16."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


@dataclass(frozen=True)
class Head:
    """Sizes of a problem."""

    targets: int = 32768
    vocabulary: int = 128_256
    width: int = 4096
    device: str = "cuda"

    def __str__(self) -> str:
        return f"N {self.targets}, V {self.vocabulary}, M {self.width}, bfloat16"

    def inputs(self) -> tuple[Inputs, Tensor]:
        """Make hidden, weight, targets, and upstream gradients of any sign."""
        weight = (torch.randn(self.vocabulary, self.width, device=self.device) * self.width**-0.5).bfloat16()
        hidden = torch.randn(self.targets, self.width, device=self.device, dtype=torch.bfloat16)
        targets = torch.randint(self.vocabulary, (self.targets,), device=self.device)
        return (hidden, weight, targets), torch.randn(self.targets, device=self.device)


def _check(inputs: Inputs, nll: Tensor) -> None:
    """Compare a sample of rows with float64."""
    hidden, weight, targets = inputs
    sample = torch.arange(0, len(targets), max(1, len(targets) // 64), device=nll.device)
    logits = torch.cat([hidden[sample].double() @ part.double().T for part in weight.split(8192)], 1)
    exact = logits.logsumexp(1) - logits.gather(1, targets[sample, None])[:, 0]
    if not (error := (nll[sample].double() - exact).abs().max().item()) <= 1e-5:
        raise ArithmeticError(f"a loss is wrong by {error:.1e}")


def compare(head: Head) -> Iterator[Row]:
    """Check a sample, then compare time and memory."""
    inputs, upstream = head.inputs()
    results: dict[str, Tensor] = {}
    peak = peak_bytes_on(head.device, lambda: results.update(differentiate(token_nll, inputs, upstream)))
    _check(inputs, results.pop("nll"))
    results.clear()
    losses: list[Loss] = [token_nll, naive] + ([liger] if find_spec("liger_kernel") else [])
    functions = fitting({loss.__name__: partial(differentiate, loss, inputs, upstream) for loss in losses})
    product = Product.on(head.device)
    seconds = seconds_on(head.device, functions | {"product": product.run})
    flops = 8.0 * head.targets * head.vocabulary * head.width
    ours, measure = seconds["token_nll"], "forward + backward, s"
    limit = product.limit(flops, seconds["product"])
    yield Row(str(head), measure, ours, "matrix product", limit, 0.7, floor=0.6)
    for name, target in (("liger", 1.0), ("naive", 0.95)):
        if name in seconds:
            yield Row(str(head), measure, ours, name, seconds[name], target, "lower")
    extra, allowed = peak - inputs[1].nbytes, 2.0**30
    yield Row(str(head), "forward + backward, peak bytes beyond dW", extra, "1 GiB", allowed, 1, "lower", floor=1)


@case("L5", group="linear_cross_entropy_gpu", device="cuda")
def forward_backward() -> Iterator[Row]:
    yield from compare(Head())
