"""Exchanges between processes against the same in one process, in outputs, gradients and bytes; where to cut."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from kernels.context_parallel import Cut, SequenceGroup, SequencePart
from kernels.context_parallel.reference import before_reference, up_to_here_reference
from tests.processes import run_in_processes

SIZES = [[3, 3], [4, 4, 1], [6, 5, 5, 4]]


def drawn(sizes):
    """Parts ``[2, N, 3]`` and a generator for what follows, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, size, 3, generator=generator, dtype=torch.float64) for size in sizes]
    return [part.requires_grad_() for part in parts], generator


def compare(outputs, expected, parts, own, generator, rank):
    """The output of a rank, and the gradient of its part under weights that differ by rank."""
    weights = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in expected]
    sum((part * weight).sum() for part, weight in zip(expected, weights, strict=True)).backward()
    torch.testing.assert_close(outputs, expected[rank], rtol=0, atol=0)
    (outputs * weights[rank]).sum().backward()
    true = torch.zeros_like(own) if parts[rank].grad is None else parts[rank].grad  # nobody read it
    torch.testing.assert_close(own.grad, true, rtol=0, atol=1e-12)


def exchange(sizes, group):
    rank, size = group.rank, group.size
    part = SequencePart(tuple(range(size + 1)), group)
    for name in ("before", "up_to_here"):
        parts, generator = drawn(sizes)
        own = parts[rank].detach().clone().requires_grad_()
        group.received_bytes, entry = 0, own[:, :1].nbytes
        if name == "before":
            expected, output = before_reference(parts, 2), part.before(own, 2)
            received, returned = 2 * entry * (rank > 0), 2 * entry * (rank < size - 1)
        else:
            expected, output = up_to_here_reference(parts), part.up_to_here(own, sizes)
            received = entry * max(sizes) * (size - 1)
            returned = own.nbytes * (size - 1 - rank)
        assert group.received_bytes == received
        compare(output, expected, parts, own, generator, rank)
        assert group.received_bytes == received + returned
    numbers = part.before(torch.full((2, max(sizes), 1), rank, dtype=torch.int32), 1)
    assert numbers.dtype == torch.int32 and numbers.flatten().tolist() == [rank - 1] * (2 * (rank > 0))


def half_precision(group):
    part = SequencePart((0, 1, 2, 3), group)
    own = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    output = part.up_to_here(own, [1, 1, 1])
    # 1 + 1/256 is no bf16 number, twice 1/256 added to 1 is one.
    output[:, :1].backward(torch.full((1, 1, 1), [1.0, 2**-8, 2**-8][group.rank], dtype=torch.bfloat16))
    assert own.grad is not None and float(own.grad) == ([1 + 2**-7, 0, 0][group.rank])


def too_short(group):
    if group.rank == 0:
        with pytest.raises(ValueError, match="1 entries is too short to hand 2 on"):
            SequencePart((0, 1, 2), group).before(torch.zeros(1, 1, 1), 2)


def all_of_it():
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for size, check in [(len(sizes), partial(exchange, sizes)) for sizes in SIZES] + [
        (3, half_precision),
        (2, too_short),
    ]:
        if dist.get_rank() < size:
            check(SequenceGroup(list(range(size)), dist.get_rank(), groups[size]))
    dist.barrier()


def test_processes_get_what_one_process_computes():
    assert run_in_processes(4, all_of_it) == [0] * 4


@pytest.mark.parametrize(
    ("length", "unit", "least", "bounds"),
    [
        (16380, 63, 504, (0, 4095, 8190, 12285, 16380)),
        (16380, 63, 504, (0, 2079, 4158, 6237, 8316, 10332, 12348, 14364, 16380)),
        (67, 8, 8, (0, 32, 67)),
        (26, 8, 8, (0, 16, 26)),
        (7, 1, 3, (0, 4, 7)),
        (9, 4, 100, (0, 9)),
    ],
)
def test_parts_are_even_and_cut_between_chunks(length, unit, least, bounds):
    cut = Cut(unit, least)
    assert cut.fits(length, len(bounds) - 1) and cut.bounds(length, len(bounds) - 1) == bounds


@pytest.mark.parametrize(("length", "unit", "least", "parts"), [(15, 8, 1, 2), (32, 8, 24, 2), (7, 1, 5, 2)])
def test_too_short_a_sequence_is_refused(length, unit, least, parts):
    assert not Cut(unit, least).fits(length, parts)
    with pytest.raises(ValueError, match=f"{length} tokens cannot be split into {parts} parts"):
        Cut(unit, least).bounds(length, parts)
