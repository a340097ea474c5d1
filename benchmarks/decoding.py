"""Cases I1 and I2: what the cache of a small DRT holds per token, and what a long context costs a decoded token."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import check, cpu_seconds
from benchmarks.registry import Row, case
from models.drt import DRTCache, DRTConfig, DRTForCausalLM

WIDTH, CHUNK, SEGMENT, TEXT_IDS = 128, 63, 4032, 256
SHORT, LONG = 4096, 65536


def _model() -> DRTForCausalLM:
    torch.manual_seed(0)
    config = DRTConfig(
        vocab_size=264,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_attention_heads=4,
        num_lower_layers=1,
        layers_per_group=[1],
        num_encoder_layers=1,
        chunk_size=CHUNK,
        chunk_top_k=8,
        window_size=513,
        landmark_token_id=263,
        pad_token_id=257,
        bos_token_id=256,
        eos_token_id=256,
    )
    return DRTForCausalLM(config).eval()


def _tokens(count: int) -> torch.Tensor:
    return torch.randint(TEXT_IDS, (1, count), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read_segments(model: DRTForCausalLM, tokens: torch.Tensor, cache: DRTCache, segment: int = SEGMENT) -> torch.Tensor:
    """Feed tokens ``[B, T]`` in segments; returns the last logits."""
    for part in tokens.split(segment, 1):
        logits = model(input_ids=part, past_key_values=cache, logits_to_keep=1).logits
    return logits


@torch.no_grad()
def _decode(model: DRTForCausalLM, cache: DRTCache) -> torch.Tensor:
    """Decode the tokens of one chunk, one at a time: one of them completes a chunk and retrieves."""
    token = _tokens(1)
    for _ in range(CHUNK):
        token = model(input_ids=token, past_key_values=cache).logits.argmax(-1)
    return token


@case("I1", group="decoding")
def bytes_per_token() -> Iterator[Row]:
    model = _model()
    cache, held = DRTCache(model.config), []
    for count in (SHORT, 4 * SHORT):
        read_segments(model, _tokens(count - cache.get_seq_length()), cache)
        held.append(cache.nbytes())
    grown = (held[1] - held[0]) / (3 * SHORT)
    elements = 2 * model.config.num_key_value_heads * model.config.head_dim + WIDTH / 64
    shape = f"width {WIDTH}, chunks of {CHUNK}, {SHORT} to {4 * SHORT} tokens, float32"
    yield Row(shape, "cache growth, bytes per token", grown, "2 Hk D + M / 64 elements", 4 * elements, 1.02, "lower")


@case("I2", group="decoding")
def latency() -> Iterator[Row]:
    model, functions = _model(), dict[str, Callable[[], object]]()
    tokens = _tokens(200)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits[:, -1:]
    check({"logits": read_segments(model, tokens, DRTCache(model.config))}, {"logits": whole}, 1e-4)
    for count in (SHORT, LONG):
        cache = DRTCache(model.config)
        read_segments(model, _tokens(count), cache)
        functions[str(count)] = partial(_decode, model, cache)
    best = cpu_seconds(functions, repeats=8)
    ours, short = best[str(LONG)] / CHUNK, best[str(SHORT)] / CHUNK
    shape = f"width {WIDTH}, 2 layers, context of {LONG} tokens"
    yield Row(shape, "decoding, CPU s per token", ours, f"context of {SHORT}", short, 1.1, "lower")
