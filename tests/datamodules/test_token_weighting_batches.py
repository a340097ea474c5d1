"""Batches of scored sequences: their own scores, the targets of their step, and every sequence once an epoch."""

from functools import partial
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, HalfPrecision
from scored_cases import LENGTH, write_both, write_scores, write_sequences

from datamodules.loading import Share
from datamodules.scored_batches import EpochSampler, SequenceBatches, SequencePlan, epoch_order
from datamodules.token_weighting import ScoredSequencesDataModule
from losses.base_scoring import unpack_scores


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return write_both(tmp_path_factory.mktemp("data"))  # 12 sequences


def make(stores, **options):
    module = ScoredSequencesDataModule(*stores, **options)
    module.setup("fit")
    return module


def numbers(batches):
    return [batch["sequence_index"].tolist() for batch in batches]


def in_order(batches):
    return [number for rows in numbers(batches) for number in rows]


def as_lists(batches):
    return [{name: tensor.tolist() for name, tensor in batch.items()} for batch in batches]


@pytest.mark.parametrize("as_paths", [False, True])
def test_a_batch_holds_its_sequences_and_their_scores_bit_for_bit(stores, as_paths):
    given = [store.path for store in stores] if as_paths else stores
    sequences, scores = stores
    for batch in make(given, batch_size=5).train_dataloader():
        size = len(batch["sequence_index"])
        assert set(batch) == {"input_ids", "valid", "sequence_index", "base_nll_bits", "num_step_targets"}
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()}
        assert shapes["input_ids"] == ((size, LENGTH), torch.int64)
        assert shapes["valid"] == ((size, LENGTH - 1), torch.bool)
        assert shapes["base_nll_bits"] == ((size, LENGTH - 1), torch.int32)
        assert shapes["sequence_index"] == ((size,), torch.int64) and shapes["num_step_targets"] == ((), torch.int64)
        for row, number in enumerate(batch["sequence_index"].tolist()):
            item = sequences[number]
            assert torch.equal(batch["input_ids"][row], item["input_ids"])
            assert torch.equal(batch["valid"][row], item["valid"])
            bits = unpack_scores(batch["base_nll_bits"])[row]
            assert bits.numpy().tobytes() == scores[number].numpy().tobytes() and bits.isnan().any()


