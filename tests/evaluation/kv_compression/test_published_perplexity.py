"""The published figure: batch means of marked blocks, sentinels predicted and predicting as published."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.kv_compression.published import published_perplexity
from evaluation.kv_compression.sweep import CompressionSweep
from patches.rules import as_attention_mask, local, scattered, sentinel
from patches.sentinel import Sentinels, SpanLayout

SENTINELS = Sentinels(100, (101,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.5)).eval()


def blocks():
    ids = torch.randint(3, 100, (5, 24), generator=torch.Generator().manual_seed(1))
    ids[0, [2, 6]] = torch.tensor([100, 101])
    ids[1, [4, 20]] = torch.tensor([101, 100])  # cut at both borders
    ids[2, [2, 6, 7, 11]] = torch.tensor([100, 101, 100, 101])
    return ids


@torch.no_grad()
def by_loops(model, rules, layout, labels):
    means = []
    for first in range(0, 5, 2):
        sums = []
        for row in range(first, min(first + 2, 5)):
            places = torch.arange(24)[None]
            mask = as_attention_mask(model, rules(row), query_index=places)
            positions = layout.position_ids[row : row + 1]
            logits = model(
                input_ids=layout.input_ids[row : row + 1], attention_mask=mask, position_ids=positions, use_cache=False
            ).logits[0]
            for place in range(23):
                if labels[row, place + 1] >= 0:
                    sums.append(-float(logits[place].log_softmax(-1)[labels[row, place + 1]]))
        means.append(sum(sums) / len(sums))
    return math.exp(sum(means) / len(means))


def test_sentinel_is_that_of_loops(model):
    layout = SpanLayout.from_ids(blocks(), SENTINELS)

    def rule(row):
        part = slice(row, row + 1)
        return sentinel(SpanLayout(layout.input_ids[part], layout.kind[part], layout.span[part]))

    options = {"method": "sentinel", "compression_ratio": 0.5, "sentinels": SENTINELS, "batch_size": 2}
    found = published_perplexity(model, blocks(), **options)
    assert found["perplexity"] == pytest.approx(by_loops(model, rule, layout, layout.published_labels), rel=1e-5)
    assert found["achieved_ratio"] == pytest.approx(float(layout.achieved_ratio.mean()))
    assert published_perplexity(model, blocks(), **options | {"batch_size": 5})["perplexity"] != found["perplexity"]


def test_baselines_are_those_of_loops(model):
    keep = torch.rand(5, 24, generator=torch.Generator().manual_seed(2)) < 0.5
    layout = SpanLayout(blocks(), torch.zeros(5, 24), torch.zeros(5, 24))
    for method, rule in (("local", lambda row: local(0.5)), ("scattered", lambda row: scattered(keep[row]))):
        options = {"method": method, "compression_ratio": 0.5, "sentinels": SENTINELS, "batch_size": 2}
        found = published_perplexity(model, blocks(), **options, keep=keep if method == "scattered" else None)
        assert found["perplexity"] == pytest.approx(by_loops(model, rule, layout, layout.labels), rel=1e-5)
        assert found["num_targets"] == 5 * 23
        removed = 0.5 if method == "local" else float((~keep).float().mean())
        assert found["achieved_ratio"] == pytest.approx(removed)


def test_the_published_protocol_has_no_streaming():
    with pytest.raises(ValueError, match="leave streaming out"):
        CompressionSweep(None, protocol="published")
    with pytest.raises(ValueError, match="exact, published"):
        CompressionSweep(None, protocol="study")
