"""A run killed with SIGKILL and resumed takes the very steps of an uninterrupted one, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint import newest_checkpoint
from callbacks.loss_log import read_rows

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24


def command(corpus, output, *overrides):
    return [
        sys.executable,
        str(ROOT / "train.py"),
        "recipe=quickstart",
        "scale=tiny",
        f"data.path={corpus}",
        f"output={output}",
        f"trainer.max_steps={STEPS}",
        "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false",
        "eval_every_n_steps=7",
        "data.max_eval_tokens=600",
        "callbacks.checkpoint.every_n_train_steps=4",
        "~callbacks.sample_text",
        *overrides,
    ]


def run(arguments):
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def kill_after(arguments, log, rows):
    """Start a run and kill it once its loss log has some rows."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(read_rows(log)) >= rows:
            break
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Rows in the log at each kill: before the first checkpoint, after one, around a validation and a save.
@pytest.mark.parametrize(("accumulation", "workers", "kills"), [(1, 2, (2, 9, 14)), (2, 0, (12,))])
def test_killed_and_resumed_equals_uninterrupted(tiny_corpus, tmp_path, accumulation, workers, kills):
    options = [f"trainer.accumulate_grad_batches={accumulation}", f"data.num_workers={workers}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(command(tiny_corpus, whole, *options))
    for rows in kills:
        kill_after(command(tiny_corpus, broken, *options), broken / "train.jsonl", rows)
        assert not (broken / "metrics.json").exists() and rows <= len(read_rows(broken / "train.jsonl")) < STEPS
    resumed = run(command(tiny_corpus, broken, *options))
    assert "resuming" in resumed.stdout

    expected, actual = read_rows(whole / "train.jsonl"), read_rows(broken / "train.jsonl")
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert actual == expected
    states = [torch.load(newest_checkpoint(f / "checkpoints"), weights_only=True) for f in (whole, broken)]
    assert states[0]["global_step"] == states[1]["global_step"] == STEPS
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    assert all(torch.equal(states[1]["state_dict"][name], tensor) for name, tensor in states[0]["state_dict"].items())
