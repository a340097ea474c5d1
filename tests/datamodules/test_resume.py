"""A real trainer: after a checkpoint in the middle of a run, the same windows follow as without the interruption."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.packed_text import PackedTextDataModule
from preprocess.index import CorpusWriter

MAX_STEPS, STOP = 7, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Recorder(pl.LightningModule):
    """A model of one number that remembers which windows it was given, step by step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.windows = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        step_and_sample = (self.global_step, batch_idx, tuple(batch["sample_index"].tolist()))
        self.windows.append((*step_and_sample, tuple(batch["window_start"].tolist())))
        return (self.weight - batch["input_ids"].float().mean() / 1000) ** 2

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, tuple(batch["window_start"].tolist())))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "corpus"
    for split, size in (("train", 5000), ("validation", 300)):
        with CorpusWriter(
            folder / split, dtype="uint16", tokenizer="t", vocab_size=1000, eos_token_id=0, source=split
        ) as writer:
            writer.add(np.random.default_rng(size).integers(1, 1000, size=size))
    return folder


def fit(folder, run_folder, *, accumulate, num_workers=0, max_steps=MAX_STEPS, resume=None, callbacks=()):
    data = PackedTextDataModule(
        folder,
        context_length=16,
        batch_size=2,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        eval_lengths=[16, 64],
        num_workers=num_workers,
    )
    checkpoint = ModelCheckpoint(run_folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        callbacks=[checkpoint, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Recorder()
    trainer.fit(model, data, ckpt_path=resume)
    return model


@pytest.mark.parametrize(("accumulate", "num_workers"), [(1, 0), (2, 0), (2, 2)])
def test_windows_and_weights_after_resuming_are_those_of_the_uninterrupted_run(
    corpus_folder, tmp_path, accumulate, num_workers
):
    whole = fit(corpus_folder, tmp_path, accumulate=accumulate)
    assert [window[1] for window in whole.windows] == list(range(MAX_STEPS * accumulate))
    for stop in (STOP, STOP + 1):  # without and with a validation at the checkpoint
        resumed = fit(
            corpus_folder,
            tmp_path / "resumed",
            accumulate=accumulate,
            num_workers=num_workers,
            resume=tmp_path / f"step={stop}.ckpt",
        )
        assert resumed.windows == whole.windows[stop * accumulate :]
        assert torch.equal(resumed.weight, whole.weight)
        assert set(resumed.validated) == set(whole.validated)


def test_a_finished_run_can_be_prolonged(corpus_folder, tmp_path):
    whole = fit(corpus_folder, tmp_path / "whole", accumulate=2, max_steps=6)
    fit(corpus_folder, tmp_path, accumulate=2, max_steps=4)
    longer = fit(corpus_folder, tmp_path / "on", accumulate=2, max_steps=6, resume=tmp_path / "step=4.ckpt")
    assert [window[2:] for window in longer.windows] == [window[2:] for window in whole.windows[8:]]
    assert torch.equal(longer.weight, whole.weight)


class StopInside(pl.Callback):
    """Write a checkpoint between the two micro-batches of a step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_inside_a_step_is_not_resumed(corpus_folder, tmp_path):
    fit(corpus_folder, tmp_path, accumulate=2, max_steps=3, callbacks=[StopInside(tmp_path / "inside.ckpt")])
    with pytest.raises(ValueError, match="inside optimiser step 1, after micro-batch 1 of 2"):
        fit(corpus_folder, tmp_path / "on", accumulate=2, max_steps=3, resume=tmp_path / "inside.ckpt")
