"""Blocks and what is drawn for them: every token once, the same for every method, independent of how it is batched."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from datamodules.loading import Share
from datamodules.scored_batches import SequencePlan
from datamodules.sentinel import SentinelCollator, SentinelTextDataModule
from datamodules.sentinel_blocks import BlockBatches, Blocks, PlainCollator
from patches.sentinel import PLAIN, Sentinels, SpanLayout, SpanSampler

SENTINELS = Sentinels(259, (260,))


class Counted(list):
    def read(self, start, stop):
        return np.arange(start, stop)


def items(*numbers, length=30, **more):
    draw = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (8, length), generator=draw)
    return [{"input_ids": blocks[number], "index": number, **more} for number in numbers]


def make(corpus, **options):
    data = SentinelTextDataModule(
        corpus, **{"sentinels": SENTINELS, "sampler": SpanSampler(0.6), "context_length": 64} | options
    )
    data.setup("fit")
    return data


def plain(batch):
    """The original tokens of each row of a batch with sentinels."""
    rows = zip(batch["input_ids"], batch["kind"], strict=True)
    return torch.stack([ids[kind == PLAIN] for ids, kind in rows])


def test_rows_hold_their_block_and_reach_the_ratio():
    batch = SentinelCollator(SENTINELS, SpanSampler(0.6))(items(0, 1, 2))
    layout = SpanLayout(batch["input_ids"], batch["kind"], batch["span"])
    assert [batch[name].dtype for name in ("input_ids", "kind", "span")] == [torch.int64, torch.int8, torch.int32]
    assert torch.equal(plain(batch), torch.stack([item["input_ids"] for item in items(0, 1, 2)]))
    assert layout.achieved_ratio.tolist() == pytest.approx([0.6] * 3)


def test_micro_batches_take_ratios_in_turn(tiny_corpus):
    sampler = SpanSampler(policy="budget", max_length=8, protect_head=1)
    data = make(tiny_corpus, sampler=sampler, ratios=[0.25, 0.75], max_steps=3, batch_size=2)
    batches = list(data.train_dataloader())
    assert [int(batch["ratio_index"]) for batch in batches] == [0, 1, 0]
    fields = ("input_ids", "kind", "span")
    for batch, ratio in zip(batches, [0.25, 0.75, 0.25], strict=True):
        layout = SpanLayout(*(batch[name] for name in fields), batch["forget"])
        assert layout.achieved_ratio.tolist() == [ratio] * 2
        assert layout.forget.tolist() == [replace(sampler, compression_ratio=ratio).forget(64, 1)] * 2
    assert "ratio_index" not in next(iter(data.val_dataloader()))
    baseline = make(tiny_corpus, method="scattered", ratios=[0.25, 0.75], max_steps=2)
    assert [batch["keep"].float().mean().item() for batch in baseline.train_dataloader()] == [0.75, 0.25]


def test_spans_depend_on_seed_epoch_and_block_only():
    def spans(*numbers, seed=0, epoch=0, resample=True):
        collator = SentinelCollator(SENTINELS, SpanSampler(0.6), seed=seed, resample=resample)
        collator.set_epoch(epoch)
        batch = collator(items(*numbers))
        rows = zip(batch["kind"].tolist(), batch["span"].tolist(), strict=True)
        return [[(k, s) for k, s in zip(*row, strict=True) if k >= 0] for row in rows]

    random.seed(5)
    first = spans(3, 1)
    state = random.getstate()
    assert spans(1, 2, 3)[::2] == first[::-1] and random.getstate() == state
    assert spans(3, 1, epoch=1) != first and spans(3, 1, seed=1) != first
    assert spans(3, 1, epoch=1, resample=False) == first
    assert first[0] != first[1]


def test_an_epoch_in_the_item_wins():
    collator = SentinelCollator(SENTINELS, SpanSampler(0.6))
    named = collator(items(2, epoch=4))["kind"]
    collator.set_epoch(4)
    assert torch.equal(named, collator(items(2))["kind"])


def test_scattered_keeps_exactly_and_other_baselines_are_plain():
    given = items(0, 1, epoch=0)
    batch = PlainCollator("scattered", 0.6)(given)
    assert batch["keep"].sum(1).tolist() == [12, 12]
    assert torch.equal(PlainCollator("scattered", 0.6)(given[1:])["keep"][0], batch["keep"][1])
    assert set(PlainCollator("local", 0.6)(given)) == {"input_ids"}
    later = PlainCollator("scattered", 0.6)(items(0, 1, epoch=1))
    assert not torch.equal(later["keep"], batch["keep"])


def test_blocks_cover_the_stream_but_its_last_part():
    blocks = Blocks(Counted(range(23)), 5)
    assert torch.cat([blocks[i] for i in range(len(blocks))]).tolist() == list(range(20))
    assert len(Blocks(Counted(range(23)), 5, max_blocks=2)) == 2
    with pytest.raises(ValueError, match="23 tokens are fewer than one block of 24"):
        Blocks(Counted(range(23)), 24)


def test_all_methods_read_the_same_tokens(tiny_corpus):
    found = {}
    for method in ("sentinel", "local", "scattered", "dense"):
        data = make(tiny_corpus, method=method, max_steps=3, accumulate_grad_batches=2, seed=5)
        loaders = (data.train_dataloader(), data.val_dataloader())
        rows = [batch for loader in loaders for batch in loader]
        found[method] = torch.cat([plain(b) if "kind" in b else b["input_ids"] for b in rows])
        assert all(batch["num_step_targets"] == 2 * 4 * 63 for batch in rows[:6])
        assert len(loaders[0]) == 6
    assert all(torch.equal(found["sentinel"], other) for other in found.values())


def test_a_resumed_run_reads_what_follows(tiny_corpus):
    whole = list(make(tiny_corpus, max_steps=4, accumulate_grad_batches=2).train_dataloader())
    data = make(tiny_corpus, max_steps=4, accumulate_grad_batches=2)
    data.load_state_dict(data.state_dict() | {"step": 3})
    rest = list(data.train_dataloader())
    assert len(rest) == 2
    assert all(torch.equal(a[name], b[name]) for a, b in zip(whole[6:], rest, strict=True) for name in a)
    with pytest.raises(ValueError, match="another seed: 0, now 3"):
        make(tiny_corpus, seed=3, accumulate_grad_batches=2).load_state_dict(data.state_dict())


def test_ratios_taken_in_turn_bind_a_run_to_its_micro_batches(tiny_corpus):
    shapes = ({"batch_size": 4, "accumulate_grad_batches": 1}, {"batch_size": 2, "accumulate_grad_batches": 2})
    make(tiny_corpus, **shapes[1]).load_state_dict(make(tiny_corpus, **shapes[0]).state_dict())
    one, other = (make(tiny_corpus, ratios=[0.3, 0.6], **shape) for shape in shapes)
    with pytest.raises(ValueError, match="another accumulate_grad_batches: 1, now 2"):
        other.load_state_dict(one.state_dict())


def test_a_checkpoint_inside_a_step_is_refused(tiny_corpus):
    data = make(tiny_corpus, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="inside optimiser step 3, after micro-batch 1 of 2"):
        data.load_state_dict(data.state_dict() | {"step": 3, "micro_batch": 1})


def test_ranks_share_the_blocks_and_repeat_none_of_them_for_scoring():
    blocks = Blocks(Counted(range(70)), 10)
    seen = []
    for rank in range(2):
        plan = SequencePlan(len(blocks), 2, share=Share(rank, 2))
        batches = [BlockBatches(blocks, plan, PlainCollator("dense", 0.0))[i] for i in range(plan.num_micro_batches)]
        seen += [int(row[0]) for batch in batches if batch["scored"] for row in batch["input_ids"]]
    assert sorted(seen) == list(range(0, 70, 10))
    plan = SequencePlan(5, 4, share=Share(1, 2))
    assert [bool(BlockBatches(Blocks(Counted(range(50)), 10), plan, PlainCollator("dense", 0.0))[0]["scored"])] == [
        True
    ]
    lonely = SequencePlan(1, 1, share=Share(1, 2))
    assert not BlockBatches(Blocks(Counted(range(10)), 10), lonely, PlainCollator("dense", 0.0))[0]["scored"]


def test_epochs_draw_new_spans_over_their_seam():
    blocks = Blocks(Counted(range(90)), 30)
    plan = SequencePlan(3, 2, seed=1, shuffle=True, endless=True)
    collator = SentinelCollator(SENTINELS, SpanSampler(0.6))
    batches = BlockBatches(blocks, plan, collator, length=3)
    rows = [
        (int(row[kind == PLAIN][0]) // 30, kind)
        for b in map(batches.__getitem__, range(3))
        for row, kind in zip(b["input_ids"], b["kind"], strict=True)
    ]
    first, second = dict(rows[:3]), dict(rows[3:])
    assert set(first) == set(second) == {0, 1, 2}
    for number, kind in second.items():
        collator.set_epoch(1)
        again = collator([{"input_ids": blocks[number], "index": number}])["kind"][0]
        assert torch.equal(kind[: len(again)], again)
    assert any(not torch.equal(first[n][first[n] >= 0], second[n][second[n] >= 0]) for n in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"context_length": 1}, "context_length must be at least 2"),
        ({"max_eval_blocks": 0}, "max_eval_blocks"),
        ({"method": "global"}, "unknown method"),
        ({"sentinels": None}, "needs sentinels"),
        ({"sampler": SpanSampler(0.9, max_length=4)}, r"remove at most 0.7500; lower it, or raise sampler.max_length"),
        ({"context_length": 10**6}, "fewer than one block"),
    ],
)
def test_refusals(tiny_corpus, options, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_corpus, **options)
