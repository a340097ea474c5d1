"""What a step reads is a function of its number alone: for every datamodule, on any number of ranks, with any
accumulation and any number of loader workers, from the start or resumed in the middle."""

from types import SimpleNamespace

import pytest
from scored_cases import write_both

from datamodules.needles import NeedleDataModule
from datamodules.packed_text import PackedTextDataModule
from datamodules.sentinel import SentinelTextDataModule
from datamodules.summary_data import SummarizationDataModule
from datamodules.token_weighting import ScoredSequencesDataModule
from patches.compressed_rows import sentinels_after
from patches.sentinel import SpanSampler

STEPS, STOP, SAMPLES = 7, 3, 4  # 28 samples: more than an epoch of the sequences and of the pairs
# ranks, micro-batches of a step, samples of a micro-batch on a rank, loader workers
ARRANGEMENTS = [(1, 1, 4, 0), (1, 2, 2, 2), (2, 1, 2, 0), (2, 2, 1, 1), (4, 1, 1, 0)]
NEEDLES = {"context_length": 96, "chunk_size": 16, "pad_token_id": 257, "vocab_range": [48, 58], "eval_samples": 2}


@pytest.fixture(scope="module")
def make(tiny_corpus, summary_folder, tmp_path_factory):
    """Return a function from a name and an arrangement to a datamodule."""
    stores = write_both(tmp_path_factory.mktemp("stores"))
    blocks = {"context_length": 64, "seed": 5}
    kinds = {
        "packed": lambda **o: PackedTextDataModule(tiny_corpus, documents="packed", **blocks, **o),
        "needles": lambda **o: NeedleDataModule(tiny_corpus, seed=5, **NEEDLES, **o),
        "needles in stages": lambda **o: NeedleDataModule(
            tiny_corpus, curriculum=[[0, 96, 1], [2, 128], [4, 192]], **NEEDLES | {"context_length": 192}, **o
        ),
        "sentinel": lambda **o: SentinelTextDataModule(
            tiny_corpus, sentinels=sentinels_after(259), sampler=SpanSampler(0.5), **blocks, **o
        ),
        "scattered": lambda **o: SentinelTextDataModule(tiny_corpus, method="scattered", **blocks, **o),
        "scored": lambda max_steps, **o: ScoredSequencesDataModule(*stores, seed=5, **o),
        "pairs": lambda **o: SummarizationDataModule(
            summary_folder, context_length=80, max_summary_length=20, chunk_size=16, seed=5, **o
        ),
    }

    def of(kind, arrangement, rank):
        ranks, accumulate, batch_size, workers = arrangement
        data = kinds[kind](
            batch_size=batch_size, accumulate_grad_batches=accumulate, max_steps=STEPS, num_workers=workers
        )
        data.trainer = trainer_of(rank, ranks, accumulate)
        data.setup("fit")
        return data

    return of


def trainer_of(rank, ranks, accumulate, steps_done=0):
    """What datamodules ask a trainer of a run of steps."""
    progress = SimpleNamespace(
        current=SimpleNamespace(processed=0), total=SimpleNamespace(processed=steps_done * accumulate)
    )
    return SimpleNamespace(
        strategy=SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": ranks}, handles_gradient_accumulation=False
        ),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        lightning_module=None,
        accumulate_grad_batches=accumulate,
        global_step=steps_done,
        max_steps=STEPS,
        limit_train_batches=1.0,
        # Lightning knows it once the loader of a run is built.
        num_training_batches=STEPS * accumulate if steps_done else float("inf"),
    )


def rows_of(batch):
    """Everything a sample is, row by row; what numbers of rows depend on is left out."""
    names = sorted(batch.keys() - {"num_step_targets", "attention_mask"})
    rows = len(batch["input_ids"])
    found = []
    for row in range(rows):
        # Rows are padded to the longest of their micro-batch.
        is_text = (
            batch["kind"][row] >= 0 if "kind" in batch else batch.get("attention_mask", batch["input_ids"] >= 0)[row]
        )
        length = int(is_text.nonzero().max()) + 1
        values = [batch[name][row].tolist() for name in names if batch[name].dim()]
        found.append(repr([value[:length] if isinstance(value, list) else value for value in values]))
    return found


def steps_read(make, kind, arrangement, state=None):
    """Return the sorted rows of every step over all ranks, from the state on, and the state at step STOP."""
    ranks, accumulate = arrangement[:2]
    steps, targets, kept = {}, {}, None
    for rank in range(ranks):
        data = make(kind, arrangement, rank)
        first = 0
        if state is not None:
            data.load_state_dict(state)
            first = STOP
        for number, batch in enumerate(data.train_dataloader()):
            step = first + number // accumulate
            steps.setdefault(step, []).extend(rows_of(batch))
            if number % accumulate == 0 and "num_step_targets" in batch:
                targets[step] = targets.get(step, 0) + int(batch["num_step_targets"])
        data.trainer = trainer_of(rank, ranks, accumulate, steps_done=STOP)
        kept = data.state_dict()
    return {step: sorted(rows) for step, rows in steps.items()}, targets, kept


KINDS = ["packed", "needles", "needles in stages", "sentinel", "scattered", "scored", "pairs"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_the_same_on_any_ranks_with_any_workers(kind, make):
    whole, targets, state = steps_read(make, kind, ARRANGEMENTS[0])
    assert list(whole) == list(range(STEPS)) and len({tuple(rows) for rows in whole.values()}) == STEPS
    for arrangement in ARRANGEMENTS[1:]:
        found, found_targets, found_state = steps_read(make, kind, arrangement)
        assert found == whole and found_targets == targets, arrangement
        moved, moved_targets, _ = steps_read(make, kind, arrangement, state)
        assert moved == {step: whole[step] for step in range(STOP, STEPS)}, arrangement
        assert moved_targets == {step: targets[step] for step in moved if step in targets}
    back, _, _ = steps_read(make, kind, ARRANGEMENTS[0], found_state)
    assert back == moved
