"""A real trainer: after a checkpoint anywhere in a run of several epochs, the same batches follow."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scored_cases import write_both, write_sequences

from datamodules.token_weighting import ScoredSequencesDataModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_both(tmp_path_factory.mktemp("data"))  # 12 sequences


class Recorder(pl.LightningModule):
    """A model of one number that remembers which sequences it was given, and in which step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read, self.validated = [], []

    def training_step(self, batch, batch_idx):
        found = (tuple(batch["sequence_index"].tolist()), int(batch["num_step_targets"]))
        self.read.append((self.global_step, self.current_epoch, batch_idx, *found))
        return (self.weight - batch["input_ids"].float().mean() / 500) ** 2

    def validation_step(self, batch, batch_idx):
        self.validated.append(tuple(batch["sequence_index"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(pl.Callback):
    """Write a checkpoint at the end of every epoch and of every validation."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"epoch_end_{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / f"validation_end_{trainer.global_step}.ckpt")


def fit(stores, folder, *, options, limits, resume=None, num_workers=0, callbacks=()):
    data = ScoredSequencesDataModule(*stores, **options, num_workers=num_workers)
    validate = {"val_check_interval": 2 * options["accumulate_grad_batches"], "check_val_every_n_epoch": None}
    if "max_epochs" in limits:
        validate = {"check_val_every_n_epoch": 1}  # an interval would fall inside a step
    trainer = pl.Trainer(
        **limits,
        accumulate_grad_batches=options["accumulate_grad_batches"],
        **validate,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    model = Recorder()
    trainer.fit(model, data, ckpt_path=resume)
    return model


CASES = [  # batch size, accumulation, steps of an epoch
    (3, 1, 4),
    (5, 2, 2),  # three micro-batches, the last smaller, the last window shorter
    (2, 3, 2),
]


@pytest.mark.parametrize(("batch_size", "accumulate", "epoch_steps"), CASES)
@pytest.mark.parametrize("by_epochs", [False, True])
def test_any_checkpoint_continues_with_the_batches_that_follow(
    stores, tmp_path, batch_size, accumulate, epoch_steps, by_epochs
):
    options = {"batch_size": batch_size, "accumulate_grad_batches": accumulate, "validation": stores[0]}
    steps = 2 * epoch_steps + 1
    limits = {"max_epochs": 3} if by_epochs else {"max_steps": steps}
    whole = fit(stores, tmp_path, options=options, limits=limits, callbacks=[SaveEverywhere(tmp_path)])
    assert {step for step, *_ in whole.read} == set(range(3 * epoch_steps if by_epochs else steps))
    first = [sequence for *_, rows, _ in whole.read for sequence in rows][:12]
    assert sorted(first) == list(range(12))
    chosen = sorted({1, epoch_steps - 1, epoch_steps, epoch_steps + 1, 2 * epoch_steps} - {0})
    files = [tmp_path / f"step={step}.ckpt" for step in chosen]
    files += sorted(tmp_path.glob("epoch_end_*.ckpt"))[:2] + sorted(tmp_path.glob("validation_end_*.ckpt"))[:2]
    for file in files:
        step = torch.load(file, weights_only=False)["global_step"]
        resumed = fit(stores, tmp_path / "on", options=options, limits=limits, resume=file)
        assert resumed.read == [entry for entry in whole.read if entry[0] >= step], file.name
        assert torch.equal(resumed.weight, whole.weight), file.name


def test_a_finished_run_can_be_prolonged(stores, tmp_path):
    options = {"batch_size": 5, "accumulate_grad_batches": 2}
    whole = fit(stores, tmp_path / "whole", options=options, limits={"max_steps": 5})
    fit(stores, tmp_path, options=options, limits={"max_steps": 3}, callbacks=[SaveEverywhere(tmp_path)])
    done = fit(stores, tmp_path / "on", options=options, limits={"max_steps": 3}, resume=tmp_path / "step=3.ckpt")
    assert not done.read and not fit(stores, tmp_path / "none", options=options, limits={"max_steps": 0}).read
    for name in ("step=3.ckpt", "epoch_end_3.ckpt"):
        longer = fit(stores, tmp_path / "on", options=options, limits={"max_steps": 5}, resume=tmp_path / name)
        assert [entry[3:] for entry in longer.read] == [entry[3:] for entry in whole.read if entry[0] >= 3]
        assert torch.equal(longer.weight, whole.weight)


def test_workers_do_not_change_what_follows(stores, tmp_path):
    options = {"batch_size": 5, "accumulate_grad_batches": 2}
    whole = fit(stores, tmp_path, options=options, limits={"max_steps": 5})
    for step in (1, 2, 3):
        file = tmp_path / f"step={step}.ckpt"
        resumed = fit(stores, tmp_path / "on", options=options, limits={"max_steps": 5}, resume=file, num_workers=1)
        assert resumed.read == [entry for entry in whole.read if entry[0] >= step]


class SaveInside(pl.Callback):
    """Write a checkpoint between two micro-batches of a step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 0:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_inside_a_step_is_not_resumed(stores, tmp_path):
    options, limits = {"batch_size": 3, "accumulate_grad_batches": 2}, {"max_steps": 1}
    fit(stores, tmp_path, options=options, limits=limits, callbacks=[SaveInside(tmp_path / "inside.ckpt")])
    with pytest.raises(ValueError, match="inside an optimiser step, after micro-batch 1 of 2"):
        fit(stores, tmp_path / "on", options=options, limits=limits, resume=tmp_path / "inside.ckpt")


def test_the_state_is_plain_values_and_places_the_next_loader(stores):
    module = ScoredSequencesDataModule(*stores, batch_size=2)
    state = module.state_dict()
    assert all(isinstance(value, int | str | bool) for value in state.values())
    other = ScoredSequencesDataModule(*stores, batch_size=2)
    other.load_state_dict(state | {"micro_batches": 3 * 6 + 4})
    reference = module.train_dataloader()
    reference.sampler.set_epoch(3)
    expected = [batch["sequence_index"].tolist() for batch in reference]
    loader = other.train_dataloader()
    assert [batch["sequence_index"].tolist() for batch in loader] == expected[4:] and len(loader) == 6
    assert other.state_dict() == state | {"micro_batches": 22}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"seed": 1}, "seed: 42, now 1"),
        ({"shuffle": False}, "shuffle: True, now False"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: 1, now 2"),
        ({"batch_size": 2}, "sequences_per_micro_batch: 1, now 2"),
    ],
)
def test_resuming_in_another_order_is_refused(stores, options, name):
    state = ScoredSequencesDataModule(*stores).state_dict()
    with pytest.raises(ValueError, match=f"another {name}"):
        ScoredSequencesDataModule(*stores, **options).load_state_dict(state)


def test_a_run_of_steps_does_not_go_on_as_one_of_epochs(stores, tmp_path):
    options = {"batch_size": 5, "accumulate_grad_batches": 2}
    fit(stores, tmp_path, options=options, limits={"max_steps": 1})
    with pytest.raises(ValueError, match="another run_length: steps, now epochs"):
        fit(stores, tmp_path, options=options, limits={"max_epochs": 2}, resume=tmp_path / "step=1.ckpt")


def test_resuming_with_other_data_is_refused(stores, tmp_path):
    state = ScoredSequencesDataModule(*stores).state_dict()
    with pytest.raises(ValueError, match="another scores"):
        ScoredSequencesDataModule(stores[0]).load_state_dict(state)
    other = write_sequences(tmp_path / "other", sizes=(40,))
    with pytest.raises(ValueError, match="another sequences"):
        ScoredSequencesDataModule(other).load_state_dict(state | {"scores": None})
