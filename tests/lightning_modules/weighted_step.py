"""One optimiser step on two sequences of unequal length; saves its gradient. Run as a script for two processes."""

import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.token_weighting import TokenWeightedLM

LENGTHS = (40, 23)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def sequences():
    ids = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(1, 40) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids, "valid": valid, "sequence_index": torch.arange(2)}


def batches(*, rank, num_ranks, accumulate):
    """The batches of one rank: all rows at once, or one row in each micro-batch, or one row on each rank."""
    rows = sequences()
    mine = torch.arange(2)[rank::num_ranks].chunk(accumulate)
    announced = rows["valid"][rank::num_ranks].sum()
    return [{name: value[part] for name, value in rows.items()} | {"num_step_targets": announced} for part in mine]


class Data(pl.LightningDataModule):
    def __init__(self, accumulate, change=None):
        super().__init__()
        self.accumulate, self.change = accumulate, change

    def train_dataloader(self):
        trainer = self.trainer
        made = batches(rank=trainer.global_rank, num_ranks=trainer.world_size, accumulate=self.accumulate)
        for batch in made:
            if self.change is not None:
                self.change(batch)
        return DataLoader(made, batch_size=None)


class Gradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found = {name: p.grad.clone() for name, p in pl_module.model.named_parameters()}


def run(*, accumulate=1, devices=1, change=None, module=None, max_steps=1, **trainer_options):
    gradients = Gradients()
    options = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "max_steps": max_steps,
        "accumulate_grad_batches": accumulate,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "callbacks": [gradients],
    } | trainer_options
    trainer = pl.Trainer(**options)
    module = module or make()
    trainer.fit(module, datamodule=Data(accumulate, change))
    return gradients, trainer, module


def make(**options):
    return TokenWeightedLM(tiny_llama(), "dense", base_length=8, base_stride=6, position_edges=(0, 8, 40), **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    found, trainer, _ = run(devices=2)
    if trainer.is_global_zero:
        torch.save({"gradients": found.found, "logged": dict(trainer.callback_metrics)}, sys.argv[1])
