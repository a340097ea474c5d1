"""Slots dropped while a query is read: eviction after the pass, dynamic eviction, calibration; token for token."""

import math
from fractions import Fraction

import pytest
import torch
from piece_models import pieces_of, text, tiny_model
from piece_reference import Reference, run_reference

from patches.parallel_context import (
    APE,
    Calibration,
    KeepPieces,
    ParallelContext,
    SelectiveAttention,
    TokenEviction,
)
from patches.parallel_context.eviction import best_slots, pool_scores

LENGTHS = (7, 4, 11, 9)
PREFIX, PIECES, QUERY = text(3, 1), pieces_of(LENGTHS, 5), text(6, 9)
OFFSET, STOP = 3, 3 + sum(LENGTHS)
STEPS = 4


def bind(**options):
    return ParallelContext(**({"prefix": None, "position_mode": "ML"} | options)).bind(tiny_model())


def generate(**options):
    with bind(**options) as pc:
        state = pc.encode(PIECES, prefix=PREFIX)
        return pc.generate(state, QUERY, max_new_tokens=STEPS, eos_token_id=None)


class Recomputed:
    """Generation by whole recomputations; ``gone[layer][row][head]`` lists the slots hidden from a query row."""

    def __init__(self, **policy):
        self.policy, self.tokens, self.gone = policy, list(QUERY), {}

    def hidden(self, layer, row, head):
        return sorted(self.gone.get((layer, row, head), ()))

    def run(self):
        calls = [len(QUERY)] + [1] * (len(self.tokens) - len(QUERY))
        reference = Reference(PREFIX, PIECES, self.tokens, "ML", calls=calls, hidden=self.hidden, **self.policy)
        logits = run_reference(tiny_model(), reference, weights=True)
        return logits, [weights[:, -len(self.tokens) :, :STOP] for weights in reference.weights]  # [H, T, N]

    def hide(self, layer, row, head, slots):
        self.gone.setdefault((layer, row, head), set()).update(slots)


