"""Landmark attention: published results, and the blocks read from a cache against a search by hand."""

import pytest
import torch
from model_cases import fixture, landmark_config, part, relative_error, small_landmark, token_ids

from kernels.landmark.reference import landmark_softmax_row
from models.landmark import LandmarkConfig, LandmarkForCausalLM
from models.landmark.retrieval import TIE, Frame, best_blocks, top_k_attention
from models.rotary import rotary_at, rotate


def test_landmark_equals_the_published_model():
    metadata, tensors = fixture("landmark_lm")
    config = LandmarkConfig.from_reference_config(metadata["reference_config"])
    assert (config.chunk_size, config.num_hidden_layers, config.landmark_token_id) == (7, 2, 100)
    weights = {f"module.language_model.{name}": tensor for name, tensor in part(tensors, "weights/").items()}
    model = LandmarkForCausalLM.from_reference_state_dict(weights, config)
    ids = tensors["input_ids"].long()
    output = model(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(output.logits, tensors["logits"], atol=2e-5, rtol=0)
    assert abs(output.loss.item() - tensors["loss"].item()) <= 2e-6
    gradients, expected = model.to_reference_state_dict(gradients=True), part(tensors, "grads/")
    assert gradients.keys() == expected.keys()
    assert max(relative_error(gradients[name], value) for name, value in expected.items()) <= 1e-4


def _by_hand(query, key, value, position, frame):
    """One query ``[D]``: place the blocks, score their landmarks, read the best ones in their order."""
    size, top_k = frame.block_size, frame.top_k
    own, cell = position // size, position % size

    def turned(x, place):
        return rotate(x[:, None], rotary_at(torch.arange(place, place + len(x)), x.shape[1], theta=frame.rope_theta))[
            :, 0
        ]

    asked = turned(query[None], top_k * size + cell)[0]
    scores = {}
    for block in range(own):
        place = max(top_k - (own - block), -1) * size + size - 1
        scores[block] = asked @ turned(key[block * size + size - 1][None], place)[0] * len(query) ** -0.5
    # Older blocks that nearly tie count as equal, and the later one is read.
    highest = max([scores[block] for block in range(own - top_k)], default=0.0)
    for block in range(own - top_k):
        scores[block] = highest - ((highest - scores[block]) / TIE).round() * TIE
    best = sorted(sorted(scores, key=lambda block: (-scores[block], -block))[:top_k])
    start = (top_k - len(best)) * size
    rows = [range(block * size, block * size + size) for block in best]
    rows.append(range(own * size, position + 1))
    chosen = torch.tensor([index for row in rows for index in row])
    seen = turned(key[chosen], start) @ asked * len(query) ** -0.5
    return landmark_softmax_row(seen, len(best) * size + cell, size) @ value[chosen]


@pytest.mark.parametrize(("heads", "kv_heads", "top_k"), [(2, 2, 2), (4, 2, 1), (3, 1, 9)])
def test_blocks_read_from_a_cache_are_those_found_by_hand(heads, kv_heads, top_k):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 23, n, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    positions, frame = torch.arange(23).expand(2, -1), Frame(block_size=4, top_k=top_k, rope_theta=100.0)
    out = top_k_attention(query, key, value, positions, frame)
    for row, position, head in torch.cartesian_prod(*map(torch.arange, (2, 23, heads))).tolist():
        kv_head = head // (heads // kv_heads)
        expected = _by_hand(query[row, position, head], key[row, :, kv_head], value[row, :, kv_head], position, frame)
        torch.testing.assert_close(out[row, position, head], expected, atol=2e-6, rtol=1e-5)


def test_best_blocks_in_their_order():
    scores = torch.tensor([3.0, 9, 1, 9, 5, 100])[None, None, None]
    assert best_blocks(scores, torch.tensor([[5]]), 3).tolist() == [[[[1, 3, 4]]]]
    assert best_blocks(scores, torch.tensor([[4]]), 1).tolist() == [[[[3]]]]
    assert best_blocks(scores, torch.tensor([[1]]), 3).tolist() == [[[[-1, -1, 0]]]]
    assert best_blocks(scores[..., :2], torch.tensor([[0]]), 3).tolist() == [[[[-1, -1, -1]]]]


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, (torch.arange(47) >= torch.tensor([[0], [9]])).long()])
def test_pieces_change_nothing_about_what_is_read(mask):
    model, ids = small_landmark(chunk_top_k=2), token_ids(2, 47)
    whole = model(ids, attention_mask=mask, use_cache=True).logits
    full = model(ids, attention_mask=mask, use_cache=False).logits
    cache, start, outputs = model.new_cache(), 0, []
    for length in (3, 4, 17, 1, 1, 5, 6, 10):
        seen = None if mask is None else mask[:, : start + length]
        outputs.append(model(ids[:, start : start + length], attention_mask=seen, past_key_values=cache).logits)
        start += length
    valid = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(outputs, 1)[valid], whole[valid], atol=1e-4, rtol=0)
    # Two earlier blocks of five are all there are up to token 15; later tokens read two of more.
    torch.testing.assert_close(whole[0, :15], full[0, :15], atol=1e-4, rtol=0)
    assert (whole[0, 20:] - full[0, 20:]).abs().max() > 1e-2


@torch.no_grad()
def test_generation_reads_the_best_blocks():
    model = small_landmark(chunk_top_k=1)
    prompt = ids = token_ids(1, 19)
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=True).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None), ids)


def test_config_errors():
    for changes, message in [
        ({"chunk_top_k": 0}, "chunk_top_k must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"landmark_token_id": 61}, "a token of its own"),
        ({"hidden_size": 12}, "even"),
    ]:
        with pytest.raises(ValueError, match=message):
            landmark_config(**changes)
    layers = {"vocab_size": 200, "chunk_id": 199, "pad_id": 198, "bos_id": 197, "decoder_layers": [2, 3]}
    assert LandmarkConfig.from_reference_config({**layers, "num_hidden_layers": -1, "mem_freq": 50}).chunk_size == 50
    assert LandmarkConfig.from_reference_config(layers).num_hidden_layers == 5
