"""Pieces of any length through a cache equal one forward; generate equals repeated forwards."""

import pytest
import torch
from decoding_cases import LEFT, LENGTH, MASKS, check_pieces, decode
from model_cases import drt_config, small_drt, small_window_lm, token_ids
from torch._subclasses.fake_tensor import FakeTensorMode

from models.drt import DRTCache
from models.sliding_window_lm import SlidingWindowCache
from models.window_cache import WindowRing

PIECES = {
    "tokens": [1] * LENGTH,
    "whole": [LENGTH],
    "ragged": [3, 4, 17, 1, 1, 5, 6, 10],
    "segments": [13, 34],
    "chunks": [5] * 9 + [2],
    "across": [6, 1] * 6 + [5],
}


@pytest.fixture(scope="module")
def drt():
    return small_drt()


@pytest.fixture(scope="module")
def window_lm():
    return small_window_lm()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pieces", PIECES)
def test_drt_pieces_equal_one_forward(drt, pieces, mask):
    check_pieces(drt, DRTCache(drt.config), PIECES[pieces], MASKS[mask])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pieces", PIECES)
def test_window_lm_pieces_equal_one_forward(window_lm, pieces, mask):
    check_pieces(window_lm, SlidingWindowCache(window_lm.config), PIECES[pieces], MASKS[mask])


@pytest.mark.parametrize("sizes", [{"chunk_size": 1}, {"window_size": 1}, {"chunk_size": 16}, {"chunk_top_k": 20}])
def test_drt_pieces_at_extreme_sizes(sizes):
    model = small_drt(**sizes)
    for mask in (None, LEFT):
        check_pieces(model, DRTCache(model.config), [1, 1, 1, 9, 1, 1, 14, 1, 18], mask)


@pytest.mark.parametrize("mask", MASKS)
def test_pieces_are_exact_in_float64(mask):
    # Rounding hides nothing here: a wrong position or chunk would show at once.
    for model, cache_class in ((small_drt(), DRTCache), (small_window_lm(), SlidingWindowCache)):
        model.double()
        for pieces in ([1] * LENGTH, [3, 4, 17, 1, 1, 5, 6, 10]):
            check_pieces(model, cache_class(model.config), pieces, MASKS[mask], tolerance=1e-11)


@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("pieces", ["tokens", "ragged"])
def test_offload_changes_no_bit(drt, pieces, mask):
    ids = token_ids(3, LENGTH)
    on_device, offloaded = DRTCache(drt.config), DRTCache(drt.config, offload=True)
    expected = decode(drt, on_device, ids, PIECES[pieces], MASKS[mask])
    assert torch.equal(decode(drt, offloaded, ids, PIECES[pieces], MASKS[mask]), expected)
    assert on_device.fetch_count == 0 < offloaded.fetch_count


def test_one_fetch_per_group_and_retrieving_call(drt):
    ids = token_ids(2, LENGTH)
    cache = DRTCache(drt.config, offload=True)
    decode(drt, cache, ids, PIECES["tokens"], None)
    # Nine chunks are completed; the first has nothing to retrieve.
    assert cache.fetch_count == 2 * 8
    cache = DRTCache(drt.config, offload=True)
    decode(drt, cache, ids, [23, 2, 15, 7], None)
    # The second call completes the fifth chunk, so every call retrieves.
    assert cache.fetch_count == 2 * 4


def test_cache_sizes(drt):
    config, ids = drt.config, token_ids(2, 400)
    cache = DRTCache(config)
    decode(drt, cache, ids[:, :50], [50], None)
    window = cache.nbytes("window")
    assert window == 2 * 4 * config.num_hidden_layers * 2 * (config.window_size - 1) * 2 * config.head_dim
    decode(drt, cache, ids[:, 50:], [1] * 13 + [87] + [125] * 2, None)
    assert cache.get_seq_length() == 400
    assert cache.nbytes("window") == window
    chunk = 2 * 4 * 2 * config.chunk_size * config.chunk_num_key_value_heads * config.head_dim
    assert cache.nbytes("chunks") == 80 * chunk
    assert 80 * 2 * 4 * 32 <= cache.nbytes("landmarks") <= 1.02 * 80 * 2 * 4 * 32
    assert cache.nbytes() > cache.nbytes("window") + cache.nbytes("chunks") + cache.nbytes("landmarks")
    with pytest.raises(ValueError, match="part must be one of"):
        cache.nbytes("other")


def test_window_cache_is_constant(window_lm):
    cache = SlidingWindowCache(window_lm.config)
    ids = token_ids(2, 60)
    decode(window_lm, cache, ids[:, :5], [5], None)
    held = cache.nbytes()
    decode(window_lm, cache, ids[:, 5:], [1] * 15 + [40], None)
    assert cache.nbytes() == held == 2 * 4 * 2 * 2 * 8 * 2 * 8


