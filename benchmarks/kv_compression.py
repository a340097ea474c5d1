"""Cases K1, K3 and K4: layout and rule of rows with sentinels, decoding over a compressed cache, appending to it.

Legend: B batch, T original tokens, S columns after insertion, H kv heads, D head size.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Function, allocations, check, cpu_seconds, cuda_seconds
from benchmarks.registry import Row, case
from patches.rules import dense_mask, sentinel
from patches.sentinel import (
    OPEN,
    PLAIN,
    SLOT,
    CompressedContext,
    EvictingCache,
    Sentinels,
    SpanLayout,
    sample_spans,
)

SENTINELS = Sentinels(100, (101,))
RATIO = 0.7
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
LARGE = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}


def model_of(sizes: dict[str, int], device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Build a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, intermediate_size=2 * sizes["hidden_size"], vocab_size=1024)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def random_states(model: LlamaForCausalLM, batch_size: int, num_entries: int) -> list[tuple[Tensor, Tensor]]:
    """Draw keys and values of every layer."""
    config = model.config
    shape = (batch_size, config.num_key_value_heads, num_entries, config.head_dim)
    options = {"device": model.device, "dtype": model.dtype}
    return [(torch.randn(shape, **options), torch.randn(shape, **options)) for _ in range(config.num_hidden_layers)]


def layout_of(batch_size: int, num_tokens: int, ratio: float, **options: Any) -> SpanLayout:
    """Lay out random rows at a ratio."""
    draw = random.Random(0)
    ids = [[draw.randrange(100) for _ in range(num_tokens)] for _ in range(batch_size)]
    spans = [sample_spans(num_tokens, ratio, generator=draw, **options) for _ in range(batch_size)]
    return SpanLayout.from_spans(ids, spans, SENTINELS)


def compressed(model: LlamaForCausalLM, layout: SpanLayout) -> tuple[CompressedContext, DynamicCache]:
    """Fill a cache with random entries for a layout and evict; returns it beside a full one of the original tokens."""
    states = random_states(model, *layout.kind.shape)
    cache, full = EvictingCache(), DynamicCache()
    layout = layout.to(model.device)
    cache.append(kind=layout.kind, span=layout.span, position_ids=layout.position_ids)
    for number, (keys, values) in enumerate(states):
        cache.update(keys, values, number)
        columns = layout.plain_index[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        full.update(keys.gather(2, columns), values.gather(2, columns), number)
    del states
    cache.evict(layout.needed(layout.kind.shape[1] - 1))
    empty = torch.empty(layout.kind.shape[0], 0, device=model.device)
    return CompressedContext(cache, SENTINELS, layout.num_tokens, empty), full


def bytes_of(cache: DynamicCache) -> int:
    """Bytes of a transformers cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.no_grad()
def _decode(
    sizes: dict[str, int], device: str, batch_size: int, timer: Callable[..., dict[str, float]]
) -> Iterator[Row]:
    num_tokens, dtype = 16384, torch.float32 if device == "cpu" else torch.bfloat16
    model = model_of(sizes, device, dtype)
    context, full = compressed(model, layout_of(batch_size, num_tokens, RATIO))
    token = torch.full((batch_size, 1), 7, device=device)
    kept = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in context.cache.layers])
    wanted = model(input_ids=token, position_ids=torch.full_like(token, num_tokens), past_key_values=kept).logits
    check({"logits": context.fork().extend(model, token)}, {"logits": wanted}, 1e-5 if device == "cpu" else 2e-2)
    del kept
    share = Row(
        f"16K tokens x {batch_size}, {RATIO} removed",
        "cache bytes",
        context.cache.nbytes(),
        "full cache",
        bytes_of(full),
        1 - RATIO + 0.01,
        "lower",
        floor=1 - RATIO + 0.01,
    )
    seconds = timer(
        {
            "ours": lambda: context.extend(model, token),
            "dense": lambda: model(input_ids=token, past_key_values=full),
        }
    )
    unit = "CPU s" if device == "cpu" else "s"
    yield Row(share.shape, f"one token, {unit}", seconds["ours"], "DynamicCache", seconds["dense"], 2.0, floor=2.0)
    yield share


