"""Pieces kept by self-information and slots kept inside each piece, against separate forwards."""

import weakref
from dataclasses import replace

import pytest
import torch
from piece_models import pieces_of, text, tiny_model
from piece_reference import Reference, run_reference

from patches.parallel_context import KeepPieces, ParallelContext, TokenEviction, piece_policy, positions
from patches.parallel_context.positions import POSITION_MODES

LENGTHS = (7, 4, 11, 9)
PREFIX, PIECES, QUERY = text(3, 1), pieces_of(LENGTHS, 5), text(6, 9)


def bind(model, **options):
    return ParallelContext(**({"prefix": None} | options)).bind(model)


def start_of(number, mode, prefix=PREFIX, lengths=LENGTHS):
    """Where the query begins that reads piece ``number`` (from 0) alone."""
    if mode == "order":
        return len(prefix) + sum(lengths[: number + 1])
    return len(prefix) + lengths[number] if mode[1] == "L" else positions(lengths, mode, len(prefix))[1]


def alone(model, number, mode):
    """One forward over prefix, one piece at its positions, and the query; returns the reference and its logits."""
    placed, _ = positions(LENGTHS, mode, len(PREFIX))
    tokens = [*PREFIX, *PIECES[number], *QUERY]
    start = start_of(number, mode)
    places = torch.cat([torch.arange(len(PREFIX)), placed[number], start + torch.arange(len(QUERY))])
    reference = Reference(PREFIX, [PIECES[number]], QUERY)
    reference.places = lambda fractional=False: places
    logits = run_reference(model, reference, whole=True)
    assert len(logits) == len(tokens)
    return reference, logits


def mean_nll(model, number, mode, count=None):
    _, logits = alone(model, number, mode)
    logits = logits[-len(QUERY) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(QUERY), reduction="none")
    return float(nll[-count:].mean() if count else nll.mean())


@pytest.mark.parametrize("mode", POSITION_MODES)
def test_scores_are_those_of_separate_forwards(mode):
    model = tiny_model("mistral_window" if mode == "MR" else "llama")
    with bind(model, position_mode=mode, piece_policy=KeepPieces(2), micro_batch_tokens=20) as pc:
        state = pc.encode(PIECES, prefix=PREFIX, query_ids=QUERY)
    expected = [mean_nll(model, number, mode) for number in range(4)]
    assert state.piece_scores[0] == pytest.approx(expected, abs=2e-5)
    best = sorted(sorted(range(4), key=lambda number: expected[number])[:2])
    assert state.source_pieces == [[number + 1 for number in best]]
    assert state.num_pieces == [2] and state.lengths == [[LENGTHS[number] for number in best]]


def mean_share(model, number, mode, count=None):
    """What the query's last tokens pay to a piece that they read alone: mean over layers, heads and tokens."""
    placed, _ = positions(LENGTHS, mode, len(PREFIX))
    start = start_of(number, mode)
    reference = Reference(PREFIX, [PIECES[number]], QUERY)
    reference.places = lambda fractional=False: torch.cat(
        [torch.arange(len(PREFIX)), placed[number], start + torch.arange(len(QUERY))]
    )
    run_reference(model, reference, weights=True)
    rows = torch.stack(reference.weights)[:, :, -min(count or 99, len(QUERY)) :]
    return float(rows[..., len(PREFIX) : len(PREFIX) + LENGTHS[number]].sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral_window", "gpt_neox"])
@pytest.mark.parametrize(("mode", "count"), [("ML", None), ("ME", 2), ("order", 9)])
def test_attention_on_pieces_is_that_of_separate_forwards(family, mode, count):
    model, policy = tiny_model(family), KeepPieces(2, score="attention", query_tokens=count)
    with bind(model, position_mode=mode, piece_policy=policy, micro_batch_tokens=20) as pc:
        state = pc.encode(PIECES, prefix=PREFIX, query_ids=QUERY)
    expected = [mean_share(model, number, mode, count) for number in range(4)]
    assert state.piece_scores[0] == pytest.approx(expected, abs=2e-5)
    best = sorted(sorted(range(4), key=lambda number: -expected[number])[:2])
    assert state.source_pieces == [[number + 1 for number in best]]
    with bind(model, position_mode=mode, piece_policy=replace(policy, order="worst")) as pc:
        worst = pc.encode(PIECES, prefix=PREFIX, query_ids=QUERY).source_pieces[0]
    assert worst == sorted({1, 2, 3, 4} - set(state.source_pieces[0]))


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        (KeepPieces(1), None),
        (KeepPieces(3, order="worst"), None),
        (KeepPieces(2, query_tokens=2), 2),
        (KeepPieces(9), None),
    ],
)
def test_the_kept_pieces_are_selected_pieces(policy, count):
    model = tiny_model()
    scores = [mean_nll(model, number, "ML", count) for number in range(4)]
    sign = -1 if policy.order == "worst" else 1
    expected = sorted(sorted(range(1, 5), key=lambda number: sign * scores[number - 1])[: policy.keep])
    with bind(model, position_mode="ML") as pc:
        whole = pc.encode(PIECES, prefix=PREFIX).select(expected)
        expected_nll = pc.score(whole, QUERY).nll
    with bind(model, position_mode="ML", piece_policy=policy, micro_batch_tokens=12) as pc:
        state = pc.encode(PIECES, prefix=PREFIX, query_ids=QUERY)
        assert state.source_pieces == [expected]
        assert torch.equal(state.positions[0], whole.positions[0])
        assert torch.equal(state.segments[2], whole.segments[2])
        assert torch.equal(state.next_position, whole.next_position)
        assert (pc.score(state, QUERY).nll - expected_nll).abs().max() < 1e-9


