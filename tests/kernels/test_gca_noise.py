import math

import pytest
import torch

from kernels.gca import retrieve_chunks
from kernels.gca.noise import draw_seed, gumbel, row_seeds
from kernels.gca.selection import BLOCK


def seed(number):
    return draw_seed(torch.device("cpu"), torch.Generator().manual_seed(number))


def test_it_is_gumbel():
    """Kolmogorov-Smirnov at 0.1 %, and the first two moments."""
    noise = gumbel(seed(0), 2, slice(5, 105), slice(0, 2000)).double()
    values = torch.exp(-torch.exp(-noise)).flatten().sort().values
    count = values.numel()
    distance = (values - (torch.arange(count) + 0.5) / count).abs().max() + 0.5 / count
    assert distance * math.sqrt(count) < 1.95
    assert abs(noise.mean() - 0.57722) < 0.01 and abs(noise.std() - math.pi / math.sqrt(6)) < 0.01
    assert torch.isfinite(noise).all() and noise.dtype == torch.float64 and noise.max() > 10


@pytest.mark.parametrize("shift", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 3, -5)])
def test_neighbours_are_independent(shift):
    noise = gumbel(seed(1), 3, slice(0, 300), slice(0, 300))
    noise = (noise - noise.mean()) / noise.std()
    moved = noise.roll(shift, (0, 1, 2))
    assert (noise * moved).mean().abs() * math.sqrt(noise.numel()) < 3.5


def test_no_two_rows_are_shifted_copies():
    noise = gumbel(seed(2), 1, slice(0, 2000), slice(0, 500))
    values = noise.flatten().sort().values
    assert (values.diff() == 0).float().mean() < 0.06  # float32 rounds a million draws onto each other, no more


def test_it_depends_on_the_seed_and_the_position_alone():
    whole = gumbel(seed(3), 2, slice(0, 40), slice(0, 70))
    assert torch.equal(gumbel(seed(3), 2, slice(7, 11), slice(13, 64)), whole[:, 7:11, 13:64])
    assert not (gumbel(seed(4), 2, slice(0, 40), slice(0, 70)) == whole).any()
    generator = torch.Generator().manual_seed(3)
    first, second = (draw_seed(torch.device("cpu"), generator) for _ in range(2))
    assert first == seed(3) and first != second


@pytest.mark.parametrize("block", [40, 1500])
def test_retrieval_does_not_depend_on_its_blocks(monkeypatch, block):
    generator = torch.Generator().manual_seed(5)
    queries, landmarks = (torch.randn(2, 60, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def run():
        return retrieve_chunks(queries, landmarks, 4, noise="gumbel", generator=torch.Generator().manual_seed(6))

    expected = run()
    monkeypatch.setitem(BLOCK, "cpu", block)
    indices, scores = run()
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(scores, expected[1])
    assert not torch.equal(retrieve_chunks(queries, landmarks, 4)[0], expected[0])


def test_seeds_of_rows_make_noise_that_knows_no_batch():
    seeds = row_seeds(7, torch.tensor([4, 9, 2]))
    together = gumbel(seeds, 3, slice(0, 30), slice(0, 50))
    for number, alone in zip((4, 9, 2), together, strict=True):
        assert torch.equal(gumbel(row_seeds(7, torch.tensor([number])), 1, slice(0, 30), slice(0, 50))[0], alone)
    assert len(set(row_seeds(7, torch.arange(1000)).tolist()) | set(row_seeds(8, torch.arange(1000)).tolist())) == 2000
    correlation = torch.corrcoef(gumbel(row_seeds(0, torch.arange(6)), 6, slice(0, 200), slice(0, 200)).flatten(1))
    assert (correlation - torch.eye(6)).abs().max() < 3.5 / 200


def test_seeds_must_be_one_for_each_row():
    queries, landmarks = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for seeds in (torch.zeros(3, dtype=torch.int64), torch.zeros(2)):
        with pytest.raises(ValueError, match="seeds must be int64"):
            retrieve_chunks(queries, landmarks, 1, noise="gumbel", generator=seeds)
