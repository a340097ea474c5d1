"""Cases I3 and I4: the published DRT reads a million tokens and more on a GPU, and with its chunks in host memory.

A prefill feeds segments of a context length to a cache and forms the logits of the last position alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.decoding import read_segments
from benchmarks.measure import Product, check, peak_bytes_on, seconds_on
from benchmarks.registry import Row, case
from benchmarks.training_gpu import Pretraining
from models.drt import DRTCache, DRTForCausalLM


@dataclass(frozen=True)
class Prefill:
    """Sizes: the model, the tokens of a call, and the contexts."""

    model: Pretraining = field(default_factory=Pretraining)
    segment: int = 65_520
    million: int = 2**20
    longest: int = 2**24

    def build(self, dtype: torch.dtype = torch.bfloat16) -> DRTForCausalLM:
        """Build the DRT for inference."""
        return self.model.drt().to(dtype).eval()

    def read(self, model: DRTForCausalLM, count: int, *, offload: bool = False) -> DRTCache:
        """Feed a number of random tokens; returns the cache."""
        cache = DRTCache(model.config, offload=offload)
        read_segments(model, self.model.tokens(count), cache, self.segment)
        return cache


def _check(problem: Prefill) -> None:
    """Segments, with and without offload, give the logits of one call in float32."""
    model, tokens = problem.build(torch.float32), problem.model.tokens(7 * problem.model.retrieval["chunk_size"] + 9)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
    for offload in (False, True):
        cache = DRTCache(model.config, offload=offload)
        segment = 3 * problem.model.retrieval["chunk_size"] + 1
        check({"logits": read_segments(model, tokens, cache, segment)}, {"logits": whole}, 1e-3)


def _flops(model: DRTForCausalLM, count: int) -> float:
    """Count the forward pass without the head."""
    config = model.config
    return count * (model.num_flops_per_token(count) / 3 - 2 * config.hidden_size * config.vocab_size)


def prefill(problem: Prefill) -> Iterator[Row]:
    """Compare a million tokens with matrix products, and sixteen million with half a minute and 60 GB."""
    _check(problem)
    device, count = problem.model.device, problem.million
    model, product = problem.build(), Product.on(device)
    seconds = seconds_on(device, {"ours": partial(problem.read, model, count), "product": product.run})
    limit = product.limit(_flops(model, count), seconds["product"])
    shape = f"{count} tokens in segments of {problem.segment}, bfloat16"
    yield Row(shape, "prefill, s", seconds["ours"], "matrix product", limit, 0.4)
    shape, spent = f"{problem.longest} tokens in segments of {problem.segment}, bfloat16", dict[str, float]()
    longest = partial(problem.read, model, problem.longest)
    held = peak_bytes_on(device, lambda: spent.update(seconds_on(device, {"ours": longest}, repeats=1)))
    yield Row(shape, "prefill, s", spent["ours"], "30 s", 30, 1, "lower")
    yield Row(shape, "prefill, peak bytes beyond the weights", held, "60 GB", 60e9, 1, "lower")


def offload(problem: Prefill) -> Iterator[Row]:
    """Compare a million tokens with chunks in host memory with chunks on the device."""
    _check(problem)
    device, count = problem.model.device, problem.million
    model = problem.build()
    functions: dict[str, Callable[[], object]] = {
        name: partial(problem.read, model, count, offload=name == "host") for name in ("host", "device")
    }
    seconds = seconds_on(device, functions, repeats=5)
    shape = f"{count} tokens in segments of {problem.segment}, bfloat16"
    yield Row(shape, "prefill with offload, s", seconds["host"], "without", seconds["device"], 1.25, "lower")
    calls = -(-count // problem.segment)
    retrievals = (calls - 1) * len(model.config.layers_per_group)  # the first call has all it reads in its own chunks
    fetches = problem.read(model, count, offload=True).fetch_count
    yield Row(shape, "copies from host memory", fetches, "retrievals", retrievals, 2, "lower", floor=2)


@case("I3", group="long_context_gpu", device="cuda")
def prefill_millions() -> Iterator[Row]:
    yield from prefill(Prefill())


@case("I4", group="long_context_gpu", device="cuda")
def host_memory() -> Iterator[Row]:
    yield from offload(Prefill())