def test_without_scores_there_are_none(stores):
    batch = next(iter(make(stores[:1]).train_dataloader()))
    assert set(batch) == {"input_ids", "valid", "sequence_index", "num_step_targets"}


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (1, 5), (5, 1), (5, 2), (2, 3), (100, 2)])
def test_every_sequence_comes_once_an_epoch_and_batches_announce_their_step(stores, batch_size, accumulate):
    module = make(stores, batch_size=batch_size, accumulate_grad_batches=accumulate)
    loader = module.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == -(-12 // batch_size)
    assert sorted(in_order(batches)) == list(range(12))
    for first in range(0, len(batches), accumulate):
        window = batches[first : first + accumulate]
        targets = sum(int(batch["valid"].sum()) for batch in window)
        assert [int(batch["num_step_targets"]) for batch in window] == [targets] * len(window)


def test_the_order_is_a_function_of_seed_and_epoch(stores):
    loader = make(stores, batch_size=5).train_dataloader()
    epochs = []
    for epoch in (0, 1, 2, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(in_order(loader))
    assert epochs[0] == epochs[4] and epochs[1] == epochs[3]
    assert len({tuple(order) for order in epochs}) == 3 and all(sorted(order) == list(range(12)) for order in epochs)
    other = in_order(make(stores, batch_size=3).train_dataloader())
    assert other == epochs[0]
    assert in_order(make(stores, seed=43).train_dataloader()) != epochs[0]
    plain = make(stores, shuffle=False).train_dataloader()
    for epoch in (0, 1):
        plain.sampler.set_epoch(epoch)
        assert in_order(plain) == list(range(12))


def test_workers_change_nothing(stores):
    options = {"batch_size": 2, "accumulate_grad_batches": 4, "validation": stores[0]}
    alone, helped = make(stores, **options), make(stores, **options, num_workers=2)
    pairs = [(module.train_dataloader(), module.val_dataloader()[0]) for module in (alone, helped)]
    for one, other in zip(*pairs, strict=True):
        one.sampler.set_epoch(1)
        other.sampler.set_epoch(1)
        assert str(as_lists(one)) == str(as_lists(other))


def test_iterating_leaves_the_global_random_state_alone(stores):
    module = make(stores, validation=stores[0])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(module.train_dataloader())
    list(module.val_dataloader()[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("num_ranks", [2, 5])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (1, 2), (2, 3)])
def test_ranks_share_an_epoch_and_call_the_model_equally_often(stores, num_ranks, batch_size, accumulate):
    shares = []
    for rank in range(num_ranks):
        plan = SequencePlan(12, batch_size, accumulate=accumulate, seed=1, shuffle=True, share=Share(rank, num_ranks))
        data = SequenceBatches(*stores, plan=plan, training=True)
        shares.append([data[i] for i in range(plan.num_micro_batches)])
    assert len({len(share) for share in shares}) == 1
    rows = [
        int(number)
        for share in shares
        for batch in share
        for number, valid in zip(batch["sequence_index"], batch["valid"], strict=True)
        if valid.any()
    ]
    assert sorted(rows) == list(range(12))
    for share in shares:
        for first in range(0, len(share), accumulate):
            window = share[first : first + accumulate]
            targets = sum(int(batch["valid"].sum()) for batch in window)
            assert {int(batch["num_step_targets"]) for batch in window} == {targets}


@pytest.mark.parametrize("endless", [False, True])
def test_a_step_reads_the_same_sequences_on_any_number_of_ranks(endless):
    def step(num_ranks, batch_size, accumulate, number):
        found = []
        for rank in range(num_ranks):
            share = Share(rank, num_ranks)
            plan = SequencePlan(
                24, batch_size, accumulate=accumulate, seed=1, shuffle=True, share=share, endless=endless
            )
            found += [row for index in plan.window(number * accumulate) for row in plan.rows(index).tolist()]
        return sorted(found)

    for number in range(3):
        assert step(1, 1, 8, number) == step(2, 2, 2, number) == step(4, 1, 2, number) == step(8, 1, 1, number)


def with_trainer(module, *, rank=0, num_ranks=1, sampler=False, accumulate=1, counts_itself=False, max_steps=-1):
    strategy = SimpleNamespace(
        distributed_sampler_kwargs={"rank": rank, "num_replicas": num_ranks},
        handles_gradient_accumulation=counts_itself,
    )
    module.trainer = SimpleNamespace(
        strategy=strategy,
        max_steps=max_steps,
        limit_train_batches=1.0,
        accumulate_grad_batches=accumulate,
        num_training_batches=float("inf"),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=sampler),
    )
    return module


def test_the_strategy_says_which_share_is_ours(stores):
    options = {"batch_size": 2, "shuffle": False, "validation": stores[0]}
    found = []
    for rank in range(2):
        module = with_trainer(ScoredSequencesDataModule(*stores, **options), rank=rank, num_ranks=2)
        module.setup("fit")
        found.append((numbers(module.train_dataloader()), numbers(module.val_dataloader()[0])))
    assert found[0][0] == found[0][1] == [[0, 2], [4, 6], [8, 10]]
    assert found[1][0] == found[1][1] == [[1, 3], [5, 7], [9, 11]]


def test_several_processes_need_a_trainer_that_leaves_the_samplers_alone(stores):
    for sampler in (True, False):
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=sampler, logger=False, barebones=False
        )
        module = ScoredSequencesDataModule(*stores, validation=stores[0])
        module.trainer = trainer
        if sampler:
            for call in (partial(module.setup, "fit"), module.train_dataloader, module.val_dataloader):
                with pytest.raises(ValueError, match=r"2 processes need Trainer\(use_distributed_sampler=False\)"):
                    call()
        else:
            module.setup("fit")
            assert len(module.train_dataloader()) == 6
    single = with_trainer(ScoredSequencesDataModule(*stores), sampler=True)
    single.setup("fit")
    assert len(single.train_dataloader()) == 12


def test_a_run_of_steps_reads_epochs_without_a_seam_in_whole_windows(stores):
    found = []
    for rank in range(2):
        module = ScoredSequencesDataModule(*stores, batch_size=5, accumulate_grad_batches=2)
        with_trainer(module, rank=rank, num_ranks=2, accumulate=2, max_steps=3, counts_itself=True).setup("fit")
        batches = list(module.train_dataloader())
        assert len(batches) == len(module.train_dataloader()) == 6
        found.append(numbers(batches))
        for first in (0, 2, 4):
            targets = sum(int(batch["valid"].sum()) for batch in batches[first : first + 2])
            assert [int(batch["num_step_targets"]) for batch in batches[first : first + 2]] == [targets] * 2
    read = [row for one, two in zip(*found, strict=True) for pair in zip(one, two, strict=True) for row in pair]
    assert len(read) == 60
    assert read == [int(row) for epoch in range(5) for row in epoch_order(12, 42, epoch)]


