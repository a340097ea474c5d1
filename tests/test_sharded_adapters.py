"""Adapters under FSDP2, two processes that talk through gloo: what is learnt is stored alone, resumed and exported."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from callbacks.checkpoint import newest_checkpoint, read_checkpoint
from callbacks.loss_log import LossLog, read_rows
from configuration.compose import compose
from configuration.export import CheckpointExport
from configuration.training import run
from tests.processes import run_in_processes

STEPS = 4
COMMON = [
    "scale=tiny",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.precision=32-true",
    "trainer.accelerator=cpu",
    "sequences_per_step=2",
    "eval_every_n_steps=null",
    "callbacks.checkpoint.every_n_train_steps=2",
    "~logger.tensorboard",
]
KV = [
    "recipe=wikitext2_sentinel_lora",
    "data.path={corpus}",
    "data.max_eval_blocks=2",
    "~callbacks.compression_perplexity",
]
KV.append("module.lora.lora_dropout=0")  # dropout draws by process
PLAIN = ["recipe=quickstart_sliding_window", "data.path={corpus}", "data.max_eval_tokens=600", "~callbacks.sample_text"]
WEIGHTED = ["recipe=pg19_longce", "prepare.corpus={corpus}", "module.lora={{r: 4, lora_alpha: 8}}"]
FOLDER = ["trainer=fsdp2", "trainer.devices=2", "data.batch_size=1"]
FILE = [*FOLDER, "trainer.strategy.save_distributed_checkpoint=false"]
ALONE = ["trainer=cpu", "trainer.devices=1", "data.batch_size=2"]


def options(method, corpus, output, trainer, *more):
    return [*(part.format(corpus=corpus) for part in method), *trainer, *COMMON, f"output={output}", *more]


def train(arguments, killed_at=None):
    if killed_at is not None:
        ended = LossLog.on_train_batch_end

        def die(self, trainer, *rest):
            ended(self, trainer, *rest)
            if trainer.global_step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        LossLog.on_train_batch_end = die
    run(compose(arguments, command="train"))


def finish(arguments, processes=2):
    assert run_in_processes(processes, train, arguments) == [0] * processes


@pytest.mark.parametrize(
    ("method", "trainer"),
    [
        pytest.param(KV, FILE, marks=pytest.mark.slow),
        pytest.param(WEIGHTED, FOLDER, marks=pytest.mark.slow),
        (KV, FOLDER),
    ],
    ids=["kv_file", "weighted_folder", "kv_folder"],
)
def test_a_killed_run_goes_on_from_what_it_has_learnt(method, trainer, tiny_corpus, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(options(method, tiny_corpus, whole, trainer))
    again = options(method, tiny_corpus, broken, trainer)
    codes = run_in_processes(2, train, again, 3)  # one may see that the other is gone
    assert -signal.SIGKILL in codes and 0 not in codes
    assert [row["step"] for row in read_rows(broken / "train.jsonl")] == [1, 2, 3]
    finish(again)
    assert read_rows(broken / "train.jsonl") == read_rows(whole / "train.jsonl")

    stored, other = (newest_checkpoint(folder / "checkpoints") for folder in (whole, broken))
    names = read_checkpoint(stored)["state_dict"]
    assert names and all("lora_" in name or "trainable_tokens" in name for name in names)
    for name, tensor in names.items():
        assert torch.equal(read_checkpoint(other)["state_dict"][name], tensor), name
    exported = CheckpointExport(str(broken), output=str(tmp_path / "export")).run(None)["model"]
    one, two = (load_file(f"{folder}/model.safetensors") for folder in (exported, whole / "model"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not any("lora" in name for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("method", [KV, PLAIN], ids=["kv", "plain"])
def test_what_one_strategy_has_learnt_another_goes_on_with(method, tiny_corpus, tmp_path):
    """Two steps in one file of two processes, two more in one process, and the reverse; as if all were taken in one."""
    finish(options(method, tiny_corpus, tmp_path / "whole", ALONE), processes=1)
    for first, then, name in ((FILE, ALONE, "gathered"), (ALONE, FOLDER, "spread")):
        for trainer, steps in ((first, 2), (then, STEPS)):
            # The schedule's length stays that of the whole.
            lengths = [f"trainer.max_steps={steps}", f"module.max_steps={STEPS}"]
            arguments = options(method, tiny_corpus, tmp_path / name, trainer, *lengths)
            finish(arguments, processes=1 if trainer is ALONE else 2)
        for one, two in zip(
            read_rows(tmp_path / "whole/train.jsonl"), read_rows(tmp_path / name / "train.jsonl"), strict=True
        ):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
