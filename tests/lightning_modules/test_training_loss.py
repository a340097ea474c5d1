"""The logged loss is the mean over the step, whatever the accumulation."""

import pytest

from callbacks.loss_log import read_rows
from configuration.compose import compose
from configuration.training import run


def losses(corpus, output, batch_size, accumulation):
    options = [
        "recipe=quickstart_sliding_window",
        "scale=tiny",
        f"data.path={corpus}",
        f"output={output}",
        f"data.batch_size={batch_size}",
        f"trainer.accumulate_grad_batches={accumulation}",
        "data.max_eval_tokens=600",
        "trainer.max_steps=4",
        "trainer.enable_progress_bar=false",
        "~callbacks.sample_text",
        "export_model=false",
    ]
    run(compose(options, command="train"))
    return [row["loss"] for row in read_rows(output / "train.jsonl")]


def test_accumulation_changes_neither_the_loss_nor_the_steps(tiny_corpus, tmp_path):
    whole = losses(tiny_corpus, tmp_path / "whole", batch_size=4, accumulation=1)
    parts = losses(tiny_corpus, tmp_path / "parts", batch_size=1, accumulation=4)
    assert len(whole) == 4 and whole[0] > 5 and whole[3] < whole[0]
    assert parts == pytest.approx(whole, abs=2e-5)
