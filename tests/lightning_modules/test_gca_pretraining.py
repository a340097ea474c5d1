"""Statistics of a retrieval, by hand."""

import math

import pytest
import torch

from lightning_modules.gca_pretraining import retrieval_statistics, retrieval_sums


def test_statistics_by_hand():
    # Four landmarks, two slots. The first retrieves nothing, the second one chunk, the others two.
    indices = torch.tensor([[[-1, -1], [0, -1], [0, 1], [2, 0]]], dtype=torch.int32)
    weights = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]])
    found = retrieval_statistics(retrieval_sums(((indices, weights),)))
    entropy = (0 + math.log(2) - 0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 3
    distance = (1 + (0.5 * 2 + 0.5 * 1) + (0.75 * 1 + 0.25 * 3)) / 3
    assert found["retrieval_entropy"].item() == pytest.approx(entropy)
    assert found["retrieval_distance"].item() == pytest.approx(distance)
    assert found["empty_slots"].item() == pytest.approx(3 / 8)


def test_nothing_retrieved_is_no_division_by_zero():
    found = retrieval_statistics(retrieval_sums(((torch.full((1, 2, 3), -1), torch.zeros(1, 2, 3)),)))
    assert found["retrieval_entropy"] == 0 and found["retrieval_distance"] == 0 and found["empty_slots"] == 1


def test_parts_and_processes_add_up_to_the_whole():
    indices = torch.tensor([[[-1, -1], [0, -1], [0, 1], [2, 0]]], dtype=torch.int32)
    weights = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.75, 0.25]]])
    parts = [((indices[:, :3], weights[:, :3]),), ((indices[:, 3:], weights[:, 3:]),)]
    sums = retrieval_sums(parts[0]) + retrieval_sums(parts[1], first_chunk=3)
    torch.testing.assert_close(sums, retrieval_sums(((indices, weights),)))
