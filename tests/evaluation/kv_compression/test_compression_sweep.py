"""The sweep: all cells once, the dense one shared, missing ones only on resume, foreign ones refused."""

import csv
import math
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.kv_compression.figure import compression_curves, save_compression_figure, save_generation_figure
from evaluation.kv_compression.sweep import COLUMNS, CompressionSweep, markdown_table
from patches.sentinel import Sentinels, SpanSampler


class FakeCells:
    """Cells without training: a random model for each seed."""

    sentinels, num_sinks = Sentinels(100, (101,)), 4

    def __init__(self, text=0):
        self.text, self.trained = text, []

    def blocks(self):
        return torch.randint(3, 100, (3, 32), generator=torch.Generator().manual_seed(self.text))

    def sampler(self, compression_ratio):
        return SpanSampler(compression_ratio)

    def spans(self, blocks, compression_ratio, seed):
        return None

    def check(self, method, compression_ratio):
        if compression_ratio > 0.96:
            raise ValueError("out of reach")

    def identity(self):
        return {"text": self.text}

    def train(self, method, compression_ratio, seed):
        self.trained.append((method, compression_ratio, seed))
        torch.manual_seed(seed)
        sizes = {"vocab_size": 128, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def sweep(cells, **options):
    return CompressionSweep(
        cells, **{"ratios": [0.5, 0.0], "methods": ["sentinel", "local"], "seeds": [0, 1]} | options
    )


def test_all_cells_and_files(tmp_path):
    cells = FakeCells()
    result = sweep(cells, reference={"published": [[0.0, 10.0], [0.5, 12.0]]}).run(tmp_path)
    wanted = [(m, r, s) for s in (0, 1) for m, r in (("dense", 0.0), ("sentinel", 0.5), ("local", 0.5))]
    assert cells.trained == wanted
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 6
    assert {row["num_targets"] for row in rows} == {"93"}
    assert [float(row["achieved_ratio"]) for row in rows] == pytest.approx([0.0, 0.5, 0.5] * 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "cells",
        "figure.png",
        "figure.svg",
        "metrics.json",
        "table.csv",
        "table.md",
    }
    assert len((tmp_path / "table.md").read_text().splitlines()) == 8
    assert "sentinel" in result["table"]
    assert re.search(r"<svg", (tmp_path / "figure.svg").read_text())


def test_resume_computes_what_is_missing_and_changes_nothing(tmp_path):
    first = {"seeds": [1], "ratios": [0.5]}
    sweep(FakeCells(), **first).run(tmp_path)
    table = (tmp_path / "table.csv").read_text().splitlines()
    (tmp_path / "cells" / "local_0.5_1.json").unlink()
    cells = FakeCells()
    sweep(cells, **first).run(tmp_path)
    assert cells.trained == [("local", 0.5, 1)]
    again = (tmp_path / "table.csv").read_text().splitlines()
    assert again[:-1] == table[:-1] and again[-1].rsplit(",", 1)[0] == table[-1].rsplit(",", 1)[0]
    more = FakeCells()
    sweep(more, seeds=[1]).run(tmp_path)
    assert more.trained == [("dense", 0.0, 1)]


def test_cells_of_other_options_are_refused(tmp_path):
    dense = {"ratios": [0.0], "seeds": [0]}
    sweep(FakeCells(), **dense).run(tmp_path)
    with pytest.raises(ValueError, match=r"dense_0\.0_0\.json was made with other options"):
        sweep(FakeCells(text=1), **dense).run(tmp_path)


def test_an_impossible_ratio_is_refused_before_anything_is_trained(tmp_path):
    cells = FakeCells()
    with pytest.raises(ValueError, match="leaves no window"):
        sweep(cells, methods=["streaming"], ratios=[0.0, 0.95]).run(tmp_path)
    assert not cells.trained


def test_a_cell_that_cannot_be_is_refused_before_anything_is_trained(tmp_path):
    cells = FakeCells()
    with pytest.raises(ValueError, match="out of reach"):
        sweep(cells, ratios=[0.0, 0.97]).run(tmp_path)
    assert not cells.trained


def test_curves_are_means_over_seeds_and_start_dense():
    rows = [
        {"method": "dense", "nominal_ratio": 0.0, "achieved_ratio": 0.0, "perplexity": 8.0},
        {"method": "local", "nominal_ratio": 0.5, "achieved_ratio": 0.4, "perplexity": 9.0},
        {"method": "local", "nominal_ratio": 0.5, "achieved_ratio": 0.5, "perplexity": 11.0},
    ]
    assert compression_curves(rows) == {"local": [(0.0, 8.0, 0.0), (pytest.approx(0.45), 10.0, 0.5)]}
    assert compression_curves(rows[:1]) == {"dense": [(0.0, 8.0, 0.0)]}
    assert markdown_table(rows[:1], ("method", "perplexity", "seed")).splitlines()[2] == "| dense | 8.0000 |  |"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": []}, "at least one entry"),
        ({"ratios": [0.5, 0.5]}, "ratios must differ"),
        ({"ratios": [1.0]}, r"in \[0, 1\)"),
        ({"methods": ["dense"]}, "dense is ratio 0"),
        ({"methods": ["global"]}, "global"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        sweep(FakeCells(), **options)


@pytest.mark.parametrize("broken", ["local", "dense"])
def test_infinite_perplexities_are_named_and_not_drawn(broken, tmp_path):
    cells = (("dense", 0.0), ("local", 0.5), ("local", 0.9), ("sentinel", 0.5))
    rows = [
        {"method": method, "nominal_ratio": ratio, "achieved_ratio": ratio, "perplexity": 20.0, "rougeL": 0.5}
        for method, ratio in cells
    ]
    for row in rows:
        if row["method"] == broken and row["nominal_ratio"] in (0.0, 0.9):
            row["perplexity"] = row["judge_perplexity_mean_text"] = math.inf
    save_compression_figure(rows, tmp_path, reference={})
    at = {"local": "0.9", "dense": "0.0"}[broken]
    drawn = (tmp_path / "figure.svg").read_text()
    assert f"local (infinite at {at})" in drawn and (broken == "dense") == ("sentinel (infinite" in drawn)
    save_generation_figure([{"judge_perplexity_mean_text": 3.0} | row for row in rows], tmp_path)
    assert f"local (infinite at {at})" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize(("worst", "wide"), [(77.0, False), (160.0, True)])
def test_losses_of_one_size_are_drawn_on_a_linear_scale(tmp_path, worst, wide):
    rows = [
        {"method": method, "nominal_ratio": ratio, "achieved_ratio": ratio, "perplexity": perplexity}
        for method, ratio, perplexity in (("dense", 0.0, 70.0), ("local", 0.5, 76.0), ("local", 0.9, worst))
    ]
    save_compression_figure(rows, tmp_path, reference={})
    assert ("linear within 0.001" in (tmp_path / "figure.svg").read_text()) is wide
