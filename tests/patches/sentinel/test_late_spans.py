"""Spans that are closed late and slots that are forgotten: rule, two forward passes, contexts, and the policies."""

import random

import pytest
import torch
from sentinel_cases import ONE, TWO, VOCABULARY, assert_logits_close, tiny_model

from patches.rules import dense_mask, sentinel
from patches.sentinel import OPEN, PLAIN, SLOT, SpanLayout, SpanSampler, add_sentinels, compress, recurrent_forward
from patches.sentinel.forward import masked_forward


@pytest.fixture
def llama():
    return tiny_model("llama")


ROWS = [list(range(3, 33)), list(range(40, 57))]
SPANS = [[(1, 5, 9), (5, 9, 12), (9, 12, 12), (14, 17), (18, 24, 30)], [(0, 4, 6), (4, 8, 6 + 8)]]


def late(sentinels=ONE, forget=None) -> SpanLayout:
    return SpanLayout.from_spans(ROWS, SPANS, sentinels, forget=forget)


def brute_force(layout: SpanLayout, row: int) -> torch.Tensor:
    kind, span = layout.kind[row].tolist(), layout.span[row].tolist()
    forget = 0 if layout.forget is None else int(layout.forget[row])
    size = len(kind)
    closing = {span[c]: c for c in range(size) if kind[c] == SLOT}
    mask = torch.eye(size, dtype=torch.bool)
    for query in range(size):
        closed = max((span[c] for c in range(query) if kind[c] == SLOT), default=0)
        for key in range(query):
            if kind[query] == PLAIN and kind[key] == PLAIN:
                mask[query, key] = span[key] == 0 or query < closing[span[key]]
            elif kind[query] == PLAIN and kind[key] == SLOT:
                mask[query, key] = span[key] > closed * forget // 1000
            elif kind[query] == SLOT:
                mask[query, key] = span[key] == span[query]
    return mask


@pytest.mark.parametrize("forget", [None, 0, 500, 850])
@pytest.mark.parametrize("sentinels", [ONE, TWO])
def test_the_rule_shows_a_span_until_it_is_closed_and_its_slots_until_they_are_forgotten(sentinels, forget):
    layout = late(sentinels, forget)
    mask = dense_mask(sentinel(layout), 2, layout.kind.shape[1])[:, 0]
    for row in range(2):
        assert torch.equal(mask[row], brute_force(layout, row))
    after = torch.stack([layout.needed(layout.kind.shape[1] - 1)[row] for row in range(2)])
    slots_left = {None: (5, 2), 0: (5, 2), 500: (3, 1), 850: (1, 1)}[forget]
    uncovered = (30 - 20, 17 - 8)
    assert after.sum(1).tolist() == [u + n * sentinels.slots for u, n in zip(uncovered, slots_left, strict=True)]


def test_sentinels_of_a_late_span_stand_where_it_is_closed_and_have_its_positions():
    layout = late()
    assert layout.input_ids[0, layout.plain_index[0]].tolist() == ROWS[0]
    assert [int(i) for i in layout.labels[0] if i >= 0] == ROWS[0][1:]
    closing = [(int(c), int(layout.span[0, c])) for c in (layout.kind[0] == SLOT).nonzero()[:, 0]]
    before = [int((layout.kind[0, :column] == PLAIN).sum()) for column, _ in closing]
    assert before == [9, 12, 12, 17, 30]
    assert layout.position_ids[0, [column for column, _ in closing]].tolist() == [4, 8, 11, 16, 23]
    opening = layout.position_ids[0][layout.kind[0] == OPEN].tolist()
    # That of the third span, closed at its end, stands before its tokens.
    assert opening == [0, 8, 4, 13, 17]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 4, 3)], "closes at 3"),
        ([(0, 4, 8), (4, 6, 7)], "closes at 7"),
        ([(0, 4, 31)], "closes at 31"),
    ],
)
def test_refused_closings(spans, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout.from_spans(ROWS[:1], [spans], ONE)


@torch.no_grad()
@pytest.mark.parametrize("forget", [None, 600])
@pytest.mark.parametrize("sentinels", [ONE, TWO])
def test_one_masked_pass_equals_decoding_with_eviction(llama, sentinels, forget):
    layout = late(sentinels, forget)
    masked = masked_forward(llama, layout)
    for chunk in (1, 6, 100):
        logits, cache = recurrent_forward(llama, layout, chunk_size=chunk)
        assert_logits_close(logits, masked, layout)
        assert cache.num_kept.tolist() == layout.num_kept.tolist()
        assert cache.forget is None
    other = masked_forward(llama, SpanLayout.from_spans(ROWS, [[span[:2] for span in row] for row in SPANS], sentinels))
    at = layout.plain_index[0, 6]
    assert (masked[0, at] - other[0, 8]).abs().max() > 1e-3


def test_contexts_are_compressed_alike_in_one_pass_and_in_chunks(llama):
    sampler = SpanSampler(0.7, max_length=5, policy="budget", protect_head=1)
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    one, two = (compress(llama, ids, ONE, sampler=sampler, chunk_size=size) for size in (None, 7))
    assert one.compression_ratio.tolist() == two.compression_ratio.tolist() == [0.7, 0.7]
    torch.testing.assert_close(one.next_logits, two.next_logits, rtol=1e-5, atol=1e-5)
    more = torch.randint(3, 90, (2, 3), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.extend(llama, more), two.extend(llama, more), rtol=1e-5, atol=1e-5)


def test_rows_that_forget_start_on_an_empty_cache(llama):
    _, cache = recurrent_forward(llama, late())
    with pytest.raises(ValueError, match="empty cache"):
        recurrent_forward(llama, late(forget=500), cache=cache)


@pytest.mark.parametrize("policy", ["budget", "proportional"])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_what_is_left_is_exact_and_the_past_stays_within_its_budget(policy, slots, ratio):
    sentinels = ONE if slots == 1 else TWO
    for num_tokens, length in ((256, 8), (256, 16), (131, 5), (60, 12)):
        sampler = SpanSampler(ratio, max_length=length, policy=policy, protect_head=1)
        spans = sampler(num_tokens, slots=slots, generator=random.Random(0))
        layout = SpanLayout.from_spans([[5] * num_tokens], [spans], sentinels, forget=sampler.forget(num_tokens, slots))
        left = num_tokens - int(ratio * num_tokens + 0.5)
        # One slot group more or less is what a span at the end can miss.
        assert abs(int(layout.num_kept) - left) <= slots
        seen = dense_mask(sentinel(layout), 1, layout.kind.shape[1])[0, 0].sum(1)[layout.kind[0] == PLAIN]
        budget = torch.full((num_tokens,), left)
        if policy == "proportional":
            budget = torch.tensor([token - int(token * ratio) for token in range(num_tokens)])
            budget = budget + torch.minimum(torch.tensor(length // 2), budget // 16)
        # Where the budget is small beside a span, folding waits for the span and half of the budget.
        waiting = budget // 2 + budget // 4 + length + 2 * slots + 2
        assert bool((seen - 1 <= torch.maximum(budget, waiting)).all())
        nearest = torch.minimum(torch.arange(num_tokens), budget // 2)
        assert bool((seen - 1 >= nearest).all())


def test_zero_rows_are_neutral(llama):
    sentinels = add_sentinels(llama, VOCABULARY - 8, slots=2, init="zero")
    assert not bool(llama.get_input_embeddings().weight[list(sentinels.ids)].any())
