import itertools
import math

import pytest
import torch
from piece_models import FIXTURES, fixture
from safetensors.torch import load_file

from patches.parallel_context import APE, SelectiveAttention, aggregate_scores, grouped_attention, merge_attention
from patches.parallel_context.reference import dense_grouped_attention

CASES = fixture("attention.json")
LABELS = list(CASES["options"])


def options_of(label):
    given = CASES["options"][label]
    found = {}
    if "selection" in given:
        found["selection"] = SelectiveAttention(**given["selection"])
    if "ape" in given:
        found["ape"] = APE(**given["ape"])
    return found


def close(found, expected, limit):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < limit


@pytest.mark.parametrize("name", ["attention_a", "attention_b"])
@pytest.mark.parametrize("label", LABELS)
def test_stored_cases(name, label):
    stored = load_file(FIXTURES / f"{name}.safetensors")
    for dtype, factor in ((torch.float64, 1), (torch.float32, 5)):
        inputs = [stored[part].to(dtype) for part in ("query", "key", "value")]
        found = grouped_attention(*inputs, stored["segments"], scale=CASES[name]["scale"], **options_of(label))
        assert found.output.dtype == found.entropy.dtype == dtype
        close(found.output, stored[f"{label}.output"], 1e-5 * factor)
        close(found.group_mass, stored[f"{label}.mass"], 1e-5 * factor)
        close(found.entropy, stored[f"{label}.entropy"], 4e-5 * factor)
        total = found.group_mass.sum(-1)
        if label == "soft0.5_published":
            assert (total > 1 + 1e-3).any()
        else:
            close(total, torch.ones_like(total), 1e-5)
        if label == "plain":
            close(found.lse, stored["plain.lse"], 4e-5 * factor)
            close(found.group_scores, stored["scores_top5"], 1e-5 * factor)


@pytest.mark.parametrize("name", ["attention_a", "attention_b"])
def test_stored_scores(name):
    stored = load_file(FIXTURES / f"{name}.safetensors")
    inputs = [stored[part] for part in ("query", "key", "value", "segments")]
    for label, count in (("scores_top2", 2), ("scores_mean", 0)):
        selection = SelectiveAttention(score_top_k=count)
        found = grouped_attention(*inputs, scale=CASES[name]["scale"], selection=selection)
        close(found.group_scores, stored[label], 1e-5)
    scores = stored["scores_top5"]
    close(aggregate_scores(scores, ("head", "query"), 5), stored["scores_top5_head_query"], 1e-5)
    close(aggregate_scores(scores, ("head",), 0), stored["scores_top5_head_mean"], 1e-5)


def det(a, b, *shape):
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * torch.sin(1.7 * i + b) + 0.3 * torch.cos(0.9 * i * i + b)).view(1, *shape)


def test_closed_form():
    case = fixture("closed_form.json")
    heads, kv_heads, size, tokens = (case[name] for name in ("H", "Hk", "D", "Lq"))
    segments = torch.tensor([0] * case["prefix"] + [i for i, n in enumerate(case["lens"], 1) for _ in range(n)])
    segments = torch.cat([segments, torch.full((tokens,), -1)])
    key, value = (det(1, b, kv_heads, len(segments), size) for b in (0.5, 0.9))
    inputs = (det(2, 0.1, heads, tokens, size), key, value, segments)
    plain = grouped_attention(*inputs, scale=case["scale"])
    top = grouped_attention(*inputs, scale=case["scale"], selection=SelectiveAttention(top_k=1))
    shared = aggregate_scores(plain.group_scores, ("head", "query"), 5)
    for name, found in {
        "entropy": plain.entropy,
        "out_plain": plain.output,
        "group_scores_top5": plain.group_scores,
        "aggr_head_seq_top5": shared,
        "out_hard_top1_noaggr": top.output,
    }.items():
        close(found.flatten(), torch.tensor(case[name], dtype=torch.float64), 1e-6)


