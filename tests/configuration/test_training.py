"""The life of a run: it stops on a signal, resumes, is prolonged, branches off with other options."""

import logging
import os
import signal

import lightning.pytorch as pl
import pytest
import torch

from callbacks.checkpoint import newest_checkpoint, read_checkpoint
from callbacks.loss_log import read_rows
from configuration import training
from configuration.compose import compose
from configuration.errors import Stopped
from lightning_modules.optimization import Optimization

COMMON = [
    "recipe=quickstart_sliding_window",
    "scale=tiny",
    "data.context_length=32",
    "data.eval_lengths=[32]",
    "data.max_eval_tokens=200",
    "trainer.log_every_n_steps=2",
    "trainer.enable_progress_bar=false",
    "callbacks.checkpoint.every_n_train_steps=2",
    "~callbacks.sample_text",
    "~callbacks.causality_monitor",
    "module.optimization.warmup_steps=2",
    "export_model=false",
]


@pytest.fixture
def run(tiny_corpus, tmp_path):
    """Train in a folder of the test with some options; return the folder."""

    def start(name, max_steps, *options):
        places = [f"data.path={tiny_corpus}", f"output={tmp_path / name}", f"trainer.max_steps={max_steps}"]
        training.run(compose([*COMMON, *places, *options], command="train"))
        return tmp_path / name

    return start


def logged(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs")).Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_a_prolonged_run_follows_the_longer_schedule(run):
    run("a", 4)
    folder = run("a", 7, "eval_every_n_steps=3")
    rows, schedule = read_rows(folder / "train.jsonl"), Optimization(lr=3e-3, warmup_steps=2)
    rates = [schedule.lr_at(step, 4) for step in range(1, 5)] + [schedule.lr_at(step, 7) for step in range(5, 8)]
    assert [row["lr"] for row in rows] == rates and rates[4] > 1e-3
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_6.ckpt", "step_7.ckpt"]
    curves = logged(folder)
    assert curves["train/loss"] == [(n, pytest.approx(rows[n - 1]["loss"])) for n in (2, 4, 6)]
    assert [step for step, _ in curves["val/loss"]] == [4, 6, 7]


def test_a_branch_takes_the_options_given_now(run):
    folder = run("a", 2, "module.optimization.weight_decay=0.1")
    options = [f"resume={folder}", "module.optimization.lr=1e-4", "module.optimization.betas=[0.8,0.9]"]
    with pytest.warns(UserWarning, match="now in force: .*lr: 0.003 -> 0.0001; .*weight_decay: 0.1 -> 0.2"):
        branch = run("b", 4, *options, "module.optimization.weight_decay=0.2")
    assert [row["lr"] for row in read_rows(branch / "train.jsonl")] == [pytest.approx(5e-5), 0.0]
    decayed, spared = read_checkpoint(newest_checkpoint(branch / "checkpoints"))["optimizer_states"][0]["param_groups"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0) and decayed["betas"] == (0.8, 0.9)


class Signal(pl.Callback):
    """Send this process a signal after some step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "step", "sentence"),
    [
        (signal.SIGINT, 3, "interrupted at step 3; the same command resumes from checkpoint step 2"),
        (signal.SIGTERM, 3, "terminated at step 4; the same command resumes from checkpoint step 4"),
        (signal.SIGINT, 1, "interrupted at step 1; the same command starts again"),
    ],
)
@pytest.mark.usefixtures("interruptible")
def test_a_signal_ends_a_run_in_a_sentence(run, monkeypatch, number, step, sentence):
    build_trainer = training.build_trainer

    def with_signal(config):
        trainer = build_trainer(config)
        trainer.callbacks.append(Signal(number, step))
        return trainer

    monkeypatch.setattr(training, "build_trainer", with_signal)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        run("a", 6)
    assert (str(stop.value), stop.value.number) == (sentence, number)
    assert signal.getsignal(number) == before


def test_bf16_autocast_trains_with_clipped_gradients(run):
    folder = run("a", 2, "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=0.1")
    rows = read_rows(folder / "train.jsonl")
    assert len(rows) == 2 and all(row["grad_norm"] > 0.1 and row["loss"] > 1 for row in rows)
    state = read_checkpoint(newest_checkpoint(folder / "checkpoints"))
    group, moments = state["optimizer_states"][0]["param_groups"][0], state["optimizer_states"][0]["state"]
    assert not group["fused"] and all(torch.isfinite(moment["exp_avg"]).all() for moment in moments.values())
    # Adam's first moment is a mean of the clipped gradients: no longer than the bound.
    assert torch.cat([moment["exp_avg"].flatten() for moment in moments.values()]).norm() < 0.1


def test_what_lightning_refuses_in_the_middle_is_a_sentence(run):
    best = "callbacks.best={_target_: lightning.pytorch.callbacks.ModelCheckpoint, monitor: val/los}"
    with pytest.raises(ValueError, match=r"the trainer refuses these options: .*monitor='val/los'"):
        run("a", 2, f"+{best}")


def test_a_dry_run_builds_the_trainer(tiny_corpus, tmp_path):
    options = [*COMMON, f"data.path={tiny_corpus}", f"output={tmp_path / 'a'}", "trainer.max_time=soon"]
    config = compose(options, command="train")
    with pytest.raises(ValueError, match="trainer: `Timer"):
        training.dry_run(config, [])
    assert "not ready here:  no GPU" in training.dry_run(config, ["no GPU"])
    assert not (tmp_path / "a").exists()


def test_a_dry_run_prints_nothing_but_its_sizes(tiny_corpus, tmp_path, caplog):
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    config = compose(
        ["recipe=quickstart", "scale=tiny", f"data.path={tiny_corpus}", f"output={tmp_path}"], command="train"
    )
    assert training.dry_run(config, []).startswith("recipe           quickstart")
    assert caplog.messages == []
