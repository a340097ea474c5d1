from fractions import Fraction

import pytest
import torch
from piece_models import fixture

from patches.parallel_context import positions
from patches.parallel_context.positions import POSITION_MODES, next_position

CASES = fixture("positions.json")


@pytest.mark.parametrize("case", CASES["integer"], ids=lambda case: f"{case['mode']}-{len(case['lengths'])}")
def test_stored_positions(case):
    found, following = positions(case["lengths"], case["mode"], case["offset"])
    assert [piece.tolist() for piece in found] == case["positions"]
    assert following == case["next"] and isinstance(following, int)
    assert all(piece.dtype == torch.int64 for piece in found)


@pytest.mark.parametrize("case", CASES["fractional"])
def test_stored_fractions(case):
    found, following = positions(case["lengths"], case["mode"], case["offset"], fractional=True)
    for piece, expected in zip(found, case["positions"], strict=True):
        assert piece.dtype == torch.float64
        assert (piece - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-6
    assert following == pytest.approx(case["next"], abs=1e-6) and isinstance(following, float)


@pytest.mark.parametrize("mode", [mode for mode in POSITION_MODES if mode != "order"])
def test_equal_lengths_need_no_mode(mode):
    found, following = positions([9, 9, 9], mode, 4)
    assert [piece.tolist() for piece in found] == [list(range(4, 13))] * 3 and following == 13


def test_where_binary_fractions_fail():
    found, _ = positions([52, 46], "ME", 4)
    assert found[1][23] == 30  # 4 + 23 * 52 / 46 is 30 exactly; in floating point 29.99...
    assert positions([5, 5, 5], "HE", 0)[1] == 5


@pytest.mark.parametrize("mode", POSITION_MODES)
def test_exact_rule(mode):
    lengths, offset = [7, 3, 11, 4], 2
    found, following = positions(lengths, mode, offset)
    if mode == "order":
        assert torch.cat(found).tolist() == list(range(2, 27)) and following == 27
        return
    spans = {"M": Fraction(11), "A": Fraction(25, 4), "H": 4 / sum(Fraction(1, length) for length in lengths)}
    size = spans[mode[0]]
    for piece, length in zip(found, lengths, strict=True):
        exact = {
            "L": [Fraction(offset + i) for i in range(length)],
            "R": [offset + size - length + i for i in range(length)],
            "E": [offset + i * size / length for i in range(length)],
        }[mode[1]]
        assert piece.tolist() == [int(value) for value in exact]
    assert following == int(offset + size) == next_position(lengths, mode, offset)


def test_truncation_is_toward_zero():
    found, _ = positions([9, 2], "AR", 0)  # mean 5.5: the long piece starts at -3.5
    assert found[0].tolist() == [-3, -2, -1, 0, 0, 1, 2, 3, 4]


def test_nothing_to_place():
    assert positions([], "ME", 3) == ([], 3)
    assert positions([], "order", 3, fractional=True) == ([], 3.0)


@pytest.mark.parametrize(("lengths", "mode"), [([3, 0], "ME"), ([3], "EM"), ([], "mean"), ([-1], "order")])
def test_refusals(lengths, mode):
    with pytest.raises(ValueError, match=r"at least 1 token|unknown position mode"):
        positions(lengths, mode)
