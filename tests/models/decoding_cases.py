"""Decoding in pieces through a cache against one forward, for every model of this folder."""

import torch
from model_cases import token_ids

LENGTH = 47
# Rows start at columns 0, 4 and 13; in "both", row 1 also ends early.
LEFT = (torch.arange(LENGTH) >= torch.tensor([[0], [4], [13]])).long()
BOTH = LEFT * (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 6], [LENGTH]]))
MASKS = {"none": None, "left": LEFT, "both": BOTH}


@torch.no_grad()
def decode(model, cache, ids, pieces, mask):
    """Feed pieces of the ids ``[B, T]``; returns all logits ``[B, T, V]``."""
    outputs, start = [], 0
    for length in pieces:
        seen = None if mask is None else mask[:, : start + length]
        outputs.append(model(ids[:, start : start + length], attention_mask=seen, past_key_values=cache).logits)
        start += length
    return torch.cat(outputs, dim=1)


def check_pieces(model, cache, pieces, mask, tolerance=1e-4):
    """Compare with one forward at the valid tokens; what is nowhere valid must be finite."""
    ids = token_ids(3, LENGTH)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    decoded = decode(model, cache, ids, pieces, mask)
    valid = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(decoded[valid], expected[valid], atol=tolerance, rtol=0)
    assert cache.get_seq_length() == LENGTH
    assert torch.isfinite(decoded).all()
