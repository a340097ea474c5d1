"""Pieces of any length through the caches of the baselines equal one forward; generate equals repeated forwards."""

import pytest
import torch
from decoding_cases import LEFT, LENGTH, MASKS, check_pieces, decode
from model_cases import BASELINES, SMALL_MODELS, small_block_recurrent, small_landmark, small_rpt, token_ids

from models.row_cache import appended

PIECES = {
    "tokens": [1] * LENGTH,
    "ragged": [3, 4, 17, 1, 1, 5, 6, 10],
    "segments": [13, 34],
    "blocks": [6] * 7 + [5],
}


@pytest.fixture(scope="module", params=BASELINES)
def model(request):
    return SMALL_MODELS[request.param]()


def check(model, pieces, mask, tolerance=1e-4):
    check_pieces(model, model.new_cache(), pieces, mask, tolerance)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_equal_one_forward(model, pieces, mask):
    check(model, PIECES[pieces], MASKS[mask])


@pytest.mark.parametrize(
    "build",
    [
        lambda: small_landmark(chunk_size=1),
        lambda: small_landmark(chunk_size=60, num_key_value_heads=1),
        lambda: small_block_recurrent(block_width=1),
        lambda: small_block_recurrent(block_width=60, recurrent_layers=[]),
        lambda: small_block_recurrent(recurrent_layers=[1, 2, 3], num_key_value_heads=4, num_state_vectors=9),
        lambda: small_rpt(chunk_size=1, window_size=3),
        lambda: small_rpt(chunk_size=7, window_size=1, chunk_top_k=9),
        lambda: small_rpt(chunk_size=60),
    ],
)
def test_pieces_at_extreme_sizes(build):
    model = build()
    for mask in (None, LEFT):
        check(model, [1, 1, 1, 9, 1, 1, 14, 1, 18], mask)


@pytest.mark.parametrize("mask", MASKS)
def test_pieces_are_exact_in_float64(model, mask):
    # Rounding hides nothing here: a wrong position or block would show at once.
    double = SMALL_MODELS[model.config.model_type]().double()
    check(double, [3, 4, 17, 1, 1, 5, 6, 10], MASKS[mask], tolerance=1e-11)


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen(model):
    ids, cache = token_ids(3, 36), model.new_cache()
    decode(model, cache, ids[:, :20], [17, 1, 2], LEFT[:, :20])
    order = torch.tensor([2, 2, 0])
    cache.reorder_cache(order)
    rows, mask = ids[order], LEFT[order]
    pieces = [
        model(rows[:, t : t + 4], attention_mask=mask[:, : t + 4], past_key_values=cache).logits
        for t in range(20, 32, 4)
    ]
    cache.batch_repeat_interleave(2)
    more = model(rows[:, 32:].repeat_interleave(2, 0), past_key_values=cache).logits
    expected = model(rows, attention_mask=mask[:, :36], use_cache=False).logits[:, 20:]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected[:, :12], atol=1e-4, rtol=0)
    torch.testing.assert_close(more, expected[:, 12:].repeat_interleave(2, 0), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)
    cache.reset()
    fresh = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(fresh, model(ids, use_cache=False).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_generation_equals_repeated_forwards(model):
    prompt = ids = token_ids(1, 23)
    for _ in range(10):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **options), ids)
    assert torch.equal(model.generate(prompt, **options, use_cache=False), ids)
    cache = model.new_cache()
    assert torch.equal(model.generate(prompt, **options, past_key_values=cache, prefill_chunk_size=7), ids)
    assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 10}])
@torch.no_grad()
def test_padded_batch_generates_with_and_without_cache(model, options):
    ids, results = token_ids(3, 19), []
    options = {"do_sample": False, **options, "max_new_tokens": 9, "eos_token_id": None}
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(model.generate(ids, attention_mask=LEFT[:, :19], use_cache=use_cache, **options))
    assert torch.equal(*results)


@torch.no_grad()
def test_padded_batch_generates_as_if_alone(model):
    ids = token_ids(3, 19)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=LEFT[:, :19], **options)
    for row in range(3):
        alone = model.generate(ids[row : row + 1, LEFT[row, :19].bool()], **options)
        assert torch.equal(batch[row, 19:], alone[0, -9:])


def test_labels_and_gradients_with_a_cache(model):
    ids, cache = token_ids(2, 30), model.new_cache()
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        logits = model(ids, use_cache=False).logits[:, 12:-1]
    model.zero_grad()
    loss = model(ids[:, 12:], labels=ids[:, 12:], past_key_values=cache).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 13:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


@torch.no_grad()
def test_sizes_of_caches(model):
    ids, held = token_ids(2, 150), []
    cache = model.new_cache()
    for start in range(0, 150, 50):
        model(ids[:, start : start + 50], past_key_values=cache)
        held.append(cache.nbytes())
    kind = model.config.model_type
    if kind == "block_recurrent":  # two kv columns per token of a block, and the state
        assert held == [4 * (3 * 2 * 2 * 6 * 8 + 2 * 4 * 32)] * 3
    elif kind == "landmark":
        assert held == [4 * 2 * 2 * 2 * (text + text // 5) * 2 * 8 for text in (50, 100, 150)]
    else:
        assert held[2] - held[1] == held[1] - held[0] == 2 * (50 * 2 * 2 * 8 * 4 + 50 * 8 + 10 * 2 * 4)


def test_misuse_of_a_cache_is_refused(model):
    ids = token_ids(2, 8)
    others = [SMALL_MODELS[name]() for name in BASELINES if name != model.config.model_type]
    with pytest.raises(ValueError, match=f"must be a {model.cache_class.__name__}, got"):
        model(ids, past_key_values=others[0].new_cache())
    with pytest.raises(ValueError, match="document_ids cannot be combined"):
        model(ids, document_ids=ids, past_key_values=model.new_cache())
    with pytest.raises(ValueError, match="contradicts past_key_values"):
        model(ids, past_key_values=model.new_cache(), use_cache=False)


def test_appended_rows_follow_their_own():
    held, new = torch.tensor([[1, 2, 0], [5, 0, 0]]), torch.tensor([[3, 0], [6, 7]])
    joined = appended(held, new, [2, 1], [1, 2])
    assert joined.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert appended(None, new, [0, 0], [2, 2]).tolist() == new.tolist()
    uneven = appended(held, new, [2, 1], [0, 2])
    assert uneven[0, :2].tolist() == [1, 2] and uneven[1].tolist() == [5, 6, 7]
