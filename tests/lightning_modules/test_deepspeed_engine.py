"""The real engine on CPU processes: one division by the accumulation, the gradient's norm, checkpoints read without it.

Needs ``pip install deepspeed``; without it only the stub of ``test_token_weighting_training`` and the folders of
``test_checkpoint_folder`` are tested.
"""

import argparse
import os
import signal
import sys

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file

from callbacks.checkpoint import newest_checkpoint, read_checkpoint
from callbacks.loss_log import LossLog, read_rows
from callbacks.sharded_strategies import ShardedDeepSpeed
from configuration.compose import compose
from configuration.errors import exit_with_sentence
from configuration.export import CheckpointExport
from configuration.training import run
from tests.processes import error_log, run_in_processes

pytestmark = pytest.mark.slow


class OnCPU(ShardedDeepSpeed):
    """Without the question for CUDA devices."""

    def setup_environment(self):
        DDPStrategy.setup_environment(self)

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=-1),
            config=self.config,
            model=model,
            model_parameters=filter(lambda p: p.requires_grad, model.parameters()),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapped


PLAIN = ["recipe=quickstart_sliding_window", "data.max_eval_tokens=600", "~callbacks.sample_text"]
ADAPTERS = ["recipe=wikitext2_sentinel_lora", "data.max_eval_blocks=8", "~callbacks.compression_perplexity"]
ADAPTERS += ["module.lora.lora_dropout=0", "module.max_steps=4", "trainer.precision=32-true"]


def train(corpus, output, *more, method=PLAIN, stage=None, max_steps=4):
    import callbacks.sharded_strategies as strategies

    named = [*method, "scale=tiny", f"data.path={corpus}", f"output={output}"]
    named += ["sequences_per_step=8", f"trainer.max_steps={max_steps}", "trainer.log_every_n_steps=1", *more]
    named += ["trainer.enable_progress_bar=false", "callbacks.checkpoint.every_n_train_steps=2"]
    config = compose([*named, "~logger.tensorboard"], command="train")
    if stage is not None:
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiled, and not needed
        strategies.OnCPU = OnCPU
        config["trainer"] |= {
            "strategy": {"_target_": "callbacks.sharded_strategies.OnCPU", "stage": stage},
            "plugins": [
                {"_target_": "lightning_modules.deepspeed_precision.GradientsScaledOnce", "precision": "32-true"}
            ],
            "precision": None,
        }
    run(config)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_of_the_engine_are_one_without_it(stage, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    train(tiny_corpus, whole, "data.batch_size=8")
    parts = ["data.batch_size=2", "trainer.devices=2"]
    for max_steps in (2, 4):  # and resumed between
        codes = run_in_processes(2, train_stage, tiny_corpus, sharded, parts, stage, max_steps)
        assert codes == [0, 0]
    for one, two in zip(read_rows(whole / "train.jsonl"), read_rows(sharded / "train.jsonl"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    expected = read_checkpoint(newest_checkpoint(whole / "checkpoints"))["state_dict"]
    found = read_checkpoint(newest_checkpoint(sharded / "checkpoints"))["state_dict"]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    exported = CheckpointExport(str(sharded)).run(None)
    assert exported["parameters"] == sum(p.numel() for n, p in expected.items() if "lm_head" not in n)


def train_stage(corpus, output, parts, stage, max_steps, method=PLAIN):
    train(corpus, output, *parts, stage=stage, max_steps=max_steps, method=method)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_stored_alone_and_resumed_exactly(stage, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    alone, whole, broken = tmp_path / "alone", tmp_path / "whole", tmp_path / "broken"
    train(tiny_corpus, alone, "data.batch_size=8", method=ADAPTERS)
    parts = ["data.batch_size=2", "trainer.devices=2"]
    assert run_in_processes(2, train_stage, tiny_corpus, whole, parts, stage, 4, ADAPTERS) == [0, 0]
    codes = run_in_processes(2, train_until_killed, tiny_corpus, broken, parts, stage, 3)
    assert -signal.SIGKILL in codes and 0 not in codes
    assert run_in_processes(2, train_stage, tiny_corpus, broken, parts, stage, 4, ADAPTERS) == [0, 0]
    assert read_rows(broken / "train.jsonl") == read_rows(whole / "train.jsonl")
    for one, two in zip(read_rows(alone / "train.jsonl"), read_rows(whole / "train.jsonl"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)

    newest = newest_checkpoint(broken / "checkpoints")
    expected = read_checkpoint(newest_checkpoint(alone / "checkpoints"))["state_dict"]
    found = read_checkpoint(newest)["state_dict"]
    assert found.keys() == expected.keys() and all("lora_" in n or "trainable_tokens" in n for n in found)
    largest = max(tensor.numel() for tensor in expected.values())
    for path in (newest / "checkpoint").glob("*_model_states.pt"):
        stored = torch.load(path, weights_only=False)
        assert max(tensor.numel() for tensor in stored["module"].values()) <= largest
        assert stored["frozen_param_fragments"] is None
    exported = CheckpointExport(str(broken), output=str(tmp_path / "export")).run(None)["model"]
    one, two = (load_file(f"{folder}/model.safetensors") for folder in (exported, alone / "model"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def train_until_killed(corpus, output, parts, stage, step):
    ended = LossLog.on_train_batch_end

    def die(self, trainer, *rest):
        ended(self, trainer, *rest)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    LossLog.on_train_batch_end = die
    train_stage(corpus, output, parts, stage, 4, ADAPTERS)


@pytest.mark.parametrize("stage", [2, 3])
def test_another_number_of_processes_is_refused_in_a_sentence(stage, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    parts = ["data.batch_size=4", "trainer.devices=2"]
    assert run_in_processes(2, train_stage, tiny_corpus, tmp_path, parts, stage, 2) == [0, 0]
    assert run_in_processes(1, resume_alone, tiny_corpus, tmp_path, stage) == [2]
    sentence = (tmp_path / "0.err").read_text().splitlines()[-1]
    assert sentence.startswith("error: checkpoint ")
    assert "was written by 2 DeepSpeed processes and this run has 1: resume with 2" in sentence


def resume_alone(corpus, output, stage):
    error_log(output)
    try:
        with exit_with_sentence([]):
            train(corpus, output, "data.batch_size=8", stage=stage)
    except SystemExit as ended:
        os._exit(ended.code)
