"""Random sizes, padding, documents and pieces in float64: all ways to compute a token agree to rounding."""

import random

import pytest
import torch
from model_cases import small_drt, token_ids

from models.drt import DRTCache

TOLERANCE = 1e-11


def _case(seed):
    draw = random.Random(seed)
    model = small_drt(
        chunk_size=draw.choice([1, 2, 3, 5, 8]),
        chunk_top_k=draw.choice([1, 2, 4, 9]),
        window_size=draw.choice([1, 2, 7, 12, 100]),
        layers_per_group=draw.choice([[1], [1, 1], [2, 1]]),
        softmax_off_by_one=draw.random() < 0.5,
        num_key_value_heads=draw.choice([1, 2, 4]),
        chunk_num_key_value_heads=draw.choice([1, 2, 4]),
    ).double()
    length = draw.randint(1, 50)
    ids = token_ids(draw.randint(1, 3), length, seed=seed)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row in valid:
        start = draw.randint(0, length // 2)
        # Some rows are all padding.
        row[start : draw.choice([length, draw.randint(start, length)])] = True
    return draw, model, ids, valid


def _alone(model, ids, kept):
    return model(ids[kept][None], use_cache=False).logits[0]


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_padded_packed_and_decoded_tokens_equal_lone_ones(seed):
    draw, model, ids, valid = _case(seed)
    padded = model(ids, attention_mask=valid, use_cache=False).logits
    assert torch.isfinite(padded).all()
    for row, kept in enumerate(valid):
        if kept.any():
            torch.testing.assert_close(padded[row, kept], _alone(model, ids[row], kept), atol=TOLERANCE, rtol=0)

    names = torch.tensor([sorted(draw.randrange(4) for _ in row) for row in ids.tolist()])
    packed = model(ids, attention_mask=valid, document_ids=names).logits
    assert torch.isfinite(packed).all()
    for row in range(len(ids)):
        for name in names[row].unique():
            kept = valid[row] & (names[row] == name)
            if kept.any():
                torch.testing.assert_close(packed[row, kept], _alone(model, ids[row], kept), atol=TOLERANCE, rtol=0)

    cache, pieces, start = DRTCache(model.config, offload=draw.random() < 0.5), [], 0
    while start < ids.shape[1]:
        stop = min(start + draw.choice([1, 1, 1, 2, 7, 20]), ids.shape[1])
        pieces.append(model(ids[:, start:stop], attention_mask=valid[:, :stop], past_key_values=cache).logits)
        start = stop
    decoded = torch.cat(pieces, dim=1)
    assert torch.isfinite(decoded).all()
    torch.testing.assert_close(decoded[valid], padded[valid], atol=TOLERANCE, rtol=0)