def kept_slots(eviction, weights, layer):
    """What stays of the pieces in every kv head, from the weights ``[H, T, N]`` of the query pass."""
    rows = weights if eviction.method == "h2o" else weights[:, -eviction.observation :]
    summed = rows[..., OFFSET:].sum(1)
    kernel = 1 if eviction.method == "h2o" else eviction.kernel
    scores = pool_scores(summed, kernel, eviction.pool).unflatten(0, (2, 2)).mean(1)
    budget = eviction.budget(layer, 3, STOP - OFFSET)
    if eviction.method == "random":
        return eviction.choose(scores[None], budget, layer)[0]
    if eviction.method == "h2o":
        recent = budget - budget // 2
        heavy = best_slots(scores[:, :-recent], budget // 2)
        return torch.cat([heavy, torch.arange(STOP - OFFSET)[-recent:].expand(2, -1)], 1)
    return best_slots(scores, budget)


EVICTIONS = {
    "snapkv": TokenEviction(capacity=8, observation=3, kernel=3, stage="query"),
    "snapkv_all_rows": TokenEviction(capacity=5, observation=20, kernel=5, pool="mean", stage="query"),
    "h2o": TokenEviction("h2o", capacity=9, stage="query"),
    "pyramidkv": TokenEviction("pyramidkv", capacity=8, observation=2, kernel=3, beta=4, stage="query"),
    "random": TokenEviction("random", capacity=6, seed=2, stage="query"),
}
POLICIES = {"plain": {}, "top2": {"selection": SelectiveAttention(2, aggregate=("head",))}, "ape": {"ape": APE(0.7)}}


@pytest.mark.parametrize("name", EVICTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_eviction_after_the_query_pass(name, policy):
    eviction, policy = EVICTIONS[name], POLICIES[policy]
    recomputed = Recomputed(**policy)
    logits, weights = recomputed.run()
    budgets = []
    for layer in range(3):
        kept = kept_slots(eviction, weights[layer], layer)
        budgets.append(OFFSET + kept.shape[1])
        for head in range(2):
            gone = set(range(OFFSET, STOP)) - set((kept[head] + OFFSET).tolist())
            for row in range(len(QUERY), len(QUERY) + STEPS):
                recomputed.hide(layer, row, head, gone)
    for _ in range(STEPS):
        recomputed.tokens.append(int(logits[-1].argmax()))
        logits, _ = recomputed.run()
    found = generate(eviction=eviction, **policy)
    assert found.token_ids == [recomputed.tokens[len(QUERY) :]]
    assert found.live_slots == budgets


@pytest.mark.parametrize("name", ["snapkv", "snapkv_all_rows"])
def test_dynamic_eviction(name):
    base = EVICTIONS[name]
    options = {field: getattr(base, field) for field in ("capacity", "observation", "kernel", "pool")}
    eviction = TokenEviction(**options, stage="query", dynamic=True)
    recomputed = Recomputed()
    logits, weights = recomputed.run()
    live = [[(head + OFFSET).tolist() for head in kept_slots(eviction, weights[layer], layer)] for layer in range(3)]
    everything = set(range(OFFSET, STOP))
    for step in range(STEPS):
        row = len(QUERY) + step
        for layer in range(3):
            for head in range(2):
                recomputed.hide(layer, row, head, everything - set(live[layer][head]))
        recomputed.tokens.append(int(logits[-1].argmax()))
        if step == STEPS - 1:
            break
        logits, weights = recomputed.run()
        for layer in range(3):
            for head in range(2):
                slots = torch.tensor(live[layer][head])
                recent = weights[layer].unflatten(0, (2, 2))[head][:, -eviction.observation :, slots].sum(1)
                scores = pool_scores(recent, eviction.kernel, eviction.pool).mean(0)
                weakest = int(torch.sort(scores, stable=True).indices[0])
                del live[layer][head][weakest]
    found = generate(eviction=eviction)
    assert found.token_ids == [recomputed.tokens[len(QUERY) :]]
    # The last token is never read, so it drops nothing.
    assert found.live_slots == [OFFSET + eviction.capacity - (STEPS - 1)] * 3


def test_dynamic_eviction_ends_with_the_pieces():
    eviction = TokenEviction(capacity=2, observation=2, kernel=1, stage="query", dynamic=True)
    assert generate(eviction=eviction).live_slots == [OFFSET] * 3


CALIBRATIONS = {
    "sink": Calibration("sink", (1, 2), threshold=0.05, margin=20),
    "recent": Calibration("recent", (0, 1), threshold=0.04, margin=9, rows=3),
    "middle": Calibration("middle", (0, 0), threshold=0.03, margin=4, rows=0),
    "all": Calibration("all", (0, 9), threshold=0.06, rows=2),
    "quantile": Calibration("all", (0, 2), threshold=0.85, rows=2, threshold_kind="quantile"),
    "quantile_recent": Calibration("recent", (1, 1), threshold=0.5, margin=9, threshold_kind="quantile"),
}


@pytest.mark.parametrize("apply", ["pass", "cache"])
@pytest.mark.parametrize("name", CALIBRATIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_calibration(name, apply, policy):
    base, policy = CALIBRATIONS[name], POLICIES[policy]
    options = {
        field: getattr(base, field) for field in ("kind", "layers", "threshold", "rows", "margin", "threshold_kind")
    }
    calibration = Calibration(apply=apply, **options)
    recomputed = Recomputed(**policy)
    first = 0 if apply == "pass" else len(QUERY)
    lost = []
    logits, weights = recomputed.run()
    for layer in range(3):  # a layer sees what the calibrated layers below it did
        gone = 0
        if calibration.layers[0] <= layer <= calibration.layers[1]:
            rows = weights[layer][:, -calibration.rows :]
            kept = calibration.keep(rows.mean(1).unflatten(0, (2, 2)).mean(1))
            gone = STOP - kept.shape[1]
            for head in range(2):
                for row in range(first, len(QUERY) + STEPS):
                    recomputed.hide(layer, row, head, set(range(STOP)) - set(kept[head].tolist()))
            logits, weights = recomputed.run()
        lost.append(gone)
    assert any(lost)
    for _ in range(STEPS):
        recomputed.tokens.append(int(logits[-1].argmax()))
        logits, _ = recomputed.run()
    found = generate(calibration=calibration, **policy)
    assert found.token_ids == [recomputed.tokens[len(QUERY) :]]
    assert found.live_slots == [STOP - gone for gone in lost]


@pytest.mark.parametrize("count", [1, 2, 7, 30, 101])
@pytest.mark.parametrize("quantile", [0, 0.29, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["all", "sink"])
def test_quantile_of_each_head(count, quantile, kind):
    """Slot by slot: abnormal is what more than that share of the other slots of its head lies below, or equals."""
    torch.manual_seed(0)
    attention = torch.randint(0, 40, (3, count)).double() / 40  # with ties
    calibration = Calibration(kind, (0, 0), threshold=quantile, margin=5, threshold_kind="quantile")
    rank = math.floor(Fraction(str(quantile)) * (count - 1))
    found = calibration.abnormal(attention)
    for head in range(3):
        bound = sorted(attention[head].tolist())[rank]
        wanted = [bool(x > bound) and (kind == "all" or j < 5) for j, x in enumerate(attention[head])]
        assert found[head].tolist() == wanted
    assert found.sum(-1).max() <= count - 1 - rank
    scaled = calibration.abnormal(attention * torch.tensor([[1.0], [1e-3], [50.0]]))
    assert torch.equal(found, scaled)  # the size of the weights does not matter
    assert calibration.keep(attention).shape == (3, count - int(found.sum(-1).max()))


def test_calibration_changes_the_scores_of_the_pass_only_when_asked():
    with bind() as pc:
        state = pc.encode(PIECES, prefix=PREFIX)
        plain = pc.score(state, QUERY).nll
    for apply, changed in (("pass", True), ("cache", False)):
        with bind(calibration=Calibration("all", (0, 2), threshold=0.04, apply=apply)) as pc:
            difference = (pc.score(pc.encode(PIECES, prefix=PREFIX), QUERY).nll - plain).abs().max()
            assert bool(difference > 1e-3) == changed


def test_calibration_and_eviction_together():
    """Dropped slots are no candidates, and the capacity is that of the eviction."""
    options = {
        "calibration": Calibration("all", (0, 2), threshold=0.05, apply="cache"),
        "eviction": EVICTIONS["snapkv"],
    }
    found = generate(**options)
    alone = generate(calibration=options["calibration"])
    assert all(slots <= OFFSET + 8 for slots in found.live_slots)
    assert all(a <= b for a, b in zip(found.live_slots, alone.live_slots, strict=True))


BATCHED = {
    **{name: {"eviction": eviction} for name, eviction in EVICTIONS.items()},
    "dynamic": {"eviction": TokenEviction(capacity=6, observation=3, kernel=3, stage="query", dynamic=True)},
    **{name: {"calibration": calibration} for name, calibration in CALIBRATIONS.items()},
    "both": {"calibration": CALIBRATIONS["all"], "eviction": EVICTIONS["snapkv"]},
    "everything": {
        "piece_policy": KeepPieces(2),
        "selection": SelectiveAttention(1, momentum=0.3),
        "ape": APE(),
        "calibration": CALIBRATIONS["all"],
        "eviction": TokenEviction(capacity=6, observation=3, kernel=3, stage="query", dynamic=True),
    },
}


@pytest.mark.parametrize("policy", BATCHED)
def test_a_batch_is_its_rows(policy):
    batch = [pieces_of((5, 9, 7), 1), pieces_of((6,), 2), pieces_of((2, 3, 4, 5), 4)]
    queries = [text(4, 11), text(7, 12), text(1, 14)]
    options = {"prefix": "bos", "position_mode": "ML"} | BATCHED[policy]
    with ParallelContext(**options).bind(tiny_model(layers=2)) as pc:
        state = pc.encode(batch, query_ids=queries)
        before = [x.clone() for x in (*state.keys, *state.values, *state.segments)]
        found = pc.generate(state, queries, max_new_tokens=4, eos_token_id=[5, 17, 40])
        assert all(
            torch.equal(a, b) for a, b in zip(before, (*state.keys, *state.values, *state.segments), strict=True)
        )
        scored = pc.score(state, queries).nll
        for row, (pieces, query) in enumerate(zip(batch, queries, strict=True)):
            one = pc.encode(pieces, query_ids=query)
            assert (
                pc.generate(one, query, max_new_tokens=4, eos_token_id=[5, 17, 40]).token_ids[0] == found.token_ids[row]
            )
            assert (pc.score(one, query).nll[0] - scored[row, : len(query)]).abs().max() < 2e-5
