"""Two processes with half the batch each log what one process logs."""

import subprocess
import sys
from pathlib import Path

import pytest

from callbacks.loss_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
COMMON = [
    "recipe=quickstart_sliding_window",
    "scale=tiny",
    "trainer.max_steps=4",
    "trainer.log_every_n_steps=2",
    "trainer.enable_progress_bar=false",
    "data.max_eval_tokens=600",
    "~callbacks.sample_text",
    "export_model=false",
]


@pytest.mark.slow
def test_the_loss_log_counts_all_ranks_and_nothing_warns(tiny_corpus, tmp_path):
    rows = {}
    for devices, options in (("1", ["data.batch_size=4"]), ("2", ["data.batch_size=2", "trainer.strategy=ddp"])):
        places = [f"data.path={tiny_corpus}", f"output={tmp_path / devices}", f"trainer.devices={devices}"]
        command = [sys.executable, str(ROOT / "train.py"), *COMMON, *places, *options]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
        assert result.returncode == 0 and result.stderr == "", result.stderr[-3000:]
        rows[devices] = read_rows(tmp_path / devices / "train.jsonl")
    for one, two in zip(rows["1"], rows["2"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=2e-5) and two["tokens"] == one["tokens"]