def test_rows_of_a_cache_can_be_chosen(drt, window_lm):
    for model, cache in ((drt, DRTCache(drt.config)), (window_lm, SlidingWindowCache(window_lm.config))):
        ids = token_ids(3, LENGTH)
        decode(model, cache, ids[:, :20], [17, 1, 1, 1], LEFT[:, :20])
        order = torch.tensor([2, 2, 0])
        cache.reorder_cache(order)
        rows, mask = ids[order], LEFT[order]
        decoded = torch.cat(
            [
                model(rows[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
                for t in range(20, 36)
            ],
            dim=1,
        )
        expected = model(rows[:, :36], attention_mask=mask[:, :36], use_cache=False).logits[:, 20:]
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
        cache.batch_repeat_interleave(2)
        more = [model(rows[:, t : t + 1].repeat_interleave(2, 0), past_key_values=cache).logits for t in range(36, 47)]
        expected = model(rows, attention_mask=mask, use_cache=False).logits[:, 36:]
        torch.testing.assert_close(torch.cat(more, 1), expected.repeat_interleave(2, 0), atol=1e-4, rtol=0)


def test_rows_are_chosen_on_the_device_of_the_cache():
    ring = WindowRing(num_layers=2, window_size=5)
    with FakeTensorMode():  # knows devices that are not there
        kept = torch.empty(2, 4, 1, 8, device="cuda")
        ring.buffers[1] = (kept, kept)
        ring.select(torch.tensor([1, 0, 0]))
    assert ring.buffers[0] is None
    assert {(*buffer.shape, buffer.device.type) for buffer in ring.buffers[1]} == {(3, 4, 1, 8, "cuda")}


@torch.no_grad()
def test_greedy_generation_equals_repeated_forwards(drt, window_lm):
    prompt = token_ids(1, 17)
    for model, cache in (
        (drt, DRTCache(drt.config, offload=True)),
        (window_lm, SlidingWindowCache(window_lm.config)),
    ):
        ids = prompt
        for _ in range(20):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(prompt, **options), ids)
        assert torch.equal(model.generate(prompt, **options, use_cache=False), ids)
        assert torch.equal(model.generate(prompt, **options, past_key_values=cache), ids)
        assert cache.get_seq_length() == ids.shape[1] - 1
        pieces = type(cache)(model.config)
        assert torch.equal(model.generate(prompt, **options, past_key_values=pieces, prefill_chunk_size=7), ids)
        longer = model.generate(ids, **{**options, "max_new_tokens": 3}, past_key_values=cache)
        assert torch.equal(longer, model.generate(prompt, **{**options, "max_new_tokens": 23}))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 10}, {"num_return_sequences": 2}])
@torch.no_grad()
def test_batched_generation_with_and_without_cache(drt, window_lm, options):
    ids = token_ids(3, 19)
    options = {"do_sample": "num_return_sequences" in options, **options, "max_new_tokens": 14, "eos_token_id": None}
    for model in (drt, window_lm):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(model.generate(ids, attention_mask=LEFT[:, :19], use_cache=use_cache, **options))
        assert torch.equal(*results)


@torch.no_grad()
def test_padded_batch_generates_as_if_alone(drt):
    ids = token_ids(3, 19)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    batch = drt.generate(ids, attention_mask=LEFT[:, :19], **options)
    for row in range(3):
        alone = drt.generate(ids[row : row + 1, LEFT[row, :19].bool()], **options)
        assert torch.equal(batch[row, 19:], alone[0, -14:])


@torch.no_grad()
def test_generate_offloads_when_the_config_says_so():
    model = small_drt(offload_chunk_memory=True)
    output = model.generate(token_ids(1, 17), max_new_tokens=8, return_dict_in_generate=True, do_sample=False)
    assert isinstance(output.past_key_values, DRTCache)
    assert output.past_key_values.fetch_count > 0


def test_cache_use_follows_mode_and_labels(drt):
    ids = token_ids(1, 9)
    assert isinstance(drt(ids).past_key_values, DRTCache)
    assert drt(ids, labels=ids).past_key_values is None
    assert drt(ids, document_ids=torch.zeros_like(ids), use_cache=True).past_key_values is None
    drt.train()
    assert drt(ids).past_key_values is None
    drt.eval()


def test_labels_with_a_cache(drt):
    ids = token_ids(2, 30)
    cache = DRTCache(drt.config)
    with torch.no_grad():
        drt(ids[:, :12], past_key_values=cache)
        loss = drt(ids[:, 12:], labels=ids[:, 12:], past_key_values=cache).loss
        logits = drt(ids, use_cache=False).logits[:, 12:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 13:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


def test_retrieval_of_a_continued_call(drt):
    ids = token_ids(3, LENGTH)
    with torch.no_grad():
        whole = drt(ids, attention_mask=LEFT, use_cache=False, output_retrieval=True).retrieval
        cache = DRTCache(drt.config)
        first = drt(ids[:, :21], attention_mask=LEFT[:, :21], past_key_values=cache, output_retrieval=True).retrieval
        second = drt(ids[:, 21:], attention_mask=LEFT, past_key_values=cache, output_retrieval=True).retrieval
    for group in range(2):
        for row, (before, total) in enumerate([(4, 9), (3, 8), (1, 6)]):
            parts = [first[group][0][row, :before], second[group][0][row, : total - before]]
            assert torch.equal(torch.cat(parts), whole[group][0][row, :total])
            assert (first[group][0][row, before:] == -1).all()
            assert (whole[group][0][row, total:] == -1).all()
            assert (whole[group][1][row, total:] == 0).all()


def test_misuse_of_a_cache_is_refused(drt, window_lm):
    ids = token_ids(2, 8)
    cache = DRTCache(drt.config)
    drt(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="must be a DRTCache"):
        drt(ids, past_key_values=SlidingWindowCache(window_lm.config))
    with pytest.raises(ValueError, match="must be a SlidingWindowCache"):
        window_lm(ids, past_key_values=DRTCache(drt_config()))
    with pytest.raises(ValueError, match="attention_mask must be"):
        drt(ids, attention_mask=torch.ones(2, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="contradicts"):
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, :8] = 0
        drt(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 sequences"):
        drt(ids[:1], past_key_values=cache)
    with pytest.raises(ValueError, match="use_cache=False contradicts"):
        drt(ids, use_cache=False, past_key_values=cache)
    with pytest.raises(ValueError, match="document_ids"):
        drt(ids, document_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
