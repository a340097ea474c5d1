"""What belongs to a process of those that share a sequence, without any process."""

import pytest
import torch
from torch import nn

from kernels.context_parallel import Cut, SequencePart
from lightning_modules.sequence_split import SequenceSplit
from losses.cross_entropy import next_token_nll


class Group:
    """Two processes, seen from one of them."""

    size = 2

    def __init__(self, rank):
        self.rank = rank

    def part(self, length, cut):
        return SequencePart(cut.bounds(length, 2), self)


def batch(length, **more):
    ids = torch.arange(2 * length).reshape(2, length) % 11
    return {"input_ids": ids, "labels": ids.clone(), "next_token": torch.tensor([3, 4]), **more}


def test_scores_of_the_parts_are_those_of_the_sequence():
    whole, logits = batch(11), torch.randn(2, 11, 11, generator=torch.Generator().manual_seed(0))
    whole["labels"][0, 8] = -100
    nll, counted = next_token_nll(logits, whole["labels"], next_token=whole["next_token"])
    sums, counts = torch.zeros_like(nll), torch.zeros_like(counted, dtype=torch.int64)
    for rank, own_slice in enumerate((slice(0, 4), slice(4, 11))):
        own = SequenceSplit(Group(rank), Cut(4, 4)).own(whole)
        assert torch.equal(own.model_inputs()["input_ids"], whole["input_ids"][:, own_slice])
        part_nll, part_counted = own.nll(logits[:, own_slice])
        sums, counts = sums + part_nll, counts + part_counted
    torch.testing.assert_close(sums, nll, rtol=0, atol=0)
    assert torch.equal(counts, counted.long())


def test_a_validation_length_that_is_too_short_is_counted_once():
    whole = batch(7)
    logits = torch.zeros(2, 7, 11)
    owns = [SequenceSplit(Group(rank), Cut(4, 4)).own_or_whole(whole) for rank in (0, 1)]
    assert [own.part for own in owns] == [None, None]
    assert [int(own.nll(logits)[1].sum()) for own in owns] == [14, 0]


@pytest.mark.parametrize(
    ("name", "instead"), [("document_ids", "data.documents=stream"), ("attention_mask", "trainer=ddp, or fsdp2")]
)
def test_documents_and_padding_are_refused(name, instead):
    with pytest.raises(ValueError, match=f"{name} cannot be split over processes: use {instead}"):
        SequenceSplit(Group(0), Cut()).own(batch(8, **{name: torch.ones(2, 8)}))


def test_who_cannot_split_is_told():
    with pytest.raises(ValueError, match="Linear needs whole sequences, trainer=context_parallel splits them"):
        SequenceSplit.over(Group(0), nn.Linear(1, 1), problem=None)
    model = nn.Linear(1, 1)
    model.sequence_cut = Cut(4)
    with pytest.raises(ValueError, match="this loss needs whole sequences"):
        SequenceSplit.over(Group(0), model, problem="this loss needs whole sequences")
    assert SequenceSplit.over(Group(0), model, problem=None).cut == Cut(4)
    assert SequenceSplit.over(None, nn.Linear(1, 1), problem="anything").num_copies == 1
