"""Needles answered through segments and caches: as by plain forwards, for every model that retrieves or does not."""

import numpy as np
import pytest
import torch

from datamodules.niah import NeedleTask
from evaluation.passkey import evaluate_passkey, read_haystack, summary
from evaluation.scoring import TokenStream
from models.drt import DRTConfig, DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "window_size": 9}
IDS = {"bos_token_id": 37, "eos_token_id": 37, "pad_token_id": 38, "initializer_range": 0.5}


def encode(text):
    return [ord(letter) % 30 for letter in text[:6]]


def task(kind="single", **options):
    defaults = {"chunk_size": 8, "key_length": 4, "vocab_range": (0, 30), "pad_token_id": 38}
    return NeedleTask(kind, encode, **defaults | options)


def drt(chunk_size=8):
    torch.manual_seed(0)
    config = DRTConfig(
        **SIZES,
        **IDS,
        num_lower_layers=1,
        layers_per_group=[1, 1],
        num_encoder_layers=1,
        chunk_size=chunk_size,
        chunk_top_k=2,
        landmark_token_id=39,
    )
    return DRTForCausalLM(config).eval()


def window():
    torch.manual_seed(0)
    return SlidingWindowLMForCausalLM(SlidingWindowLMConfig(**SIZES, **IDS, num_hidden_layers=2)).eval()


def plain(model, sample):
    """Answers by unsegmented forwards without a cache: teacher-forced, then greedy."""
    stop = sample.answer_start + sample.answer_length
    ids = torch.from_numpy(sample.input_ids)[None]
    with torch.no_grad():
        logits = model(input_ids=ids[:, :stop], use_cache=False).logits[0]
        forced = logits[sample.answer_start - 1 : stop - 1].argmax(-1).tolist()
        said = ids[:, : sample.answer_start]
        for _ in range(sample.answer_length):
            following = model(input_ids=said, use_cache=False).logits[:, -1:].argmax(-1)
            said = torch.cat([said, following], dim=1)
    return forced, said[0, sample.answer_start :].tolist()


@pytest.fixture(scope="module")
def haystack():
    return np.random.default_rng(0).integers(30, size=400)


@pytest.mark.parametrize(("segment_length", "offload"), [(7, True), (16, False), (1000, True)])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_segments_and_offload_answer_as_plain_forwards(haystack, kind, segment_length, offload):
    model, needles = drt(), task(kind, **({"num_distractors": 1} if kind == "multi" else {}))
    options = {"length": 96, "num_samples": 2, "seed": 5, "segment_length": segment_length, "offload": offload}
    result = evaluate_passkey(model, needles, haystack, **options)
    for found in result["predictions"]:
        text = read_haystack(TokenStream.open(haystack), found["index"], 96)
        sample = needles.build(text, seed=5, index=found["index"])
        assert (found["teacher_forced"], found["generated"]) == plain(model, sample)
        assert found["answer"] == sample.answer.tolist()
    assert model.config.offload_chunk_memory is False


@pytest.mark.parametrize("build", [drt, window])
def test_unaligned_answers_that_complete_chunks(haystack, build):
    model, needles = build(), task(align_question=False, key_length=12)
    result = evaluate_passkey(model, needles, haystack, length=104, num_samples=1, segment_length=30)
    for found in result["predictions"]:
        text = read_haystack(TokenStream.open(haystack), found["index"], 104)
        sample = needles.build(text, seed=0, index=found["index"])
        assert (found["teacher_forced"], found["generated"]) == plain(model, sample)


def test_the_answer_of_one_token(haystack):
    result = evaluate_passkey(drt(), task(key_length=1), haystack, length=96, num_samples=2, depths=[0.0, 1.0])
    assert result["exact_match"] == result["scored_token"] == result["first_token"] == result["last_token"]
    assert [found["depth"] for found in result["predictions"]] == [0.0, 1.0]
    starts = [found["needle_start"] for found in result["predictions"]]
    assert starts[0] == 0 and starts[1] == task(key_length=1).room(96) - 1


def test_a_short_text_is_read_in_a_circle():
    stream = TokenStream.open(np.arange(7))
    assert read_haystack(stream, 0, 5).tolist() == [0, 1, 2, 3, 4]
    assert read_haystack(stream, 1, 5).tolist() == [2, 3, 4, 5, 6]
    assert read_haystack(stream, 1, 17).tolist() == [(17 + j) % 7 for j in range(17)]


def test_shares_count_what_they_say():
    answers = [
        {"answer": [1, 2, 3], "teacher_forced": [1, 2, 3], "generated": [1, 2, 3], "scored": 0},
        {"answer": [1, 2, 3], "teacher_forced": [9, 2, 3], "generated": [9, 9, 9], "scored": 0},
        {"answer": [1, 2, 3], "teacher_forced": [1, 9, 9], "generated": [1, 9, 9], "scored": 2},
        {"answer": [1, 2, 3], "teacher_forced": [9, 9, 3], "generated": [9, 9, 3], "scored": 2},
    ]
    shares = {"first_token": 0.5, "last_token": 0.75, "scored_token": 0.5, "teacher_forced": 0.25, "exact_match": 0.25}
    assert summary(answers) == shares | {"num_samples": 4}


def test_impossible_requests_are_refused(haystack):
    with pytest.raises(ValueError, match="num_samples and segment_length"):
        evaluate_passkey(drt(), task(), haystack, length=96, num_samples=0)
    with pytest.raises(ValueError, match="do not fit"):
        evaluate_passkey(drt(), task(), haystack, length=16, num_samples=1)
