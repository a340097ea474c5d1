"""Answers of models as they are: batches of unequal prompts are what their prompts get alone."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation.runner.answering import PlainAnswerer
from evaluation.runner.prompts import Prompt


@pytest.fixture(scope="module")
def embedded_positions():
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=259, initializer_range=0.5, bos_token_id=256, eos_token_id=256, **size)
    ).eval()


def test_padding_moves_no_embedded_position(embedded_positions, tokenizer):
    engine = PlainAnswerer(embedded_positions, tokenizer)
    prompts = [Prompt([], [], list(range(start, start + size)), size) for start, size in ((1, 9), (20, 2), (40, 5))]
    targets = [[3, 4], [5], [6, 7, 8]]
    together = engine.force(prompts, targets).answers
    alone = [engine.force([prompt], [target]).answers[0] for prompt, target in zip(prompts, targets, strict=True)]
    assert [answer.nll_sum for answer in together] == pytest.approx([answer.nll_sum for answer in alone], rel=1e-5)