@pytest.mark.parametrize("score", ["nll", "attention"])
def test_ties_keep_the_earlier_piece(score):
    with bind(tiny_model(), position_mode="ML", piece_policy=KeepPieces(2, score=score)) as pc:
        state = pc.encode([PIECES[0]] * 4, query_ids=QUERY)
        assert state.source_pieces == [[1, 2]]


def test_random_pieces_need_no_query():
    with bind(tiny_model(), piece_policy=KeepPieces(2, score="random", seed=3)) as pc:
        before = torch.get_rng_state()
        first, again = pc.encode(PIECES), pc.encode(PIECES)
        assert torch.equal(before, torch.get_rng_state())
        assert first.source_pieces == again.source_pieces and first.num_pieces == [2] and first.piece_scores is None
    chosen = set()
    for seed in range(8):
        with bind(tiny_model(layers=1), piece_policy=KeepPieces(2, score="random", seed=seed)) as pc:
            chosen.add(tuple(pc.encode(PIECES).source_pieces[0]))
    assert len(chosen) > 1


def test_at_most_the_kept_pieces_are_held(monkeypatch):
    """With one piece per micro-batch no more than ``keep`` + 1 pieces are alive."""
    held, alive = [], []
    take = piece_policy._MicroBatch.take

    def watched(self, *args):
        alive.append(sum(reference() is not None for reference in held))
        found = take(self, *args)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(piece_policy._MicroBatch, "take", watched)
    with bind(tiny_model(layers=1), piece_policy=KeepPieces(1), micro_batch_tokens=1) as pc:
        pc.encode(pieces_of((4,) * 6), query_ids=QUERY)
    assert alive[0] == 0 and len(alive) == 6 and max(alive) <= 2


def test_queries_are_required():
    by_attention = KeepPieces(score="attention")
    policies = ({"piece_policy": KeepPieces()}, {"piece_policy": by_attention})
    for options in (*policies, {"eviction": TokenEviction()}, {"eviction": TokenEviction("h2o")}):
        with bind(tiny_model(), **options) as pc, pytest.raises(ValueError, match="query_ids"):
            pc.encode(PIECES)
    with bind(tiny_model(), eviction=TokenEviction(observe="piece")) as pc:
        pc.encode(PIECES)


EVICTIONS = {
    "snapkv": TokenEviction(capacity=4, observation=3, kernel=3),
    "snapkv_mean": TokenEviction(capacity=5, observation=9, kernel=5, pool="mean"),
    "h2o": TokenEviction("h2o", capacity=5),
    "pyramidkv": TokenEviction("pyramidkv", capacity=4, observation=2, kernel=3, beta=4),
    "random": TokenEviction("random", capacity=3, seed=2),
    "snapkv_piece": TokenEviction(capacity=4, observation=2, kernel=3, observe="piece"),
    "h2o_piece": TokenEviction("h2o", capacity=4, observe="piece"),
}


