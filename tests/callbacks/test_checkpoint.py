"""Checkpoint files are whole or absent; the loss log continues without gap or repeat."""

import json

import pytest
import torch

from callbacks.checkpoint import AtomicCheckpointIO, find_checkpoint
from callbacks.loss_log import read_rows, truncate


class Interrupted(Exception):
    pass


def test_an_interrupted_save_leaves_the_old_file_and_nothing_to_resume_from(tmp_path, monkeypatch):
    path = tmp_path / "step_1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)

    def half(checkpoint, file):
        file.write(b"half a checkpoint")
        raise Interrupted

    monkeypatch.setattr(torch, "save", half)
    for name in ("step_1.ckpt", "step_2.ckpt"):
        with pytest.raises(Interrupted):
            AtomicCheckpointIO().save_checkpoint({"x": torch.arange(4)}, tmp_path / name)
    assert find_checkpoint(tmp_path) == path
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["x"], torch.arange(3))


def test_the_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 100, 20):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / f"step_{step}.ckpt")
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "nan_step_500.ckpt")
    assert find_checkpoint(tmp_path).name == "step_100.ckpt"


def test_truncate_drops_later_rows_and_a_cut_line(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    truncate(path, last_step=2)
    assert read_rows(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    truncate(path, last_step=0)
    assert read_rows(path) == []
    truncate(tmp_path / "absent.jsonl", last_step=3)
    assert not (tmp_path / "absent.jsonl").exists()
