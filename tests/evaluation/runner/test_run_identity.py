"""What tells models apart in the settings of a run."""

import pytest
import torch
from torch import nn

from evaluation.runner.identity import model_fingerprint


def module(weight):
    found = nn.Module()
    found.weight = nn.Parameter(weight)
    return found


@pytest.mark.parametrize("size", [0, 1, 2, 16, 40])
def test_first_and_last_values_count(size):
    weight = torch.arange(float(size))
    found = {model_fingerprint(module(weight))}
    for place in {0, size - 1} if size else ():
        changed = weight.clone()
        changed[place] += 0.5
        found.add(model_fingerprint(module(changed)))
    assert len(found) == 1 + min(size, 2)


def test_embeddings_of_large_models_have_a_last_place():
    # 32,000 x 4,096: float32 has no 131,071,999.
    assert model_fingerprint(module(torch.zeros(1).expand(32000 * 4096))).startswith("sha256:")
