"""The real engine on CPU processes: one division by the accumulation, the gradient's norm, checkpoints read without it.

Needs ``pip install deepspeed``; without it only the stub of ``test_token_weighting_training`` and the folders of
``test_checkpoint_folder`` are tested.
"""

import argparse
import sys

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from callbacks.checkpoint import newest_checkpoint, read_checkpoint
from callbacks.loss_log import read_rows
from callbacks.sharded_strategies import ShardedDeepSpeed
from configuration.compose import compose
from configuration.export import CheckpointExport
from configuration.training import run
from tests.processes import run_in_processes

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


def train(corpus, output, *more, stage=None, max_steps=4):
    import callbacks.sharded_strategies as strategies

    named = ["recipe=quickstart_sliding_window", "scale=tiny", f"data.path={corpus}", f"output={output}"]
    named += ["sequences_per_step=8", f"trainer.max_steps={max_steps}", "trainer.log_every_n_steps=1", *more]
    named += [
        "trainer.enable_progress_bar=false",
        "data.max_eval_tokens=600",
        "callbacks.checkpoint.every_n_train_steps=2",
    ]
    config = compose([*named, "~callbacks.sample_text", "~logger.tensorboard"], command="train")
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


def train_stage(corpus, output, parts, stage, max_steps):
    train(corpus, output, *parts, stage=stage, max_steps=max_steps)
