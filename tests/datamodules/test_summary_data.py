"""Batches of summaries: every pair once in an epoch, shares of ranks, targets announced, exact resume."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.loading import Share
from datamodules.scored_batches import SequencePlan
from datamodules.summary_batches import SummaryBatches
from datamodules.summary_data import SummarizationDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*training summaries have more than"),
]
OPTIONS = {"context_length": 128, "max_summary_length": 12, "chunk_size": 8, "pad_token_id": 257, "batch_size": 2}


def data_of(folder, **options):
    return SummarizationDataModule(folder, **(OPTIONS | {"max_steps": 9} | options))


class Recorder(pl.LightningModule):
    """A model of one number that remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        place = (self.global_step, tuple(batch["window_start"].tolist()), tuple(batch["sample_index"].tolist()))
        self.seen.append((*place, int(batch["num_step_targets"])))
        return (self.weight - batch["input_ids"].float().mean() / 1000) ** 2

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated += batch["window_start"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, run_folder, *, accumulate, num_workers=0, resume=None, **options):
    data = data_of(folder, accumulate_grad_batches=accumulate, num_workers=num_workers, **options)
    trainer = pl.Trainer(
        max_steps=9,
        accumulate_grad_batches=accumulate,
        val_check_interval=4 * accumulate,
        callbacks=[ModelCheckpoint(run_folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    model = Recorder()
    trainer.fit(model, data, ckpt_path=resume)
    return model


@pytest.mark.parametrize(("accumulate", "num_workers"), [(1, 0), (2, 2)])
def test_what_follows_a_checkpoint_is_what_followed_without_it(summary_folder, tmp_path, accumulate, num_workers):
    whole = fit(summary_folder, tmp_path, accumulate=accumulate)
    assert len(whole.seen) == 9 * accumulate and sorted(set(whole.validated)) == list(range(7))
    for stop in (4,) if num_workers else (3, 4, 5):  # before, at and after a validation
        resumed = fit(
            summary_folder,
            tmp_path / "resumed",
            accumulate=accumulate,
            num_workers=num_workers,
            resume=tmp_path / f"step={stop}.ckpt",
        )
        assert resumed.seen == whole.seen[stop * accumulate :]
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(
    "change", [{"seed": 3}, {"batch_size": 4}, {"loss_on": "all"}, {"max_summary_length": 9}, {"context_length": 120}]
)
def test_other_data_are_not_resumed_on(summary_folder, change):
    state = data_of(summary_folder).state_dict()
    with pytest.raises(ValueError, match="the checkpoint was trained with another"):
        data_of(summary_folder, **change).load_state_dict(state)


def batches_of(folder, *, share=None, accumulate=1, batch_size=3, length=24, **options):
    data = data_of(folder, **options)
    store = data.train_corpus
    plan = SequencePlan(
        len(store), batch_size, accumulate=accumulate, seed=5, shuffle=True, share=share or Share(), endless=True
    )
    return SummaryBatches(store, data.layout(store), plan=plan, length=length, training=True)


@pytest.mark.parametrize("loss_on", ["all", "summary"])
def test_every_pair_once_in_an_epoch_and_every_target_announced(summary_folder, loss_on):
    batches = batches_of(summary_folder, accumulate=2, loss_on=loss_on)
    numbers = [number for index in range(23) for number in batches[index]["window_start"].tolist()]
    for epoch in range(3):
        assert sorted(numbers[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    assert numbers[:23] != numbers[23:46]
    for step in range(6):
        window = [batches[2 * step + part] for part in range(2)]
        counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
        assert [int(batch["num_step_targets"]) for batch in window] == [counted, counted]


def test_ranks_share_the_samples_of_a_step(summary_folder):
    alone = batches_of(summary_folder, batch_size=4)
    ranks = [batches_of(summary_folder, share=Share(rank, 2), batch_size=2) for rank in range(2)]
    for index in range(8):
        parts = [batches[index] for batches in ranks]
        pairs = [dict(zip(b["sample_index"].tolist(), b["window_start"].tolist(), strict=True)) for b in parts]
        whole = alone[index]
        assert pairs[0] | pairs[1] == dict(
            zip(whole["sample_index"].tolist(), whole["window_start"].tolist(), strict=True)
        )


def test_rows_are_padded_to_the_longest_of_their_batch(summary_folder):
    for index in range(8):
        batch = batches_of(summary_folder)[index]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        assert batch["input_ids"].shape == batch["labels"].shape == mask.shape
        assert int(mask.sum(1).max()) == mask.shape[1]
        assert torch.equal(batch["labels"] != -100, (batch["labels"] == batch["input_ids"]) & (mask == 1))


def test_validation_scores_every_summary_token_once(summary_folder):
    data = data_of(summary_folder, loss_on="all")
    data.setup("validate")
    store, targets, seen = data.validation_corpus, 0, []
    for batch in data.val_dataloader():
        targets += int((batch["labels"][:, 1:] != -100).sum())
        seen += batch["window_start"].tolist()
    assert seen == list(range(7)) and targets == sum(min(int(n) + 1, 12) for n in store.summary_lengths)


def test_chunks_of_another_size_than_the_model_s_are_refused(summary_folder):
    data = data_of(summary_folder)
    data.trainer = type("T", (), {"lightning_module": type("M", (), {"model": None})()})()
    data.trainer.lightning_module.model = type("Model", (), {"config": type("C", (), {"chunk_size": 16})()})()
    with pytest.raises(ValueError, match=r"chunks of 16 tokens, the data of 8: pass data.chunk_size=16"):
        data._check_chunks()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_eval_pairs": 0}, "max_eval_pairs must be at least 1"),
        ({"seed": -1}, "must not be negative"),
        ({"context_length": 12}, "the marker alone needs 1"),
        ({"chunk_size": None}, "needs the chunk_size of the model"),
    ],
)
def test_impossible_options_are_explained(summary_folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        data_of(summary_folder, **options)


def test_long_summaries_are_told(summary_folder):
    with pytest.warns(UserWarning, match="of 23 training summaries have more than max_summary_length=12 tokens"):
        data_of(summary_folder).setup("fit")
