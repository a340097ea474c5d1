"""Window arithmetic against recorded numbers."""

import json
from pathlib import Path

import pytest

from datamodules.windows import validation_rows, window_start

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures/data/windows.json").read_text())


@pytest.mark.parametrize("case", FIXTURE["random_windows"], ids=lambda case: f"seed{case['seed']}-step{case['step']}")
def test_window_start_agrees_with_recorded_values(case):
    arguments = {name: value for name, value in case.items() if name != "start"}
    assert window_start(**arguments) == case["start"]


@pytest.mark.parametrize("length", [0, 101])
def test_window_start_refuses_a_window_that_does_not_fit(length):
    with pytest.raises(ValueError, match="corpus of 100"):
        window_start(0, 0, 0, num_tokens=100, length=length)


@pytest.mark.parametrize(
    "case", [case for case in FIXTURE["evaluation_windows"] if case["stride"] == case["window"]], ids=str
)
def test_validation_rows_are_the_windows_without_overlap(case):
    rows = validation_rows(case["num_tokens"], length=case["window"], batch_size=2)
    windows = [
        [start, start + row.length, start + 1]
        for row in rows
        for start in range(row.start, row.start + row.windows * row.length, row.length)
    ]
    assert windows == case["windows"]
    assert all(row.windows <= 2 for row in rows)
    assert [row.first for row in rows] == [row.start // case["window"] for row in rows]


def test_validation_rows_refuse_a_range_shorter_than_a_window():
    with pytest.raises(ValueError, match="needs 257 tokens, the validation range has 256"):
        validation_rows(256, length=256, batch_size=1)
