"""The plan of windows against its definition."""

import itertools

import pytest

from losses.base_scoring import Window, plan_windows


def test_the_example():
    assert plan_windows(32768, 8192, 6144) == [
        (0, 1, 8192),
        (6144, 8192, 14336),
        (12288, 14336, 20480),
        (18432, 20480, 26624),
        (24576, 26624, 32768),
    ]
    assert plan_windows(9, 4, 2)[1].first_target == 4 and Window._fields == ("start", "first_target", "end")


@pytest.mark.parametrize("tail", ["align", "short", "strict"])
def test_windows_follow_their_definition(tail):
    checked = 0
    for length, base, stride in itertools.product(range(2, 30), range(2, 12), range(1, 11)):
        if stride >= base:
            continue
        remainder = (length - base) % stride if length > base else 0
        if tail == "strict" and remainder:
            with pytest.raises(ValueError, match="base_stride"):
                plan_windows(length, base, stride, tail)
            continue
        windows = plan_windows(length, base, stride, tail)
        assert windows[0] == (0, 1, min(base, length))
        assert [target for _, first, end in windows for target in range(first, end)] == list(range(1, length))
        for number, (start, first, end) in enumerate(windows[1:], start=1):
            last = number == len(windows) - 1
            assert first == windows[number - 1].end and first < end
            if last and remainder:
                assert (start, end) == ((length - base, length) if tail == "align" else (number * stride, length))
            else:
                assert (start, end) == (number * stride, number * stride + base)
            assert all(base - stride <= target - start <= base - 1 for target in range(first, end))
        checked += 1
    assert checked > 400


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((1, 8, 4), "num_tokens"),
        ((20, 1, 1), "base_length"),
        ((20, 8, 0), "base_stride"),
        ((20, 8, 8), "base_stride"),
        ((20, 8, 4, "cut"), "tail"),
        ((21, 8, 4, "strict"), "base_stride"),
    ],
)
def test_impossible_plans_name_the_field(arguments, word):
    with pytest.raises(ValueError, match=word):
        plan_windows(*arguments)