def random_case(seed, *, per_head=False):
    """Odd sizes, unsorted segments, unused slots, own padding."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, kv_heads, size, tokens, context = 2, 6, 3, 5, 4, 23
    query, key, value = (
        torch.randn(batch, count, length, size, generator=generator, dtype=torch.float64) * 2
        for count, length in ((heads, tokens), (kv_heads, context + tokens), (kv_heads, context + tokens))
    )
    shape = (batch, kv_heads, context) if per_head else (batch, context)
    segments = torch.randint(-2, 5, shape, generator=generator)
    segments = torch.where(segments == -1, -2, segments)
    own = torch.full((*shape[:-1], tokens), -1)
    own[1, ..., 0] = -2
    return query, key, value, torch.cat([segments, own], -1)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("label", [*LABELS, "softcap", "shard"])
def test_agrees_with_the_dense_definition(label, per_head):
    inputs = random_case(3, per_head=per_head)
    options = {"softcap": {"softcap": 1.5}, "shard": {"own": 0}}.get(label) or options_of(label)
    found = grouped_attention(*inputs, scale=0.7, **options)
    output, lse, entropy, scores, mass = dense_grouped_attention(*inputs, scale=0.7, **options)
    close(found.output, output, 1e-10)
    close(found.entropy, entropy, 1e-10)
    close(found.group_scores, scores, 1e-10)
    close(found.group_mass, mass, 1e-10)
    if "selection" not in options and "ape" not in options:
        close(found.lse, lse, 1e-10)


def test_given_scores_replace_the_found_ones():
    query, key, value, segments = random_case(5)
    scores = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    scores[..., 2] = 1.0
    found = grouped_attention(
        query, key, value, segments, scale=0.7, selection=SelectiveAttention(top_k=1), scores=scores
    )
    only = torch.where((segments > 0) & (segments != 3), -2, segments)
    close(found.output, grouped_attention(query, key, value, only, scale=0.7).output, 1e-12)


def test_ties_keep_the_lower_piece():
    query, key, value = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 9, 9))
    key[:, :, :6] = key[:, :, :1]
    segments = torch.tensor([1, 1, 2, 2, 3, 3, -1, -1, -1])
    found = grouped_attention(query, key, value, segments, scale=1.0, selection=SelectiveAttention(top_k=1))
    assert (found.group_mass[..., 1] > 0).all() and not found.group_mass[..., 2:4].any()


def test_merging_four_shards_is_the_whole():
    query, key, value, segments = random_case(7)
    whole = grouped_attention(query, key, value, segments, scale=0.7)
    cuts, last = [0, 5, 6, 23], 23
    shards = [
        grouped_attention(query, key[:, :, a:b], value[:, :, a:b], segments[:, a:b], scale=0.7, own=0)
        for a, b in itertools.pairwise(cuts)
    ]
    shards.append(grouped_attention(query, key[:, :, last:], value[:, :, last:], segments[:, last:], scale=0.7))
    output, lse = merge_attention([part.output for part in shards], [part.lse for part in shards])
    # Row 0 of example 1 sees no own key; every shard but the last still has its context.
    close(output, whole.output, 1e-10)
    close(lse, whole.lse, 1e-10)


def test_empty_sets_merge_to_nothing():
    output, lse = merge_attention(
        [torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)], [torch.zeros(1, 1, 1), torch.full((1, 1, 1), -math.inf)]
    )
    assert output.eq(1).all() and lse.eq(0).all()
    with pytest.raises(ValueError, match="at least one"):
        merge_attention([], [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"key": torch.zeros(1, 2, 7, 5)}, "expected query"),
        ({"query": torch.zeros(1, 3, 2, 4)}, "does not fit"),
        ({"segments": torch.zeros(6, dtype=torch.long)}, "segments must be"),
        ({"segments": torch.zeros(7)}, "segments must be integers"),
        ({"own": 8}, "own must lie"),
        ({"selection": SelectiveAttention(soft_temperature=1.0), "ape": APE()}, "choose one"),
    ],
)
def test_refusals(change, sentence):
    base = {"query": torch.zeros(1, 4, 2, 4), "key": torch.zeros(1, 2, 7, 4), "value": torch.zeros(1, 2, 7, 4)}
    arguments = base | {"segments": torch.full((7,), -1), "scale": 1.0} | change
    with pytest.raises(ValueError, match=sentence):
        grouped_attention(**arguments)


def test_unknown_dimension_is_refused():
    with pytest.raises(ValueError, match="layer"):
        aggregate_scores(torch.zeros(2, 3, 4), ("layer",), 1)
