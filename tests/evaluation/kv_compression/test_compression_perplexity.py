"""Perplexity of compressed models: the stored report, loops, and targets that no method or batch changes."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from evaluation.kv_compression import compression_of, entry_bytes, perplexity
from patches.compressed_rows import METHODS
from patches.sentinel import PLAIN, SLOT, Sentinels, SpanLayout, SpanSampler, masked_forward

FIXTURES = Path(__file__).parents[2] / "fixtures" / "kv_compression"
SENTINELS = Sentinels(100, (101,))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny_llama", attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def stored():
    return json.loads((FIXTURES / "numeric.json").read_text())["perplexity"]


def blocks(number=5, size=32):
    return torch.randint(3, 100, (number, size), generator=torch.Generator().manual_seed(2))


def test_stored_report(model, stored):
    sentinels = Sentinels(stored["open_id"], tuple(stored["slot_ids"]))
    report = perplexity(model, torch.tensor(stored["blocks"]), sentinels=sentinels, spans=stored["spans"])
    numbers = [name for name in stored if name in report]
    assert len(numbers) == 9
    for name in numbers:
        exact = name.startswith("num_")
        assert report[name] == (stored[name] if exact else pytest.approx(stored[name], rel=2e-5)), name


def test_report_equals_loops(model):
    sampler = SpanSampler(0.5, max_length=6)
    report = perplexity(model, blocks(), compression_ratio=0.5, sentinels=SENTINELS, sampler=sampler, seed=3)
    inside, after, everything = [], [], []
    for number, ids in enumerate(blocks()):
        spans = sampler(32, slots=1, generator=random.Random(f"3 {number}"))
        layout = SpanLayout.from_spans(ids[None], [spans], SENTINELS)
        with torch.no_grad():
            logits = masked_forward(model, layout)[0]
        logits[:, list(SENTINELS.ids)] = -math.inf
        columns = [c for c, kind in enumerate(layout.kind[0].tolist()) if kind == PLAIN]
        for t in range(31):
            nll = -logits[columns[t]].log_softmax(-1)[ids[t + 1]].item()
            everything.append(nll)
            if any(start <= t < end for start, end in spans):
                inside.append(nll)
            if (layout.kind[0, : columns[t]] == SLOT).any():
                after.append(nll)
    for suffix, values in (("", everything), ("_in_span", inside), ("_after_span", after)):
        assert report[f"num_targets{suffix}"] == len(values)
        assert report[f"perplexity{suffix}"] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-5)
    assert 0 < len(inside) < len(everything) > len(after) > 0


@pytest.mark.parametrize("method", METHODS)
def test_targets_and_result_depend_on_no_batch(model, method):
    options = {"method": method, "compression_ratio": 0.5, "sentinels": SENTINELS}
    one, many = (perplexity(model, blocks(), batch_size=size, **options) for size in (1, 3))
    assert one["num_targets"] == many["num_targets"] == 5 * 31
    assert one["nll_sum"] == pytest.approx(many["nll_sum"], rel=1e-6)
    assert one["visible_fraction"] == pytest.approx(many["visible_fraction"])
    wanted = 0.0 if method == "dense" else 0.5
    assert one["achieved_ratio"] == pytest.approx(wanted) == pytest.approx(many["achieved_ratio"])
    assert one["cache_bytes_per_token"] == pytest.approx((1 - wanted) * 2 * 2 * 2 * 8 * 4)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_0_is_dense(model, method):
    dense, found = (
        perplexity(model, blocks(), method=name, compression_ratio=0.0, sentinels=SENTINELS)
        for name in ("dense", method)
    )
    assert found["nll_sum"] == pytest.approx(dense["nll_sum"], rel=1e-6)
    assert found["visible_fraction"] == pytest.approx(1) and found["achieved_ratio"] == 0
    assert found["perplexity_in_span"] is None


@pytest.mark.parametrize(
    ("method", "visible"),
    [
        ("local", lambda q, k: k >= int(q * 0.5)),
        ("streaming", lambda q, k: k < 4 or q - k < 13),
        ("dense", lambda q, k: True),
    ],
)
def test_visible_fraction_counts_pairs(model, method, visible):
    report = perplexity(model, blocks(2), method=method, compression_ratio=0.5)
    pairs = sum(visible(q, k) for q in range(32) for k in range(q + 1))
    assert report["visible_fraction"] == pytest.approx(pairs / (32 * 33 / 2))


def test_scattered_draws_depend_on_seed_and_block(model):
    same = torch.stack([blocks(1)[0]] * 2)
    options = {"method": "scattered", "compression_ratio": 0.5}
    pair, alone = (perplexity(model, rows, **options)["nll_sum"] for rows in (same, same[:1]))
    assert abs(pair - 2 * alone) > 1e-3
    assert abs(perplexity(model, same, seed=1, **options)["nll_sum"] - pair) > 1e-3


def test_published_variants(model):
    plain = {"sentinels": SENTINELS, "batch_size": 2}
    report = perplexity(model, blocks(), weighting="batch", **plain)
    parts = [perplexity(model, blocks()[i : i + 2], **{**plain, "seed": 0}) for i in (0,)]
    assert report["perplexity"] != pytest.approx(math.exp(report["nll_sum"] / report["num_targets"]), rel=1e-9)
    assert parts[0]["num_targets"] == 62
    loose = perplexity(model, blocks(), exclude_sentinel_logits=False, published_labels=True, **plain)
    assert loose["nll_sum"] != pytest.approx(report["nll_sum"])


def test_the_model_keeps_its_mode(model):
    model.train()
    perplexity(model, blocks(1), method="dense")
    assert model.training
    model.eval()


def test_bytes_of_an_entry():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    llama = LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=32)
    opt = OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=32)
    for config, heads in ((llama, 2), (opt, 4)):
        assert entry_bytes(AutoModelForCausalLM.from_config(config)) == 2 * 3 * heads * 8 * 4
    assert entry_bytes(AutoModelForCausalLM.from_config(llama).bfloat16()) == 2 * 3 * 2 * 8 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentinels": None}, "needs sentinels"),
        ({"published_labels": True}, "exclude_sentinel_logits=False"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"weighting": "words"}, "'words'"),
        ({"method": "streaming", "compression_ratio": 0.95}, "leaves no window beside 4 sinks"),
    ],
)
def test_refusals(model, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, blocks(), **{"sentinels": SENTINELS} | options)


def test_streaming_sees_its_share():
    assert compression_of("streaming", 0.5, 32).window_size == 13
