"""Cases A10 to A14: grouped cross attention on a GPU, bfloat16, against matrix products and other paths.

"gathered" copies the keys and values of every slot and calls PyTorch's fused attention; "SDPA, gathered before" is that
call alone; "causal SDPA" is full attention over the same tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gca import Inputs, differentiate
from benchmarks.measure import Product, check, peak_bytes_on, poisoned, seconds_on
from benchmarks.peers import causal_sdpa, gather_slots, gca_einsum, gca_gathered, sdpa_slots
from benchmarks.registry import Row, case
from kernels.gca import grouped_cross_attention

CHUNK = 64
# FLOPs for each row, slot, key, head and channel: two products forward, seven backward (two of them recomputed).
FORWARD, BACKWARD = 4, 14
Target = tuple[float, float | None]


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    batch: int
    groups: int
    top_k: int
    heads: int
    kv_heads: int
    size: int
    device: str = "cuda"

    def __str__(self) -> str:
        sizes = f"batch {self.batch}, {self.groups} groups of {CHUNK}, K {self.top_k}"
        return f"{sizes}, {self.heads} / {self.kv_heads} heads of {self.size}, bfloat16"

    @property
    def slot_products(self) -> int:
        """Rows, times keys of all their slots, times heads and channels."""
        return self.batch * self.groups * CHUNK * self.top_k * CHUNK * self.heads * self.size

    def inputs(self) -> Inputs:
        """Make random arguments, every slot filled."""

        def normal(heads: int) -> Tensor:
            sizes = self.batch, self.groups, CHUNK, heads, self.size
            return torch.randn(*sizes, device=self.device, dtype=torch.bfloat16)

        slots = self.batch, self.groups, self.top_k
        indices = torch.randint(0, self.groups, slots, device=self.device, dtype=torch.int32)
        weights = torch.rand(*slots, device=self.device)
        return normal(self.heads), normal(self.kv_heads), normal(self.kv_heads), indices, weights


SMALL = Shape(8, 256, 8, 12, 12, 64)
LARGE = Shape(1, 1024, 16, 32, 8, 128)


def _rotate(function: Callable[..., object], sets: list[tuple[object, ...]]) -> Callable[[], object]:
    """Call the function with the next set of inputs each time, so that none is found in the cache."""
    turn = iter(range(10**9))
    return lambda: function(*sets[next(turn) % len(sets)])


def _checked(device: str) -> None:
    """Compare a small problem, and the gathered path, with float64 before anything is timed."""
    inputs = Shape(1, 16, 4, 4, 4, 64, device).inputs()
    grad_out = torch.randn_like(inputs[0])
    exact = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    expected = differentiate(gca_einsum, exact, grad_out.double())  # type: ignore[arg-type]
    with poisoned():
        results = differentiate(grouped_cross_attention, inputs, grad_out)
    check(results, expected, 1e-2)
    check(differentiate(gca_gathered, inputs, grad_out), expected, 2e-2)


def _peers(shape: Shape, sets: list[Inputs], *, backward: bool) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    if backward:
        upstream = [torch.randn_like(inputs[0]) for inputs in sets]
        return {
            name: _rotate(partial(differentiate, function), list(zip(sets, upstream, strict=True)))
            for name, function in (("ours", grouped_cross_attention), ("gathered", gca_gathered))
        }
    gathered = [(q, *gather_slots(k, v, indices), weights) for q, k, v, indices, weights in sets[:1]]
    return {
        "ours": _rotate(grouped_cross_attention, list(sets)),
        "gathered": _rotate(gca_gathered, list(sets)),
        "SDPA, gathered before": _rotate(sdpa_slots, list(gathered)),
        "causal SDPA": _rotate(causal_sdpa, [inputs[:3] for inputs in sets]),
    }


def compare(shape: Shape, targets: dict[str, Target], *, backward: bool) -> Iterator[Row]:
    """Compare with the peers named in `targets`; "matrix product" is the share of its rate that is reached."""
    _checked(shape.device)
    sets = [shape.inputs() for _ in range(2)]
    peers = _peers(shape, sets, backward=backward)
    product = Product.on(shape.device)
    timed = {name: function for name, function in peers.items() if name == "ours" or name in targets}
    seconds = seconds_on(shape.device, timed | {"matrix product": product.run})
    flops = (FORWARD + BACKWARD * backward) * float(shape.slot_products)
    seconds["matrix product"] = product.limit(flops, seconds["matrix product"])
    what = "forward + backward" if backward else "forward"
    for name, (target, floor) in targets.items():
        yield Row(str(shape), f"{what}, s", seconds["ours"], name, seconds[name], target, floor=floor)


def peak(shape: Shape) -> Iterator[Row]:
    """Nothing may grow with K N D: the gathered path would hold two copies of K keys and values a group."""
    inputs = shape.inputs()
    ours = peak_bytes_on(
        shape.device, partial(differentiate, grouped_cross_attention, inputs, torch.randn_like(inputs[0]))
    )
    gathered = 4 * 2 * shape.batch * shape.groups * shape.top_k * CHUNK * shape.kv_heads * shape.size
    yield Row(str(shape), "forward + backward, peak bytes", ours, "gathered K, V", gathered, 0.125, "lower")


@case("A10", group="gca_gpu", device="cuda")
def forward() -> Iterator[Row]:
    targets: dict[str, Target] = {"matrix product": (0.32, 0.22), "gathered": (3, None)}
    yield from compare(SMALL, targets | {"SDPA, gathered before": (0.9, None)}, backward=False)


@case("A11", group="gca_gpu", device="cuda")
def forward_long() -> Iterator[Row]:
    flop_ratio = LARGE.groups * CHUNK / 2 / (LARGE.top_k * CHUNK)
    targets: dict[str, Target] = {"matrix product": (0.55, 0.38), "causal SDPA": (0.6 * flop_ratio, None)}
    yield from compare(LARGE, targets, backward=False)


@case("A12", group="gca_gpu", device="cuda")
def forward_backward() -> Iterator[Row]:
    yield from compare(SMALL, {"matrix product": (0.26, 0.16), "gathered": (2.5, None)}, backward=True)
    yield from compare(LARGE, {"matrix product": (0.42, 0.28)}, backward=True)


@case("A14", group="gca_gpu", device="cuda")
def memory() -> Iterator[Row]:
    yield from peak(replace(LARGE, top_k=32))
