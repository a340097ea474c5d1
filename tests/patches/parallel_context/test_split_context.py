import pytest
import torch
from piece_models import fixture

from patches.parallel_context import ParallelContext, split_context


@pytest.mark.parametrize("case", fixture("split.json"), ids=lambda case: case["by"])
def test_stored_splits(case):
    options = dict(case["options"])
    if "separators" in options:
        options["separators"] = [set(group) for group in options["separators"]]
    assert split_context(case["tokens"], case["degree"], by=case["by"], **options) == case["pieces"]


@pytest.mark.parametrize("length", [1, 2, 5, 17, 64])
@pytest.mark.parametrize("degree", [1, 2, 3, 7, 64])
def test_pieces_join_to_the_input(length, degree):
    tokens = list(range(length))
    separators = [{3, 4, 11}, {0, 16}]
    for options in ({}, {"balanced": True}, {"by": "separator", "separators": separators, "guard": 0}):
        pieces = split_context(tokens, degree, **options)
        assert [token for piece in pieces for token in piece] == tokens
        assert all(pieces) and len(pieces) <= degree
    sizes = [len(piece) for piece in split_context(tokens, degree, balanced=True)]
    assert len(sizes) == min(degree, length) and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_runs_of_separators_are_not_cut():
    tokens = [5] * 10 + [1, 1, 1] + [6] * 7
    assert [len(piece) for piece in split_context(tokens, 2, by="separator", separators=[{1}])] == [13, 7]


def test_without_separators_in_reach_the_middle_is_cut():
    pieces = split_context([1, *range(2, 12)], 2, by="separator", separators=[{1}])
    assert [len(piece) for piece in pieces] == [5, 6]


def test_tensors_and_nothing():
    assert split_context(torch.arange(4), 2) == [[0, 1], [2, 3]]
    assert split_context([torch.tensor([1, 2]), [], torch.tensor([3])], 2, by="passages") == [[1, 2], [3]]
    assert split_context([], 3) == [] and split_context([[], []], 3, by="passages") == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"degree": 0}, "degree"),
        ({"by": "words"}, "unknown split"),
        ({"overlap": 3}, r"overlap must lie in \[0, size\)"),
        ({"overlap": -1}, "overlap"),
        ({"by": "separator"}, "needs separators"),
        ({"guard": -1}, "guard"),
        ({"joiner": [1]}, "by='passages'"),
        ({"separators": [{1}]}, "by='separator'"),
        ({"by": "separator", "separators": [{1}], "balanced": True}, "by='tokens'"),
        ({"overlap": 1, "balanced": True}, "cannot be combined"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        split_context(list(range(12)), **({"degree": 4} | options))


def test_the_patch_splits_as_its_options_say():
    tokens = list(range(10))
    assert [len(piece) for piece in ParallelContext(degree=4).split(tokens)] == [3, 3, 3, 1]
    assert [len(piece) for piece in ParallelContext(max_piece_tokens=4).split(tokens)] == [4, 4, 2]
    assert [len(piece) for piece in ParallelContext(degree=3, overlap=2).split(tokens)] == [4, 4, 4, 4]
    passages = ParallelContext(degree=2, split_by="passages").split([[1], [2], [3]], joiner=[9])
    assert passages == [[1, 9, 2], [3]]
    with pytest.raises(ValueError, match="max_piece_tokens"):
        ParallelContext().split(tokens)
