"""A tiny language model with dropout, its datamodule and a trainer: what every callback is tested with."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from losses.cross_entropy import next_token_nll

# What evaluation is tested against serves the callbacks too.
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

VOCAB, LENGTH = 31, 16


class Windows(torch.utils.data.Dataset):
    """Whole batches [2, length] of seeded random tokens."""

    def __init__(self, length, count, seed, batch=2):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (count, batch, length + 1), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        tokens, batch = self.tokens[i], self.tokens.shape[1]
        return {
            "input_ids": tokens[:, :-1],
            "labels": tokens[:, :-1],
            "next_token": tokens[:, -1],
            "sample_index": torch.arange(batch * i, batch * (i + 1)),
        }


class Corpus:
    num_bytes, num_tokens = 300, 100


class Data(pl.LightningDataModule):
    """Training batches and one validation loader per length, the same tokens every time."""

    def __init__(self, eval_lengths=(LENGTH, 8), num_train=40, change=None):
        super().__init__()
        self.eval_lengths, self.validation_corpus, self.tokenizer_path = list(eval_lengths), Corpus(), None
        self.train = Windows(LENGTH, num_train, seed=1)
        if change is not None:
            change(self.train.tokens)

    def loader(self, dataset):
        return DataLoader(dataset, batch_size=None, generator=torch.Generator())

    def train_dataloader(self):
        return self.loader(self.train)

    def val_dataloader(self):
        return [self.loader(Windows(length, 3, seed=2)) for length in self.eval_lengths]


class Module(pl.LightningModule):
    """Dropout draws from the global random state, so a callback that disturbs it changes the weights."""

    def __init__(self, model, poison_step=None):
        super().__init__()
        self.model, self.poison_step = model, poison_step
        self.scores = []

    def training_step(self, batch, batch_idx):
        logits = nn.functional.dropout(self.model(batch["input_ids"], use_cache=False).logits, 0.2, self.training)
        nll, counted = next_token_nll(logits, batch["labels"], next_token=batch["next_token"])
        loss = nll.sum() / counted.sum()
        if batch_idx == self.poison_step:
            loss = loss * float("nan")
        return {"loss": loss}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self.model(batch["input_ids"], use_cache=False).logits
        nll, counted = next_token_nll(logits, batch["labels"], next_token=batch["next_token"])
        self.scores.append((dataloader_idx, nll, counted))
        return {"nll": nll, "counted": counted}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **sizes))


@pytest.fixture
def make_trainer(tmp_path):
    """Build a trainer with callbacks: 10 steps, a validation after 5."""

    def make(*callbacks, **options):
        defaults = {
            "max_steps": 10,
            "max_epochs": -1,
            "val_check_interval": 5,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 2,
            "default_root_dir": tmp_path,
        }
        return pl.Trainer(callbacks=list(callbacks), **(defaults | options))

    return make


@pytest.fixture
def fit(make_trainer):
    """Train the tiny model with callbacks and return (trainer, module)."""

    def run(*callbacks, module=None, data=None, ckpt_path=None, **options):
        trainer = make_trainer(*callbacks, **options)
        module = Module(tiny_llama()) if module is None else module
        torch.manual_seed(5)
        trainer.fit(module, datamodule=Data() if data is None else data, ckpt_path=ckpt_path)
        return trainer, module

    return run


@pytest.fixture(scope="session")
def lab():
    """The classes above, for tests that build their own."""
    return {"Module": Module, "Data": Data, "tiny_llama": tiny_llama, "VOCAB": VOCAB, "LENGTH": LENGTH}


@pytest.fixture
def assert_changes_nothing(fit):
    """Train with and without a callback: weights and random state must be the same bits."""

    def check(callback, **options):
        _, plain = fit(**options)
        state = torch.get_rng_state()
        trainer, watched = fit(callback, **options)
        assert torch.equal(state, torch.get_rng_state())
        assert trainer.global_step == 10
        for (name, a), b in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
            assert torch.equal(a, b), name
        assert watched.training

    return check
