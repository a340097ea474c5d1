"""Cases P1 to P4: pieces encoded in parallel, against full prefill and against one forward under a dense block mask.

Legend: T tokens of the context, Q query tokens, K pieces.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import allocations, check, cpu_seconds, cuda_seconds, peak_bytes_on
from benchmarks.registry import Row, case
from patches.parallel_context import ParallelContext, PieceCache, positions

VOCAB, QUERY = 512, 32


def _model(width: int, layers: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256), "head_dim": 64}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        max_position_embeddings=2**17,
        attn_implementation="sdpa",
        **(sizes | changes),
    )
    return LlamaForCausalLM(config).eval()


def _tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _full(model: LlamaForCausalLM, context: list[int], query: list[int]) -> Tensor:
    """Prefill everything by ordinary attention, then read the query behind it; returns its logits."""
    device = model.device
    output = model(torch.tensor([context], device=device), use_cache=True, logits_to_keep=1)
    if not query:
        return output.logits
    ids = torch.tensor([query], device=device)
    return model(ids, past_key_values=output.past_key_values).logits[0]


@torch.no_grad()
def _dense(model: LlamaForCausalLM, pieces: list[list[int]], query: list[int]) -> Tensor:
    """Run one forward over prefix, pieces and query under a mask of all pairs; returns the query's logits."""
    lengths = [1, *map(len, pieces), len(query)]
    segments = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])
    segments[-len(query) :] = -1
    seen = (segments == segments[:, None]) | (segments == 0) | (segments[:, None] == -1)
    seen &= torch.ones_like(seen).tril()
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)
    places, after = positions(lengths[1:-1], "ME", 1)
    where = torch.cat([torch.zeros(1, dtype=torch.int64), *places, after + torch.arange(len(query))])
    ids = torch.tensor([[1, *(token for piece in pieces for token in piece), *query]])
    options = {"attention_mask": mask[None, None], "position_ids": where[None], "use_cache": False}
    return model(ids, logits_to_keep=len(query), **options).logits[0]


def _ours(model: LlamaForCausalLM, patch: ParallelContext, pieces: list[list[int]], query: list[int]) -> Tensor | None:
    with patch.bind(model) as pc:
        state = pc.encode(pieces, prefix=[1])
        return pc.score(state, query, return_logits=True).logits[0] if query else None  # type: ignore[index]


def _checked(model: LlamaForCausalLM) -> None:
    """Compare a small problem with float64 before anything is timed."""
    exact = _model(64, 2).double()
    patch, query = ParallelContext(degree=4), _tokens(9, 1)
    pieces = patch.split(_tokens(90))
    check({"logits": _some(_ours(exact, patch, pieces, query))}, {"logits": _dense(exact, pieces, query)}, 1e-6)
    whole = _tokens(90)
    found = {"logits": _some(_ours(model, patch, [whole], query)).float()}
    check(found, {"logits": _full(model, [1, *whole], query).float()}, 1e-4 if model.dtype == torch.float32 else 3e-2)


