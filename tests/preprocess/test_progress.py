"""Lines of tokenising without a terminal: no rate before there is one, an earlier run's tokens not in it."""

import pytest

from preprocess import progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_with_the_rate_of_this_run(clock, capsys):
    with progress.TokenizeProgress("text", 4) as report:
        clock[0] += 15
        report(1, 5_000, 1)
        clock[0] += 5
        report(2, 6_000, 1)
        clock[0] += 15
        report(3, 9_000, 2)
    assert capsys.readouterr().err.splitlines() == [
        "text: 1 documents, 5,000 tokens, part 2 of 4",
        "text: 3 documents, 9,000 tokens, 200 tokens/s, part 3 of 4",
    ]


def test_what_is_counted_has_a_name(clock, capsys):
    with progress.TokenizeProgress("scores", 2, counted="splits done") as report:
        clock[0] += 15
        report(0, 100, 0)
    assert capsys.readouterr().err == "scores: 0 splits done, 100 tokens, part 1 of 2\n"
