"""Needle samples: token for token against independent fixtures, places, depths, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from datamodules.niah import NeedleTask

FIXTURES = json.loads((Path(__file__).parents[1] / "fixtures" / "data" / "needles.json").read_text(encoding="utf-8"))
TEMPLATES = FIXTURES["template_tokens"]


def words(text):
    """A tokenizer of one token per character, in a range that no value shares."""
    return [1000 + ord(letter) for letter in text]


def small_task(kind="single", **options):
    options = {"chunk_size": 16, "key_length": 3, "vocab_range": (0, 100), "pad_token_id": 999} | options
    return NeedleTask(kind, words, **options)


@pytest.mark.parametrize("case", FIXTURES["cases"], ids=lambda case: f"{case['kind']}-{case['length']}")
def test_fixtures_token_for_token(case):
    names = ("chunk_size", "key_length", "num_hops", "num_distractors", "align_question")
    task = NeedleTask(case["kind"], TEMPLATES.__getitem__, **{name: case[name] for name in names})
    rule = case["haystack"]
    haystack = (np.arange(case["length"]) * rule["multiplier"] + rule["offset"]) % rule["modulus"]
    sample = task.build(haystack, seed=case["seed"], index=case["index"], depth=case["depth"])
    assert task.room(case["length"]) == case["room"]
    for name in ("question_start", "answer_start", "answer_length", "scored_position"):
        assert getattr(sample, name) == case[name]
    assert sample.values.tolist() == case["values"] and sample.needle_spans.tolist() == case["needle_spans"]
    assert [sample.input_ids[a:b].tolist() for a, b in sample.needle_spans] == case["needle_tokens"]
    end = sample.answer_start + sample.answer_length
    assert sample.input_ids[sample.question_start : end].tolist() == case["question_and_answer_tokens"]
    factors = np.arange(end) % 997 + 1
    assert int((sample.input_ids[:end] * factors).sum()) == case["checksum"]
    assert int((sample.labels == -100).sum()) == case["num_ignored_labels"]
    again = task.assemble(haystack, np.array(case["values"]), case["positions"], case["order"])
    assert (again.input_ids == sample.input_ids).all()


@pytest.mark.parametrize("kind", ["single", "multihop", "multi"])
@pytest.mark.parametrize("align", [True, False])
def test_the_haystack_is_cut_never_overwritten(kind, align):
    task = small_task(kind, align_question=align)
    haystack = 10_000 + np.arange(800)
    sample = task.build(haystack, seed=3, index=7)
    text = [token for token in sample.input_ids.tolist() if token >= 10_000]
    assert text == list(range(10_000, 10_000 + len(text)))
    fixed = sum(stop - start for start, stop in sample.needle_spans.tolist())
    tail = int((sample.input_ids == 999).sum())
    assert len(text) == 800 - fixed - task.question_length - task.answer_length - tail
    assert tail == (15 - task.answer_length if align else 0)


@pytest.mark.parametrize("kind", ["single", "multihop", "multi"])
def test_an_aligned_question_ends_on_the_first_token_of_the_last_chunk(kind):
    sample = small_task(kind).build(np.zeros(640, np.int64), seed=1)
    assert sample.answer_start - 1 == 640 - 16
    valid = slice(0, sample.answer_start + sample.answer_length)
    assert (sample.labels[valid] == sample.input_ids[valid]).all() and sample.attention_mask[valid].all()
    assert (sample.labels[valid.stop :] == -100).all() and not sample.attention_mask[valid.stop :].any()


def test_a_sample_depends_on_seed_and_index_alone():
    task, haystack = small_task("multi"), np.arange(900) + 2000
    first = task.build(haystack, seed=5, index=11)
    copy = pickle.loads(pickle.dumps(task)).build(haystack, seed=5, index=11)
    assert (first.input_ids == copy.input_ids).all()
    assert (first.values != task.build(haystack, seed=5, index=12).values).any()
    assert (first.values != task.build(haystack, seed=6, index=11).values).any()


def test_chains_answer_the_question():
    task = small_task("multihop", num_hops=3, num_distractors=2)
    sample = task.build(np.zeros(900, np.int64), seed=2)
    values, comma = sample.values.tolist(), words(",")
    assert sample.answer.tolist() == values[1] + comma + values[2] + comma + values[3]
    links = set()
    for start, stop in sample.needle_spans.tolist():
        body = sample.input_ids[start:stop].tolist()
        links.add((tuple(body[4:7]), tuple(body[9:12])))
    expected = {(c * 4 + h, c * 4 + h + 1) for c in range(3) for h in range(3)}
    assert links == {(tuple(values[a]), tuple(values[b])) for a, b in expected}


def test_depth_is_uniform_and_a_grid_covers_the_room():
    task, haystack = small_task(), np.zeros(500, np.int64)
    room = task.room(500)
    starts = np.array([task.build(haystack, seed=0, index=i).needle_spans[0, 0] for i in range(2000)])
    counts, _ = np.histogram(starts, bins=8, range=(0, room))
    # Chi-square of 7 degrees of freedom at 0.1 %.
    assert ((counts - 250) ** 2 / 250).sum() < 24.3 and starts.max() < room
    grid = [task.build(haystack, seed=0, depth=depth).needle_spans[0, 0] for depth in (0, 0.5, 1)]
    assert grid == [0, round(0.5 * (room - 1)), room - 1]


def test_a_question_longer_than_a_chunk_pushes_the_needle_back():
    task = small_task(chunk_size=8)
    sample = task.build(np.zeros(200, np.int64), seed=0, depth=1.0)
    assert task.question_length > 8 + 2 and sample.needle_spans[0, 1] <= sample.question_start


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "double"}, "kind is one of"),
        ({"key_length": 16}, "room for chunk_size - 1 = 15"),
        ({"key_length": 0}, "key_length must be at least 1"),
        ({"num_hops": 1}, "no effect on kind=single"),
        ({"kind": "multihop", "num_hops": 0}, "num_hops must be at least 1"),
        ({"vocab_range": (5, 5)}, "vocab_range"),
    ],
)
def test_impossible_tasks_are_refused(options, sentence):
    kind = options.pop("kind", "single")
    with pytest.raises(ValueError, match=sentence):
        small_task(kind, **options)


def test_needles_that_do_not_fit_are_refused_with_the_length_they_need():
    task = small_task("multi", num_distractors=3)
    with pytest.raises(ValueError, match=r"need a length of (\d+), got 64") as caught:
        task.build(np.zeros(64, np.int64), seed=0)
    needed = int(str(caught.value).split("need a length of ")[1].split(",")[0])
    task.build(np.zeros(needed, np.int64), seed=0)
    with pytest.raises(ValueError, match="do not fit"):
        task.build(np.zeros(needed - 1, np.int64), seed=0)
    for depth in (-0.1, 1.5):
        with pytest.raises(ValueError, match="depth lies between 0 and 1"):
            small_task().build(np.zeros(300, np.int64), seed=0, depth=depth)
    with pytest.raises(ValueError, match="needs kind=single"):
        task.build(np.zeros(needed, np.int64), seed=0, depth=0.5)
