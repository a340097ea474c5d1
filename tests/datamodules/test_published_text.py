"""Marked text against the stored draws, and the batches of the published protocol."""

import json
import random
from pathlib import Path

import pytest
import torch

from datamodules.published_text import (
    PublishedDataModule,
    bernoulli_keep,
    cut_blocks,
    mark_and_tokenize,
    with_marks,
)
from patches.sentinel import SLOT, Sentinels, SpanLayout
from patches.sentinel.layout import IGNORED
from preprocess.tokenizers import load_tokenizer

STORED = json.loads((Path(__file__).parents[1] / "fixtures/kv_compression/published_sampler.json").read_text())
DRAW = random.Random(3)
ROWS = [" ".join("".join(DRAW.choices("abcdef", k=4)) for _ in range(60)) + " \n" for _ in range(30)]


@pytest.fixture(scope="module")
def marked():
    return with_marks(load_tokenizer("bytes"))


def test_marks_are_tokens_after_those_of_the_tokenizer(marked):
    tokenizer, sentinels = marked
    assert sentinels == Sentinels(259, (260,))
    assert tokenizer("a <CL> b").input_ids == [97, 32, 259, 32, 98]


def test_stored_marking(marked):
    case, (tokenizer, _) = STORED["marked"], marked
    options = {"compression_ratio": case["compression_ratio"], "max_length": case["max_length"], "seed": case["seed"]}
    text = mark_and_tokenize(case["texts"], tokenizer, **options)
    assert text.rows == [tokenizer(row).input_ids for row in case["marked"]]


def test_counts(marked):
    text = mark_and_tokenize(ROWS, marked[0], compression_ratio=0.5)
    report = text.report
    assert report["num_words"] == sum(len(row.split(" ")) for row in ROWS) == 30 * 61
    assert report["plain_tokens"] == sum(map(len, ROWS))
    # Each mark brings a blank of its own.
    assert (
        report["extra_tokens"] == report["num_sentinels"] == sum(row.count(259) + row.count(260) for row in text.rows)
    )
    assert 0.3 < report["true_ratio_words"] < 0.5
    plain = mark_and_tokenize(ROWS, marked[0], compression_ratio=0.0).report
    assert plain["removed_words"] == plain["num_sentinels"] == plain["extra_tokens"] == 0


def test_blocks_end_with_a_thousand_rows():
    rows = [[number] * 3 for number in range(1002)]
    blocks = cut_blocks(rows, 100)
    assert blocks.shape == (30, 100) and blocks[-1, -1] == 999
    assert cut_blocks(rows, 5).shape == (601, 5) and cut_blocks(rows, 5)[600].tolist() == [1000] * 3 + [1001] * 2
    with pytest.raises(ValueError, match="shorter than one block"):
        cut_blocks(rows[:3], 10)


@pytest.mark.parametrize("method", ["sentinel", "scattered", "local"])
def test_batches_announce_the_targets_of_their_step(method, marked):
    tokenizer, sentinels = marked
    rows = mark_and_tokenize(ROWS, tokenizer, compression_ratio=0.5 if method == "sentinel" else 0.0).rows
    blocks = cut_blocks(rows, 64)
    options = {"method": method, "sentinels": sentinels, "compression_ratio": 0.5}
    sizes = {"batch_size": 2, "max_steps": 3, "accumulate_grad_batches": 2}
    batches = list(PublishedDataModule(blocks, **options, **sizes).train_dataloader())
    assert len(batches) == 6
    for first in range(0, 6, 2):
        step, targets = batches[first : first + 2], 0
        for batch in step:
            layout = SpanLayout.from_ids(batch["input_ids"], sentinels)
            targets += int((layout.published_labels[:, 1:] != IGNORED).sum()) if method == "sentinel" else 2 * 63
            assert ("kind" in batch) == (method == "sentinel") and ("keep" in batch) == (method == "scattered")
        assert [int(batch["num_step_targets"]) for batch in step] == [targets] * 2
    if method == "sentinel":
        assert (batches[0]["kind"] == SLOT).any()
    again = list(PublishedDataModule(blocks, **options, **sizes).train_dataloader())
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again, strict=True))


def test_scattered_keeps_a_share_by_chance():
    keep = bernoulli_keep(50, 64, 0.3, seed=1)
    assert keep.equal(bernoulli_keep(50, 64, 0.3, seed=1)) and abs(keep.float().mean() - 0.7) < 0.03
    assert keep.sum(1).unique().numel() > 3
