"""Whole models under every policy of the query, against the definition; batches; generation token by token."""

import pytest
import torch
from piece_models import pieces_of, text, tiny_model
from piece_reference import Reference, run_reference

from patches.parallel_context import APE, ParallelContext, SelectiveAttention

POLICIES = {
    "plain": {},
    "top1": {"selection": SelectiveAttention(top_k=1)},
    "top2_mean": {"selection": SelectiveAttention(top_k=2, score_top_k=0)},
    "top2_head": {"selection": SelectiveAttention(top_k=2, aggregate=("head",))},
    "top1_query": {"selection": SelectiveAttention(top_k=1, aggregate=("query",), aggregate_top_k=2)},
    "top1_head_query": {"selection": SelectiveAttention(top_k=1, aggregate=("head", "query"), aggregate_top_k=0)},
    "top1_two_pass": {"selection": SelectiveAttention(top_k=1, two_pass=True)},
    "top2_layer": {"selection": SelectiveAttention(top_k=2, aggregate=("layer", "head"), two_pass=True)},
    "top1_momentum": {"selection": SelectiveAttention(top_k=1, momentum=0.6)},
    "top1_query_momentum": {"selection": SelectiveAttention(top_k=1, aggregate=("head", "query"), momentum=0.5)},
    "soft": {"selection": SelectiveAttention(soft_temperature=0.5)},
    "soft_head": {"selection": SelectiveAttention(soft_temperature=0.3, aggregate=("head",))},
    "soft_published": {"selection": SelectiveAttention(soft_temperature=0.7, soft_mass="published")},
    "ape": {"ape": APE()},
    "ape_strong": {"ape": APE(temperature=0.5, scale=1.2)},
    "top1_ape": {"selection": SelectiveAttention(top_k=1), "ape": APE(0.8, 0.9)},
}
LENGTHS = (7, 4, 7, 9)


def close(found, expected, limit=2e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < limit


def bind(model, **options):
    return ParallelContext(**({"prefix": None} | options)).bind(model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window"])
def test_policies_agree_with_the_definition(policy, family):
    model, options = tiny_model(family), POLICIES[policy]
    reference = Reference(text(3, 1), pieces_of(LENGTHS), text(5, 9), "ML", **options)
    expected = run_reference(model, reference)
    with bind(model, position_mode="ML", **options) as pc:
        state = pc.encode(reference.pieces, prefix=reference.prefix)
        meters = ("entropy", "mass", "group_scores", "mass_per_token")
        found = pc.score(state, reference.query, return_logits=True, meters=meters)
    close(found.logits[0], expected)
    close(found.meters["entropy"][:, 0], torch.stack(reference.entropy), 5e-5)
    close(found.meters["mass_per_token"][:, 0], torch.stack(reference.mass), 5e-5)
    close(found.meters["mass"][:, 0], torch.stack(reference.mass).mean(2), 5e-5)
    close(found.meters["group_scores"][:, 0], torch.stack(reference.scores), 5e-5)
    total = found.meters["mass_per_token"].sum(-1)
    if policy != "soft_published":
        close(total, torch.ones_like(total), 1e-9)


@pytest.mark.parametrize("implementation", ["grouped", "eager"])
def test_policies_without_meters(implementation):
    model = tiny_model()
    for policy in ("plain", "top1", "ape", "soft"):
        reference = Reference(text(3, 1), pieces_of(LENGTHS), text(5, 9), "ME", **POLICIES[policy])
        expected = run_reference(model, reference)
        with bind(model, implementation=implementation, **POLICIES[policy]) as pc:
            state = pc.encode(reference.pieces, prefix=reference.prefix)
            close(pc.score(state, reference.query, return_logits=True).logits[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"selection": SelectiveAttention(top_k=4)},
        {"selection": SelectiveAttention(top_k=9)},
        {"ape": APE(temperature=1.0, scale=1.0)},
    ],
)
def test_policies_that_change_nothing(options):
    model, query = tiny_model("gemma3"), text(5, 9)
    logits = []
    for chosen in ({}, options):
        with bind(model, **chosen) as pc:
            state = pc.encode(pieces_of(LENGTHS), prefix=text(2, 1))
            logits.append(pc.score(state, query, return_logits=True).logits)
    close(*logits, 1e-9)


BATCH = [pieces_of((5, 9, 7), 1), pieces_of((11,), 3), pieces_of((2, 3, 4, 5), 4)]
QUERIES = [text(4, 11), text(7, 12), text(1, 14)]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_is_its_rows(policy):
    model = tiny_model("gemma3" if policy in ("plain", "top1", "soft") else "llama", layers=2)
    options = {"micro_batch_tokens": 20, "prefix": "bos"} | POLICIES[policy]
    meters = ("entropy", "mass")
    with bind(model, **options) as pc:
        state = pc.encode(BATCH)
        scored = pc.score(state, QUERIES, meters=meters)
        generated = pc.generate(state, QUERIES, max_new_tokens=4, eos_token_id=[5, 17, 40], meters=meters)
        for row, (pieces, query) in enumerate(zip(BATCH, QUERIES, strict=True)):
            alone = pc.encode(pieces)
            expected = pc.score(alone, query, meters=meters)
            close(scored.nll[row, : len(query)], expected.nll[0])
            assert not scored.nll[row, len(query) :].any() and not scored.mask[row, len(query) - 1 :].any()
            close(scored.meters["entropy"][:, row, :, : len(query)], expected.meters["entropy"][:, 0], 5e-5)
            assert scored.meters["entropy"][:, row, :, len(query) :].isnan().all()
            groups = [*range(len(pieces) + 1), -1]
            close(scored.meters["mass"][:, row][..., groups], expected.meters["mass"][:, 0], 5e-5)
            one = pc.generate(alone, query, max_new_tokens=4, eos_token_id=[5, 17, 40], meters=meters)
            assert generated.token_ids[row] == one.token_ids[0]
            close(generated.meters["mass"][:, row][..., groups], one.meters["mass"][:, 0], 5e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_generation_is_recomputation(policy):
    model, options = tiny_model(layers=2), POLICIES[policy]
    prefix, pieces, query = text(2, 1), pieces_of((5, 9, 7), 6), text(4, 9)
    with bind(model, **options) as pc:
        state = pc.encode(pieces, prefix=prefix)
        found = pc.generate(state, query, max_new_tokens=4, eos_token_id=None, meters=["entropy"])
    tokens = list(query)
    for step in range(4):
        calls = [len(query)] + [1] * step
        reference = Reference(prefix, pieces, tokens, "ME", calls=calls, **options)
        tokens = [*tokens, int(run_reference(model, reference)[-1].argmax())]
    assert found.token_ids == [tokens[len(query) :]]
    # The last token is never read.
    close(found.meters["entropy"][:, 0], torch.stack(reference.entropy), 5e-5)
