"""Fixtures, brute-force references and small random models shared by the tests of this folder."""

import itertools
import json
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
)

from patches.sentinel import OPEN, PAD, PLAIN, SLOT, Sentinels, SpanLayout

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "kv_compression"
VOCABULARY = 128
ONE, TWO = Sentinels(100, (101,)), Sentinels(100, (101, 102))


def stored(name: str):
    return json.loads((FIXTURES / f"{name}.json").read_text())


LAYOUTS = {case["name"]: case for case in stored("layouts")}


def sentinels_of(case: dict) -> Sentinels:
    return Sentinels(case["open_id"], tuple(case["slot_ids"]))


def layout_of(case: dict) -> SpanLayout:
    if case["constructor"] == "from_ids":
        return SpanLayout.from_ids(torch.tensor(case["input_ids"]), sentinels_of(case))
    return SpanLayout.from_spans(case["tokens"], case["spans"], sentinels_of(case), pad_id=case["pad_id"])


def mask_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[character == "1" for character in row] for row in rows])


def random_spans(draw: random.Random, num_tokens: int, slots: int = 1) -> list[tuple[int, int]]:
    """Disjoint spans longer than the slots, adjacent ones and none included."""
    spans, start = [], draw.randrange(4)
    while start + slots + 1 <= num_tokens and len(spans) < 6:
        end = min(num_tokens, start + draw.randint(slots + 1, slots + 8))
        spans.append((start, end))
        start = end + draw.choice([0, 0, 1, 3, 7])
    return spans


def random_layout(seed: int, sentinels: Sentinels = ONE, *, batch_size: int = 3, longest: int = 40):
    """A ragged layout, its rows of tokens and its spans."""
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 100) for _ in range(draw.randint(2, longest))] for _ in range(batch_size)]
    spans = [random_spans(draw, len(row), sentinels.slots) for row in rows]
    return SpanLayout.from_spans(rows, spans, sentinels), rows, spans


def brute_force_mask(kind: list[int], span: list[int]) -> torch.Tensor:
    """The sentinel rule of one row, pair by pair."""
    size = len(kind)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        mask[query, query] = True
        for key in range(query):
            own = span[query] > 0 and span[key] == span[query]
            if kind[query] == PLAIN:
                in_context = kind[key] == PLAIN and span[key] == 0
                mask[query, key] = kind[key] == SLOT or in_context or (kind[key] == PLAIN and own)
            elif kind[query] == SLOT:
                mask[query, key] = own and kind[key] in (OPEN, PLAIN, SLOT)
    return mask


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ARCHITECTURES = ("llama", "gpt_neox", "qwen2", "mistral", "opt", "phi3", "gemma3")
WINDOWED = ("mistral", "qwen2", "phi3", "gemma3")


def config_of(architecture: str, *, window: int | None = None, **changes):
    """A configuration of two layers; with a window Qwen2 and Gemma 3 get one sliding and one full layer."""
    sizes = {**SIZES, **changes}
    mixed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    plain = {"layer_types": ["full_attention"] * 2, "sliding_window": 4096}
    if architecture == "gpt_neox":
        sizes.pop("num_key_value_heads")
        return GPTNeoXConfig(**sizes, rotary_pct=0.5)
    if architecture == "opt":
        renamed = {"ffn_dim": sizes.pop("intermediate_size"), "init_std": sizes.pop("initializer_range")}
        return OPTConfig(**sizes, **renamed, word_embed_proj_dim=32, dropout=0.0)
    if architecture == "qwen2":
        options = {**mixed, "use_sliding_window": True} if window else {}
        return Qwen2Config(**sizes, **options)
    if architecture == "gemma3":
        return Gemma3TextConfig(**sizes, head_dim=8, query_pre_attn_scalar=8, **(mixed if window else plain))
    family = {"llama": LlamaConfig, "mistral": MistralConfig, "phi3": Phi3Config}[architecture]
    return family(**sizes, **({} if architecture == "llama" else {"sliding_window": window}))


def tiny_model(architecture: str, *, window: int | None = None, implementation: str = "sdpa", **changes):
    """A random model whose attention matters, in evaluation mode."""
    torch.manual_seed(1)
    config = config_of(architecture, window=window, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def brute_force_logits(model, layout: SpanLayout, window: int | None = None, *, causal: bool = False):
    """Logits of an eager model under masks made pair by pair, window included."""
    kinds, spans, positions = layout.kind.tolist(), layout.span.tolist(), layout.position_ids.tolist()
    visible = torch.stack([brute_force_mask(*row) for row in zip(kinds, spans, strict=True)])
    if causal:
        visible = torch.ones_like(visible).tril()
    near = torch.ones_like(visible)
    for row, place in enumerate(positions):
        for query, key in itertools.product(range(len(place)), repeat=2):
            near[row, query, key] = window is None or place[query] - place[key] < window

    def additive(mask):
        return torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)[:, None]

    full, sliding = additive(visible), additive(visible & near)
    types = getattr(model.config, "layer_types", None)
    mask = sliding if types is None else {"full_attention": full, "sliding_attention": sliding}
    model.set_attn_implementation("eager")
    ids = {"input_ids": layout.input_ids, "position_ids": layout.position_ids}
    return model(**ids, attention_mask=mask, use_cache=False).logits


def assert_logits_close(logits, wanted, layout: SpanLayout, tolerance: float = 1e-5):
    """Compare all columns but pads, relatively where logits exceed 1."""
    real = layout.kind != PAD
    difference = (logits - wanted)[real].abs() / wanted[real].abs().clamp(min=1)
    assert difference.max() < tolerance, difference.max()
