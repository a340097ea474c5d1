"""Decoding under the rules of baselines, and at a ratio: scores are those of a dense forward under the rule."""

import random

import pytest
import torch
from sentinel_cases import ONE, tiny_model
from transformers import LogitsProcessor

from patches.rules import as_attention_mask, causal, local, scattered_keep, streaming
from patches.sentinel import SentinelGenerator, SpanSampler, compress
from patches.sentinel.rule_generation import RuleGenerator, read_under, scattered_share, sinks_and_share

DRAW = random.Random(1)
PROMPT, FORCED = ([DRAW.randrange(3, 100) for _ in range(size)] for size in (31, 40))


class Forced(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([FORCED[len(self.seen) - 1]]), 0.0)


def decode(model, generator, prompt):
    forced = Forced()
    options = {"pad_token_id": 0, "eos_token_id": 127, "max_new_tokens": len(FORCED), "do_sample": False}
    model.generate(torch.tensor([prompt]), custom_generate=generator, logits_processor=[forced], **options)
    return torch.cat(forced.seen)


RULES = {
    "causal": causal(),
    "local": local(0.6),
    "streaming": streaming(3, 9),
    "sinks_and_share": sinks_and_share(3, 0.6),
    "scattered": scattered_share(31, 40, 0.6, generator=torch.Generator().manual_seed(2)),
}


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_scores_are_those_of_one_pass_under_the_rule(architecture, name):
    model, rule = tiny_model(architecture), RULES[name]
    context = read_under(model, torch.tensor([PROMPT[:-1]]), rule, sentinels=ONE)
    generator = RuleGenerator(rule, context=context)
    scores = decode(model, generator, PROMPT[-1:])
    ids = torch.tensor([PROMPT + FORCED[:-1]])
    places = torch.arange(ids.shape[1])[None]
    mask = as_attention_mask(model, rule, query_index=places)
    wanted = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits[
        0, len(PROMPT) - 1 :
    ]
    plain = [column for column in range(128) if column not in ONE.ids]
    assert (scores[:, plain] - wanted[:, plain]).abs().max() < 2e-5
    assert scores[:, list(ONE.ids)].eq(-torch.inf).all()
    query = torch.arange(len(PROMPT), len(PROMPT) + len(FORCED))
    seen = rule(query[:, None] * 0, query[:, None] * 0, query[:, None], torch.arange(len(PROMPT) + len(FORCED))) & (
        torch.arange(len(PROMPT) + len(FORCED)) < query[:, None]
    )
    assert generator.history == seen.sum(1).tolist()
    assert context.num_tokens.tolist() == [len(PROMPT) - 1]


def test_a_growing_window_with_sinks_shows_as_many_keys_as_local():
    query, key = torch.arange(20, 90)[:, None], torch.arange(90)
    none = torch.zeros(1, 1, dtype=torch.int64)
    one, two = (rule(none, none, query, key).sum(1) for rule in (local(0.7), sinks_and_share(4, 0.7)))
    assert one.equal(two)
    assert sinks_and_share(4, 0.7)(none, none, query, key)[:, :4].all()


def test_scattered_keeps_the_share_of_the_prefix_exactly():
    rule = scattered_share(31, 400, 0.6, generator=torch.Generator().manual_seed(2))
    none, query = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 430)
    kept = rule(none, none, query, torch.arange(430))[0]
    assert int(kept[:31].sum()) == int(scattered_keep(1, 31, 0.6, generator=random.Random(0)).sum())
    assert abs(float(kept[31:].float().mean()) - 0.4) < 0.08


@torch.no_grad()
def test_generation_at_a_ratio_folds_without_loss():
    model = tiny_model("llama")
    context = compress(model, torch.tensor([PROMPT[:-1]]), ONE, sampler=SpanSampler(0.5, max_length=9))
    generator = SentinelGenerator(
        ONE, compression_ratio=0.5, span_length=6, num_sinks=0, recent_tokens=2, context=context
    )
    decode(model, generator, PROMPT[-1:])
    shares = [int(0.5 * count + 0.5) for count in range(len(PROMPT), len(PROMPT) + len(FORCED))]
    assert all(entries <= share for entries, share in zip(generator.history, shares, strict=True))
    assert generator.num_folds > 3 and generator.num_dropped == 0
    # Nothing may be dropped at a ratio that folds of this length cannot reach: rows wait instead.
    tight = SentinelGenerator(ONE, compression_ratio=0.9, span_length=6, num_sinks=0, recent_tokens=0)
    decode(model, tight, PROMPT)
    assert tight.num_dropped == 0 and tight.num_folds >= 9
    assert max(tight.history) <= 71 // 6 + 6
    whole = SentinelGenerator(ONE, compression_ratio=0.0)
    scores = decode(model, whole, PROMPT)
    assert whole.num_folds == 0 and scores.equal(decode(model, SentinelGenerator(ONE), PROMPT))


def test_a_ratio_and_a_budget_are_one_too_many():
    with pytest.raises(ValueError, match="takes the place of a budget"):
        SentinelGenerator(ONE, budget=99, compression_ratio=0.5)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        SentinelGenerator(ONE, compression_ratio=1.0)


def test_a_context_without_sentinels_says_so(tmp_path):
    context = read_under(tiny_model("llama"), torch.tensor([PROMPT]), causal(), sentinels=None)
    with pytest.raises(ValueError, match="only a context with sentinels"):
        context.save(tmp_path / "context")
    with pytest.raises(ValueError, match="has no sentinels"):
        context.generate(None, None)