def test_where_the_engine_counts_micro_batches_epochs_end_with_a_step(stores):
    module = ScoredSequencesDataModule(*stores, accumulate_grad_batches=5)
    with pytest.raises(ValueError, match=r"12 micro-batches of an epoch are no multiple of .*=5"):
        with_trainer(module, accumulate=5, counts_itself=True).setup("fit")
    module = ScoredSequencesDataModule(*stores, accumulate_grad_batches=4)
    with_trainer(module, accumulate=4, counts_itself=True).setup("fit")


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_validation_reads_every_sequence_once_in_order_without_step_keys(stores, num_ranks):
    loaders = []
    for rank in range(num_ranks):
        module = ScoredSequencesDataModule(*stores, validation=stores[0].path, batch_size=2)
        loaders += with_trainer(module, rank=rank, num_ranks=num_ranks).val_dataloader()
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    assert all(set(batch) == {"input_ids", "valid", "sequence_index"} for batch in batches)
    kept = [batch for batch in batches if batch["valid"].any()]
    assert sorted(in_order(kept)) == list(range(12))
    assert sum(int(batch["valid"].sum()) for batch in batches) == stores[0].meta["num_targets"]
    if num_ranks == 1:
        assert in_order(batches) == list(range(12))
        loaders[0].sampler.set_epoch(3)
        assert in_order(loaders[0]) == list(range(12))


def test_without_validation_sequences_there_is_no_loader(stores):
    assert make(stores).val_dataloader() == []


@pytest.mark.parametrize(
    "plugin",
    [HalfPrecision("bf16-true"), FSDPPrecision("bf16-true"), *map(DeepSpeedPrecision, ("bf16-true", "bf16-mixed"))],
    ids=["half", "fsdp", "deepspeed-true", "deepspeed-mixed"],
)
def test_no_precision_plugin_touches_a_batch(stores, plugin):
    assert plugin.convert_input({"x": torch.ones(1)})["x"].dtype == torch.bfloat16
    batch = make(stores, batch_size=3).train_dataloader().dataset[1]
    converted = plugin.convert_input(batch)
    assert all(torch.equal(converted[name], batch[name]) for name in batch)


class ScoreRecorder(pl.LightningModule):
    """Remembers the scores it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        scores = unpack_scores(batch["base_nll_bits"])
        self.seen |= {int(n): row.numpy().tobytes() for n, row in zip(batch["sequence_index"], scores, strict=True)}
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The .*_dataloader.* does not have many workers")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_scores_reach_the_module_bit_for_bit(stores, precision):
    module = ScoreRecorder()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, precision=precision, accelerator="cpu", enable_checkpointing=False, **options)
    trainer.fit(module, ScoredSequencesDataModule(*stores, batch_size=5))
    assert module.seen == {number: stores[1][number].numpy().tobytes() for number in range(12)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be at least 1, got 0"),
        ({"seed": -1}, "must not be negative, got -1 and 0"),
        ({"num_workers": -1}, "must not be negative, got 42 and -1"),
    ],
)
def test_impossible_options_are_refused(stores, options, message):
    with pytest.raises(ValueError, match=message):
        ScoredSequencesDataModule(*stores, **options)


def test_scores_of_other_sequences_and_incomplete_ones_are_refused(stores, tmp_path):
    other = write_sequences(tmp_path / "other", sizes=(40,))
    for scores in (stores[1], stores[1].path):
        with pytest.raises(ValueError, match=other.store_id):
            make((other, scores))
    partial = write_scores(tmp_path / "partial", other, shard_size=2, limit=1)
    with pytest.raises(ValueError, match="missing shards 1, 2 of 3"):
        make((other, partial))
    with pytest.raises(FileNotFoundError, match="no sequences at"):
        make((tmp_path / "nothing",))
    with pytest.raises(FileNotFoundError, match="no sequences at"):
        make(stores, validation=tmp_path / "nothing")


def test_another_accumulation_than_the_trainers_is_refused(stores):
    module = with_trainer(ScoredSequencesDataModule(*stores, accumulate_grad_batches=2), accumulate=4)
    with pytest.raises(ValueError, match="accumulate_grad_batches=4 and the data 2"):
        module.setup("fit")


def test_the_sampler_starts_inside_its_first_epoch_only():
    sampler = EpochSampler(4, start=11)
    assert len(sampler) == 4 and list(sampler) == [11]
    sampler.set_epoch(3)
    assert list(sampler) == [12, 13, 14, 15]
    sampler.set_epoch(2)
    started = iter(sampler)
    sampler.set_epoch(0)
    assert list(started) == [11]
