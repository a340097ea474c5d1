import random

import pytest
import torch
from sentinel_cases import LAYOUTS, ONE, TWO, layout_of, random_layout, sentinels_of

from patches.sentinel import PAD, PLAIN, SLOT, Sentinels, SpanLayout


@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_layouts(name):
    case = LAYOUTS[name]
    layout = layout_of(case)
    for field in ("input_ids", "kind", "span"):
        assert getattr(layout, field).tolist() == case[field], field
    assert (layout.input_ids.dtype, layout.kind.dtype, layout.span.dtype) == (torch.int64, torch.int8, torch.int32)
    assert layout.position_ids.tolist() == case["position_ids"]
    for field in ("labels", "published_labels"):
        assert [row[1:] for row in getattr(layout, field).tolist()] == [row[1:] for row in case[field]], field
    assert layout.labels[:, 0].eq(-100).all()
    needed = layout.needed(layout.kind.shape[1] - 1)
    assert [row.nonzero().flatten().tolist() for row in needed] == case["kept"]
    assert layout.num_kept.tolist() == [len(kept) for kept in case["kept"]]
    assert layout.achieved_ratio.tolist() == pytest.approx(case["achieved_ratio"], abs=1e-6)
    if "plain_index" in case:
        assert layout.plain_index.tolist() == case["plain_index"]


@pytest.mark.parametrize("sentinels", [ONE, TWO])
def test_the_label_stream_is_the_row_without_its_first_token(sentinels):
    for seed in range(150):
        layout, rows, _ = random_layout(seed, sentinels)
        scored = layout.labels[:, 1:] != -100
        assert not (scored & (layout.kind[:, :-1] != PLAIN)).any()
        for labels, row in zip(layout.labels, rows, strict=True):
            assert labels[labels != -100].tolist() == row[1:]


@pytest.mark.parametrize("sentinels", [ONE, TWO])
def test_parsing_finds_what_was_placed(sentinels):
    for seed in range(40):
        placed, _, _ = random_layout(seed, sentinels)
        parsed = SpanLayout.from_ids(placed.input_ids, sentinels, attention_mask=placed.kind != PAD)
        assert parsed.kind.equal(placed.kind)
        assert parsed.span.equal(placed.span)


def test_padding_on_the_left_is_parsed():
    ids = torch.tensor([[0, 0, 5, 101, 6, 100, 7, 8, 101]])
    layout = SpanLayout.from_ids(ids, ONE, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]]))
    assert layout.kind.tolist() == [[-1, -1, 0, 2, 0, 1, 0, 0, 2]]
    assert layout.span.tolist() == [[0, 0, 1, 1, 0, 2, 2, 2, 2]]
    assert layout.position_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 3, 3]]
    assert layout.labels.tolist() == [[-100, -100, -100, 6, -100, 7, -100, 8, -100]]


def test_needed_follows_a_row_as_it_is_fed():
    layout = SpanLayout.from_spans([[1, 2, 3, 4, 5]], [[(1, 4)]], TWO)  # 1 [ 2 3 4 ] ] 5
    fed = [layout.needed(column)[0].nonzero().flatten().tolist() for column in range(8)]
    assert fed == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 5, 6], [0, 5, 6, 7]]


def test_order_of_spans_and_kind_of_rows_do_not_matter():
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    wanted = SpanLayout.from_spans(rows, [[(0, 2), (3, 6)], []], ONE, pad_id=9)
    given = SpanLayout.from_spans([torch.tensor(row) for row in rows], [[[3, 6], (0, 2)], ()], ONE, pad_id=9)
    assert given.input_ids.equal(wanted.input_ids) and given.span.equal(wanted.span)
    assert given.input_ids[1].tolist() == [7, 8, 9, *[9] * 7]
    assert given.to("cpu").kind.equal(wanted.kind)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 3), (2, 5)], "overlaps"),
        ([(2, 2)], "empty"),
        ([(3, 2)], "empty"),
        ([(4, 7)], "leaves"),
        ([(-1, 2)], "leaves"),
    ],
)
def test_impossible_spans_are_refused(spans, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout.from_spans([[1, 2, 3, 4, 5, 6]], [spans], ONE)


def test_rows_and_spans_must_match():
    with pytest.raises(ValueError, match="spans of 2 rows"):
        SpanLayout.from_spans([[1, 2, 3]], [[], []], ONE)
    with pytest.raises(ValueError, match="one shape"):
        SpanLayout(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 100, 2, 100, 3, 101], "inside a span"),
        ([1, 100, 2, 101, 3, 101], "close no span"),
        ([1, 101, 2, 101, 3], "close no span"),
        ([1, 100, 2, 101, 101], "in a row"),
    ],
)
def test_impossible_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout.from_ids(torch.tensor([[1, 2, 3, 4, 5, 6][: len(ids)], ids]), ONE)


def test_the_ratio_counts_slots_as_kept():
    draw = random.Random(3)
    for seed in range(20):
        sentinels = draw.choice([ONE, TWO])
        layout, rows, spans = random_layout(seed, sentinels)
        for ratio, row, own in zip(layout.achieved_ratio.tolist(), rows, spans, strict=True):
            removed = sum(end - start - sentinels.slots for start, end in own)
            assert ratio == pytest.approx(removed / len(row), abs=1e-12)


def test_sentinels_of_the_stored_cases_have_their_slots():
    for case in LAYOUTS.values():
        layout = layout_of(case)
        assert set(layout.input_ids[layout.kind == SLOT].tolist()) <= set(sentinels_of(case).slot_ids)


@pytest.mark.parametrize("arguments", [(5, ()), (5, (5,)), (5, (6, 6)), (-1, (2,))])
def test_impossible_sentinels_are_refused(arguments):
    with pytest.raises(ValueError, match="all different"):
        Sentinels(*arguments)