@case("K3", group="kv_compression")
def decode() -> Iterator[Row]:
    yield from _decode(SMALL, "cpu", 1, lambda functions: cpu_seconds(functions, 9))


@case("K3-gpu", group="kv_compression", device="cuda")
def decode_gpu() -> Iterator[Row]:
    yield from _decode(LARGE, "cuda", 32, cuda_seconds)


def _loops(ids: list[int], spans: Sequence[tuple[int, ...]]) -> Tensor:
    """Insert sentinels and apply the rule pair by pair."""
    starts, ends = ({span[side]: number + 1 for number, span in enumerate(spans)} for side in (0, 1))
    kinds, owners, inside = [], [], 0
    for place in range(len(ids) + 1):
        if place in ends:
            kinds.append(SLOT)
            owners.append(ends[place])
            inside = 0
        if place in starts:
            inside = starts[place]
            kinds.append(OPEN)
            owners.append(inside)
        if place < len(ids):
            kinds.append(PLAIN)
            owners.append(inside)
    rows = []
    for query, (kind, owner) in enumerate(zip(kinds, owners, strict=True)):
        row = [False] * len(kinds)
        row[query] = True
        for key in range(query):
            if kind == PLAIN:
                context = kinds[key] == PLAIN and owners[key] in (0, owner)
                row[key] = kinds[key] == SLOT or context
            elif kind == SLOT:
                row[key] = owners[key] == owner
        rows.append(row)
    return torch.tensor(rows)


@case("K1", group="kv_compression")
def layout_and_rule() -> Iterator[Row]:
    draw = random.Random(0)
    ids = [draw.randrange(100) for _ in range(2048)]
    spans = sample_spans(2048, 0.5, generator=draw)

    def make() -> tuple[SpanLayout, Callable[..., Tensor]]:
        layout = SpanLayout.from_spans([ids], [spans], SENTINELS)
        return layout, sentinel(layout)

    def mask() -> Tensor:
        layout, rule = make()
        return dense_mask(rule, *layout.kind.shape)

    if not mask()[0, 0].equal(_loops(ids, spans)):
        raise ArithmeticError("the rule differs from loops over pairs")
    functions: dict[str, Function] = {"layout": make, "mask": mask, "loops": lambda: _loops(ids, spans)}
    best = cpu_seconds(functions, 3)
    size = make()[0].kind.shape[1]
    shape = f"2048 tokens, {size} columns"
    yield Row(shape, "layout and rule, CPU s", best["layout"], "loops over pairs", best["loops"], 200, floor=100)
    yield Row(shape, "with the dense mask, CPU s", best["mask"], "loops over pairs", best["loops"], 25, floor=10)
    largest = allocations(make)[1]
    yield Row(shape, "largest tensor of layout and rule, bytes", largest, "S x S", size**2, 0.01, "lower", floor=0.01)


@case("K4", group="kv_compression")
@torch.no_grad()
def append() -> Iterator[Row]:
    heads, size, steps = 4, 64, 100
    new = torch.randn(1, heads, 1, size)
    row = torch.zeros(1, 1, dtype=torch.int64)

    def filled(num_entries: int) -> EvictingCache:
        cache = EvictingCache()
        states = torch.randn(1, heads, num_entries, size)
        for layer in range(2):
            cache.update(states, states, layer)
        return cache

    def extend(cache: EvictingCache, count: int) -> None:
        for _ in range(count):
            cache.append(kind=row, span=row, position_ids=row)
            for layer in range(2):
                cache.update(new, new, layer)

    def repeated(cache: EvictingCache) -> Function:
        def run() -> None:
            extend(cache, steps)

        return run

    short, long = filled(1024), filled(65536)
    extend(long, 1)
    if not long.layers[1].keys[:, :, -1:].equal(new) or long.index[0, -1] != 65536:
        raise ArithmeticError("an appended entry is not the last one")
    # Seven rounds of 100 entries stay within the slack of the long cache; the short one grows on the way.
    best = cpu_seconds({"short": repeated(short), "long": repeated(long)}, 6)
    shape = "2 layers, 4 heads x 64"
    each = {name: seconds / steps for name, seconds in best.items()}
    yield Row(shape, "append at 64K, CPU s", each["long"], "append at 1K", each["short"], 1.2, "lower", floor=1.35)