@pytest.mark.parametrize("name", EVICTIONS)
@pytest.mark.parametrize("mode", ["ML", "ME"])
def test_slots_of_each_piece_against_separate_forwards(name, mode):
    """What `keep` chooses from the keys and queries of separate forwards is what `encode` keeps."""
    model, eviction = tiny_model(), EVICTIONS[name]
    with bind(model, position_mode=mode) as pc:
        whole = pc.encode(PIECES, prefix=PREFIX)
    with bind(model, position_mode=mode, eviction=eviction, micro_batch_tokens=25) as pc:
        state = pc.encode(PIECES, prefix=PREFIX, query_ids=None if eviction.observe == "piece" else QUERY)
    offset, kept = len(PREFIX), [[] for _ in range(3)]
    for number, length in enumerate(LENGTHS):
        reference, _ = alone(model, number, mode)
        for layer in range(3):
            query, key = reference.queries[layer], reference.keys[layer]
            stop = key.shape[2] if eviction.observe == "query" else offset + length
            first = stop - (len(QUERY) if eviction.observe == "query" else length)
            span = {"start": offset, "stop": offset + length, "layer": layer, "num_layers": 3}
            slots = eviction.keep(query[:, :, first:stop], key[:, :, :stop], scale=8**-0.5, **span)
            kept[layer].append(slots + sum(LENGTHS[:number]))
    prefix = torch.arange(offset).expand(1, 2, -1)
    expected = whole.evict([torch.cat([prefix, *slots], -1) for slots in kept])
    for found, wanted in zip(state.keys, expected.keys, strict=True):
        assert found.shape == wanted.shape and (found - wanted).abs().max() < 2e-5
    assert all(torch.equal(a, b) for a, b in zip(state.positions, expected.positions, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state.segments, expected.segments, strict=True))


@pytest.mark.parametrize("family", ["gemma2", "mistral_window", "gpt_neox"])
def test_eviction_in_other_families(family):
    """Windows and soft-capping count: the scores are attention weights of the model."""
    model = tiny_model(family)
    eviction = TokenEviction(capacity=4, observation=4, kernel=1)
    with bind(model, position_mode="ML", eviction=eviction) as pc:
        state = pc.encode([PIECES[2]], prefix=PREFIX, query_ids=QUERY)
    reference = Reference(PREFIX, [PIECES[2]], QUERY, "ML", num_heads=state.keys[0].shape[1])
    run_reference(model, reference, weights=True)
    for layer, weights in enumerate(reference.weights):
        inside = weights[:, -4:, 3:14].sum(1).unflatten(0, (state.keys[0].shape[1], -1)).mean(1)
        chosen = torch.sort(inside, dim=-1, descending=True, stable=True).indices[:, :4].sort(-1).values
        assert torch.equal(state.positions[layer][0, :, 3:], chosen + 3)


def test_large_capacity_changes_nothing():
    with bind(tiny_model()) as pc:
        expected = pc.score(pc.encode(PIECES, prefix=PREFIX), QUERY).nll
    for stage in ("piece", "query"):
        with bind(tiny_model(), eviction=TokenEviction(capacity=31, stage=stage)) as pc:
            state = pc.encode(PIECES, prefix=PREFIX, query_ids=QUERY)
            assert (pc.score(state, QUERY).nll - expected).abs().max() < 1e-9
            assert state.keys[0].shape[2] == 34


POLICIES = {
    "keep": {"piece_policy": KeepPieces(2)},
    "keep_attention": {"piece_policy": KeepPieces(2, score="attention", query_tokens=2)},
    "keep_attention_evict": {
        "piece_policy": KeepPieces(2, score="attention"),
        "eviction": TokenEviction(capacity=3, observation=2, kernel=3),
    },
    "keep_random": {"piece_policy": KeepPieces(2, score="random")},
    "keep_evict": {"piece_policy": KeepPieces(2), "eviction": TokenEviction(capacity=3, observation=2, kernel=3)},
    **{name: {"eviction": eviction} for name, eviction in EVICTIONS.items()},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_is_its_rows(policy):
    batch = [pieces_of((5, 9, 7), 1), pieces_of((6,), 2), pieces_of((2, 3, 4, 5), 4)]
    queries = [text(4, 11), text(7, 12), text(1, 14)]
    with bind(tiny_model(layers=2), micro_batch_tokens=18, prefix="bos", **POLICIES[policy]) as pc:
        state = pc.encode(batch, query_ids=queries)
        found = pc.score(state, queries).nll
        tokens = pc.generate(state, queries, max_new_tokens=3).token_ids
        for row, (pieces, query) in enumerate(zip(batch, queries, strict=True)):
            one = pc.encode(pieces, query_ids=query)
            assert (pc.score(one, query).nll[0] - found[row, : len(query)]).abs().max() < 2e-5
            assert pc.generate(one, query, max_new_tokens=3).token_ids[0] == tokens[row]
            assert one.source_pieces[0] == state.source_pieces[row]