def _some(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _flops(model: LlamaForCausalLM, lengths: list[int]) -> float:
    """Count 2 per weight and token, and both products of causal attention inside every piece."""
    weights = sum(p.numel() for p in model.model.layers.parameters())
    size = model.config.num_attention_heads * model.config.head_dim
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return 2.0 * weights * sum(lengths) + 4.0 * size * model.config.num_hidden_layers * pairs


@case("P1", group="parallel_context")
def against_full_prefill() -> Iterator[Row]:
    """Encode in parallel and prefill in full: the share of the speed-up that the FLOPs allow."""
    model, context = _model(512, 2), _tokens(4096)
    _checked(model)
    patch = ParallelContext(degree=16, micro_batch_tokens=4096)
    pieces = patch.split(context)
    functions: dict[str, Callable[[], object]] = {
        "ours": partial(_ours, model, patch, pieces, []),
        "full": partial(_full, model, context, []),
    }
    best = cpu_seconds(functions)
    bound = _flops(model, [len(context)]) / _flops(model, [len(piece) for piece in pieces])
    shape = f"{len(context)} tokens in 16 pieces, width 512, 2 layers; FLOP bound {bound:.2f}"
    target = round(0.9 * bound, 2)
    yield Row(shape, "encode, CPU s", best["ours"], "full prefill (SDPA)", best["full"], target, floor=1.0)


class _Copies(TorchDispatchMode):
    """Counts the bytes of keys and values that are copied: tensors of G heads of size D."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size, self.count = heads, size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        moved = args[1] if name == "copy_" else found
        if name in ("copy_", "clone", "cat", "stack", "gather", "index_select", "index", "_to_copy"):
            shape: tuple[int, ...] = getattr(moved, "shape", ())
            if len(shape) >= 3 and shape[-1] == self.size and shape[-3] == self.heads:
                self.count += moved.numel() * moved.element_size()
        return found


@case("P2", group="parallel_context")
def merging_caches() -> Iterator[Row]:
    """Bring the keys of all pieces into one cache: each may be copied once."""
    model, patch = _model(256, 2, num_attention_heads=4, num_key_value_heads=2), ParallelContext(degree=16)
    context = _tokens(2048)
    with patch.bind(model) as pc, _Copies(2, 64) as copies:
        state: PieceCache = pc.encode(patch.split(context))
    shape = "2048 tokens in 16 pieces, 2 layers"
    # The rotation of the keys concatenates two halves once, before they are keys of a cache.
    rotated = sum(x.nbytes for x in state.keys)
    copied, limit = copies.count - rotated, 1.05
    yield Row(shape, "bytes copied", copied, "bytes of the cache", state.num_bytes, limit, "lower", floor=limit)


@case("P3", group="parallel_context")
def bound_but_off() -> Iterator[Row]:
    """The model's own forward, eight times, inside and outside of a with block; binding is timed too."""
    model, ids = _model(256, 2), torch.tensor([_tokens(256)])

    @torch.no_grad()
    def plain() -> Tensor:
        return torch.cat([model(ids).logits for _ in range(8)])

    def bound() -> Tensor:
        with ParallelContext().bind(model):
            return plain()

    check({"logits": bound()}, {"logits": plain()}, 0.0)
    best = cpu_seconds({"bound": bound, "plain": plain}, repeats=30)
    shape = "8 x 256 tokens, width 256, 2 layers"
    yield Row(shape, "forward, CPU s", best["bound"], "plain model", best["plain"], 1.01, "lower", floor=1.05)


@case("P4", group="parallel_context")
def lengths_and_degrees() -> Iterator[Row]:
    """Encode and read a query: seconds, peak bytes and the largest tensor, over lengths and degrees."""
    model, query = _model(128, 2), _tokens(QUERY, 1)
    _checked(model)
    for length, degrees in ((1024, (4,)), (4096, (4, 32))):
        context = _tokens(length)
        for degree in degrees:
            patch = ParallelContext(degree=degree, micro_batch_tokens=1024)
            pieces = patch.split(context)
            functions: dict[str, Callable[[], object]] = {
                "ours": partial(_ours, model, patch, pieces, query),
                "full attention": partial(_full, model, [1, *context], query),
                "dense block mask": partial(_dense, model, pieces, query),
            }
            best = cpu_seconds(functions)
            memory = {name: allocations(function) for name, function in functions.items()}
            shape = f"{length} tokens in {degree} pieces, query {QUERY}, width 128, 2 layers"
            for peer in ("full attention", "dense block mask"):
                yield Row(shape, "encode + query, CPU s", best["ours"], peer, best[peer], 1.0)
                yield Row(shape, "peak bytes", memory["ours"][0], peer, memory[peer][0], 1.0, "lower")
                yield Row(shape, "largest tensor, bytes", memory["ours"][1], peer, memory[peer][1], 1.0, "lower")


@case("P5", group="parallel_context_gpu", device="cuda")
def on_a_gpu() -> Iterator[Row]:
    """Encode and score 32K tokens in 16 pieces on a GPU, bfloat16: time and peak memory against full prefill."""
    changes = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 16}
    model = _model(2048, 16, **{name: value for name, value in changes.items() if name != "num_hidden_layers"})
    model = model.to("cuda", torch.bfloat16)
    _checked(model)
    context, query = _tokens(32768), _tokens(QUERY, 1)
    patch = ParallelContext(degree=16)
    pieces = patch.split(context)
    functions: dict[str, Callable[[], object]] = {
        "ours": partial(_ours, model, patch, pieces, query),
        "full": partial(_full, model, [1, *context], query),
    }
    best = cuda_seconds(functions)
    peaks = {name: peak_bytes_on("cuda", function) for name, function in functions.items()}
    bound = _flops(model, [len(context)]) / _flops(model, [len(piece) for piece in pieces])
    shape = f"32768 tokens in 16 pieces, query {QUERY}, width 2048, 16 layers, bfloat16; FLOP bound {bound:.2f}"
    yield Row(shape, "encode + query, GPU s", best["ours"], "full prefill", best["full"], 2.0)
    yield Row(shape, "peak bytes", peaks["ours"], "full prefill", peaks["full"], 1.0, "lower")
