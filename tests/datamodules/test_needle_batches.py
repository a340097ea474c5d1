"""Needle batches: pure functions of their number, whatever workers, ranks and curriculum; resume; what counts."""

import numpy as np
import pytest
import torch

from datamodules.corpus import open_split
from datamodules.loading import Share, TrainingPlan
from datamodules.needle_batches import NeedleBatches, NeedlePlan, Stage
from datamodules.needle_task import corpus_needle_task, text_range
from datamodules.needles import NeedleDataModule

DIGITS = [48, 58]


def module(corpus, **options):
    defaults = {"context_length": 256, "batch_size": 2, "max_steps": 6, "chunk_size": 16, "pad_token_id": 257}
    return NeedleDataModule(corpus, **defaults | {"vocab_range": DIGITS, "eval_samples": 3} | options)


def needles(corpus, **options):
    return NeedlePlan(corpus_needle_task(corpus, "single", chunk_size=16, pad_token_id=257), **options)


def test_batches_hold_needle_question_and_answer(tiny_corpus):
    data = module(tiny_corpus)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    text = bytes(batch["input_ids"][0, :-10].clamp_max(255).tolist()).decode("utf-8", errors="replace")
    before, _, answer = text.partition("|What is the passkey? The passkey is")
    assert f"|The passkey is:{answer[:5]}|" in before and answer[:5].isdigit()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] == batch["input_ids"])[batch["attention_mask"] == 1].all()


def test_loss_on_the_answer_leaves_its_targets_alone(tiny_corpus):
    plain, answer = module(tiny_corpus), module(tiny_corpus, loss_on="answer")
    batches = []
    for data in (plain, answer):
        data.setup("fit")
        batches.append(next(iter(data.train_dataloader())))
    assert (batches[0]["input_ids"] == batches[1]["input_ids"]).all()
    counted = batches[1]["labels"] != -100
    assert counted.sum(1).tolist() == [5, 5]
    assert (batches[1]["labels"][counted] == batches[0]["labels"][counted]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_and_a_later_start_change_nothing(tiny_corpus, num_workers):
    data = module(tiny_corpus, depths=[0.0, 0.5, 1.0])
    data.setup("fit")
    whole = [batch["input_ids"] for batch in data.train_dataloader()]
    late = module(tiny_corpus, depths=[0.0, 0.5, 1.0], num_workers=num_workers)
    late.load_state_dict(data.state_dict() | {"step": 4})
    rest = [batch["input_ids"] for batch in late.train_dataloader()]
    assert len(whole) == 6 and len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


def test_ranks_share_the_samples_of_a_step(tiny_corpus):
    corpus, plan = open_split(tiny_corpus, "train"), TrainingPlan(256, 4, 0, 2, 1)
    alone = NeedleBatches(corpus, plan, needles(tiny_corpus), share=Share())[1]
    half = TrainingPlan(256, 2, 0, 2, 1)
    parts = [NeedleBatches(corpus, half, needles(tiny_corpus), share=Share(rank, 2))[1] for rank in (0, 1)]
    assert torch.equal(alone["input_ids"], torch.cat([part["input_ids"] for part in parts]))
    assert alone["sample_index"].tolist() == [4, 5, 6, 7]


def test_the_curriculum_fills_batches_with_shorter_windows(tiny_corpus):
    plan = needles(tiny_corpus, curriculum=[Stage(0, 112), Stage(1, 128), Stage(3, 256)])
    plan.check(256)
    batches = NeedleBatches(open_split(tiny_corpus, "train"), TrainingPlan(256, 2, 0, 4, 1), plan, share=Share())
    shapes = [tuple(batches[step]["input_ids"].shape) for step in range(4)]
    assert shapes == [(4, 112), (4, 128), (4, 128), (2, 256)]
    numbers = [number for step in range(4) for number in batches[step]["sample_index"].tolist()]
    assert len(set(numbers)) == len(numbers)


def test_decoys_are_values_without_a_template(tiny_corpus):
    plan = NeedlePlan(
        corpus_needle_task(tiny_corpus, "single", chunk_size=16, pad_token_id=257, vocab_range=(48, 58)),
        curriculum=[Stage(0, 256), Stage(1, 256, 6)],
    )
    plan.check(256)
    batches = NeedleBatches(open_split(tiny_corpus, "train"), TrainingPlan(256, 4, 0, 2, 1), plan, share=Share())
    digits = [((batch["input_ids"] >= 48) & (batch["input_ids"] < 58)).sum(1) for batch in (batches[0], batches[1])]
    assert digits[0].tolist() == [10] * 4 and all(20 <= count <= 40 for count in digits[1].tolist())


def test_validation_scores_fixed_answers_dealt_to_ranks(tiny_corpus):
    data = module(tiny_corpus, eval_lengths=[128, 256], eval_key_length=3, eval_batch_tokens=256)
    data.setup("fit")
    short, long = data.val_dataloader()
    rows = [batch["labels"] for batch in short]
    assert [len(row) for row in rows] == [2, 1] and [len(batch["labels"]) for batch in long] == [1, 1, 1]
    assert all(((row != -100).sum(1) == 3).all() for row in rows)
    assert data.validation_protocol()["task"]["key_length"] == 3


def test_checkpoints_of_other_needles_are_refused(tiny_corpus):
    state = module(tiny_corpus).state_dict()
    module(tiny_corpus).load_state_dict(state)
    for options in ({"loss_on": "answer"}, {"key_length": 4}, {"depths": [0.5]}, {"curriculum": [[0, 128]]}):
        with pytest.raises(ValueError, match="trained with other needles"):
            module(tiny_corpus, **options).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context_length": 250}, "multiple of chunk_size=16, got 250: use 240"),
        ({"context_length": 64}, "do not fit"),
        ({"eval_lengths": [250]}, "multiple of chunk_size=16"),
        ({"loss_on": "question"}, "loss_on is one of all, answer"),
        ({"depths": [0.5, 2.0]}, "depths must be numbers between 0 and 1"),
        ({"depths": [0.5], "kind": "multihop", "context_length": 512}, "depths place a single needle"),
        ({"curriculum": [[1, 128]]}, "begins with step 0"),
        ({"curriculum": [[0, 512]]}, "exceeds context_length=256"),
        ({"curriculum": [[0, 128, 40]]}, "40 decoys of 5 tokens do not fit 128"),
        ({"curriculum": [[0]]}, "list of .first step, length, decoys."),
        ({"vocab_range": [1]}, "two ids"),
        ({"eval_samples": 0}, "eval_samples must be at least 1"),
    ],
)
def test_impossible_options_are_refused(tiny_corpus, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        module(tiny_corpus, **options).setup("fit")


def test_values_avoid_special_ids(tiny_corpus, tmp_path):
    assert text_range(259, {256, 257, 258}) == (0, 256)
    assert text_range(4096, {0, 1, 2}) == (3, 4096)
    assert text_range(50265, {50256, 50257, 50264}) == (0, 50256)
    task = corpus_needle_task(tiny_corpus, "single", chunk_size=16, pad_token_id=257, special_token_ids=[None, 256])
    values = np.concatenate([task.build(np.zeros(256, np.int64), seed=0, index=i).values[0] for i in range(200)])
    assert values.max() < 256 and values.max() > 240
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        corpus_needle_task(tmp_path, "single", chunk_size=16, pad_token_id=257)
