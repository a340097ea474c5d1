"""Position ids of pieces: sequential, or all pieces laid over one common span.

Notable: all arithmetic is exact. A position is an integer arithmetic progression over an integer denominator, so
binary floating point, which gets thousands of cases wrong by one, never enters.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, repeat

import torch
from torch import Tensor

POSITION_MODES = ("order", *(size + place for size in "HAM" for place in "LRE"))


def check_mode(mode: str) -> None:
    """Raise a ValueError unless ``mode`` is a position mode."""
    if mode not in POSITION_MODES:
        raise ValueError(f"unknown position mode {mode!r}, use one of {', '.join(POSITION_MODES)}")


def positions(
    lengths: Sequence[int], mode: str = "ME", offset: int = 0, *, fractional: bool = False
) -> tuple[list[Tensor], int | float]:
    """Place pieces of the given lengths after ``offset`` prefix positions.

    With S the harmonic mean (H), arithmetic mean (A) or maximum (M) of the lengths and c the offset, token i of a piece
    of length l is at ``c + i`` (L, left), ``c + S - l + i`` (R, right) or ``c + i S / l`` (E, even); the next position
    is ``c + S``. "order": sequential over all pieces. Exact rationals, truncated toward zero.

    Args:
        lengths: Tokens of each piece.
        mode: "order" or one letter of H, A, M and one of L, R, E. ML is the rule of parallel context windows.
        offset: Prefix length.
        fractional: Keep the fractions, as float64.

    Returns:
        One int64 tensor ``[l]`` per piece (float64 if fractional), and the first position after them.

    Raises:
        ValueError: On an unknown mode or a length below 1.
    """
    check_mode(mode)
    for length in lengths:
        if length < 1:
            raise ValueError(f"pieces must hold at least 1 token, got a length of {length}")
    if not lengths:
        return [], float(offset) if fractional else offset
    size = _span(lengths, mode)
    starts = accumulate(lengths, initial=offset) if mode == "order" else repeat(offset)
    pieces = [_place(length, mode[-1], start, size) for length, start in zip(lengths, starts, strict=False)]
    end = offset + size
    if fractional:
        return [_floats(*piece) for piece in pieces], float(end)
    return [_truncate(*piece) for piece in pieces], int(end)


def next_position(lengths: Sequence[int], mode: str, offset: int, *, fractional: bool = False) -> int | float:
    """Return the first position after pieces of these lengths, as `positions` does."""
    end = offset + (_span(lengths, mode) if lengths else Fraction(0))
    return float(end) if fractional else int(end)


def _span(lengths: Sequence[int], mode: str) -> Fraction:
    if mode == "order":
        return Fraction(sum(lengths))
    if mode[0] == "M":
        return Fraction(max(lengths))
    if mode[0] == "A":
        return Fraction(sum(lengths), len(lengths))
    return len(lengths) / sum((Fraction(1, length) for length in lengths), Fraction(0))


def _place(length: int, place: str, start: int, size: Fraction) -> tuple[Fraction, Fraction, int]:
    """Return the first position, the step and the number of tokens of a piece."""
    if place == "R":
        return start + size - length, Fraction(1), length
    return Fraction(start), size / length if place == "E" else Fraction(1), length


def _truncate(first: Fraction, step: Fraction, length: int) -> Tensor:
    if first.denominator == step.denominator == 1:
        return torch.arange(length) * step.numerator + first.numerator
    numerators, bottom = _numerators(first, step, length)
    # int(a / b) would round the quotient first; // floors, which is truncation for numbers of one sign.
    return torch.tensor([top // bottom if top >= 0 else -(-top // bottom) for top in numerators])


def _floats(first: Fraction, step: Fraction, length: int) -> Tensor:
    numerators, bottom = _numerators(first, step, length)
    return torch.tensor([top / bottom for top in numerators], dtype=torch.float64)


def _numerators(first: Fraction, step: Fraction, length: int) -> tuple[range, int]:
    """Return the integers over one common denominator whose quotients are ``first + i step``."""
    bottom = math.lcm(first.denominator, step.denominator)
    start, stride = int(first * bottom), int(step * bottom)
    return range(start, start + stride * length, stride), bottom
