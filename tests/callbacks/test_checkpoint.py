"""Checkpoint files are whole or absent; the loss log continues without gap or repeat."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, newest_checkpoint
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
    assert newest_checkpoint(tmp_path) == path
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["x"], torch.arange(3))


def test_the_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 100, 20):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / f"step_{step}.ckpt")
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "nan_step_500.ckpt")
    assert newest_checkpoint(tmp_path).name == "step_100.ckpt"


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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_any_number_of_resumes_leaves_as_many_files_as_asked_for(fit, tmp_path):
    folder = tmp_path / "checkpoints"
    for max_steps in (3, 6, 10, 10):
        newest = newest_checkpoint(folder)
        options = {"enable_checkpointing": True, "ckpt_path": newest, "max_steps": max_steps}
        fit(StepCheckpoint(str(folder), every_n_train_steps=2, keep_last=2), **options)
        assert newest_checkpoint(folder).name == f"step_{max_steps}.ckpt"
    assert names(folder) == ["step_10.ckpt", "step_8.ckpt"]


class Recorded(AtomicCheckpointIO):
    def __init__(self):
        self.steps = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.steps.append(checkpoint["global_step"])
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize(("keep_last", "steps"), [(1, [5]), (None, [2, 4, 5])])
def test_steps_are_saved_once_and_the_last_always(fit, tmp_path, keep_last, steps):
    callback, recorded = StepCheckpoint(str(tmp_path), every_n_train_steps=2, keep_last=keep_last), Recorded()
    fit(callback, enable_checkpointing=True, max_steps=5, accumulate_grad_batches=3, plugins=[recorded])
    assert recorded.steps == [2, 4, 5]
    assert names(tmp_path) == [f"step_{step}.ckpt" for step in steps]


@pytest.mark.parametrize("options", [{"every_n_train_steps": 0}, {"every_n_train_steps": 1, "keep_last": 0}])
def test_a_callback_that_never_saves_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        StepCheckpoint("x", **options)


def test_sigterm_does_not_wait_for_the_end_of_a_validation(fit, tmp_path):
    class Asking(pl.Callback):
        def on_validation_batch_start(self, *_):
            saving.termination.asked = True

    saving = StepCheckpoint(str(tmp_path), every_n_train_steps=100)
    with pytest.raises(SIGTERMException):
        fit(Asking(), saving, enable_checkpointing=True)
    assert names(tmp_path) == ["step_5.ckpt"]


class Falling(pl.Callback):
    """Logs a value that falls and rises again."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/loss", [5.0, 2.0, 1.0, 3.0, 4.0][trainer.global_step // 2 - 1])


def test_the_best_are_kept_beside_the_newest(fit, tmp_path):
    options = {"enable_checkpointing": True, "max_steps": 10, "val_check_interval": 2}
    callback = StepCheckpoint(str(tmp_path), every_n_train_steps=5, keep_last=1, keep_best=2)
    fit(Falling(), callback, **options)
    assert names(tmp_path) == ["best.json", "step_10.ckpt", "step_4.ckpt", "step_6.ckpt"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"6": 1.0, "4": 2.0}
    with pytest.raises(ValueError, match="keep_best looks for 'val/nothing', which no validation logs; there is: "):
        fit(StepCheckpoint(str(tmp_path / "x"), every_n_train_steps=5, keep_best=1, monitor="val/nothing"), **options)
