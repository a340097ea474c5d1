import pytest
import torch
from sentinel_cases import ONE, TWO, random_layout, tiny_model

from patches.sentinel import EvictingCache, SpanLayout, masked_forward, recurrent_forward
from patches.sentinel.cache_layer import grown, roomy_size
from patches.sentinel.feeding import Columns, feed

HEADS, SIZE = 2, 4


def states(batch_size: int, num_new: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch_size, HEADS, num_new, SIZE, generator=draw) for _ in range(2))
    return keys, values


@torch.no_grad()
def filled(batch_size: int = 3, num_entries: int = 10, seed: int = 0) -> EvictingCache:
    cache = EvictingCache()
    for layer in range(2):
        cache.update(*states(batch_size, num_entries, seed + layer), layer)
    return cache


def storage_bytes(cache: EvictingCache) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
    )


def test_ragged_eviction_moves_kept_entries_to_the_right():
    cache = filled()
    keys = [layer.keys.clone() for layer in cache.layers]
    kept = [[1, 4, 5, 9], [8], [0, 2]]
    keep = torch.zeros(3, 10, dtype=torch.bool)
    for row, places in enumerate(kept):
        keep[row, places] = True
    cache.evict(keep)
    assert cache.num_physical == 4 and cache.has_holes
    assert cache.num_kept.tolist() == [4, 1, 2]
    assert cache.index.tolist() == [[1, 4, 5, 9], [-1, -1, -1, 8], [-1, -1, 0, 2]]
    assert cache.position_ids.tolist() == cache.index.tolist()
    assert cache.kind.tolist() == cache.span.tolist() == [[0] * 4, [-1, -1, -1, 0], [-1, -1, 0, 0]]
    for layer, before in zip(cache.layers, keys, strict=True):
        assert layer.keys.shape == (3, HEADS, 4, SIZE)
        for row, places in enumerate(kept):
            assert layer.keys[row, :, 4 - len(places) :].equal(before[row][:, places])
    again = torch.ones(3, 4, dtype=torch.bool)
    again[0, :2] = False
    cache.evict(again)
    assert cache.index.tolist() == [[5, 9], [-1, 8], [0, 2]]


def test_eviction_frees_memory():
    cache = filled(1, 4000)
    entry = 2 * 2 * HEADS * SIZE * 4
    keep = torch.zeros(1, 4000, dtype=torch.bool)
    keep[0, ::10] = True
    cache.evict(keep)
    assert cache.nbytes() == 400 * entry
    assert storage_bytes(cache) <= 1.01 * cache.nbytes() + 1024
    assert cache.allocated_bytes() == cache.nbytes()
    cache.evict(torch.ones(1, 400, dtype=torch.bool))
    assert storage_bytes(cache) == cache.nbytes()


@torch.no_grad()
def test_the_logical_length_counts_what_was_evicted():
    cache = filled()
    keep = torch.ones(3, 10, dtype=torch.bool)
    keep[:, :6] = False
    cache.evict(keep)
    assert (cache.get_seq_length(), cache.num_seen, cache.num_physical) == (10, 10, 4)
    assert cache.get_mask_sizes(3, 0) == (7, 6)
    row = torch.zeros(3, 2, dtype=torch.int64)
    cache.append(kind=row, span=row, position_ids=row + 10)
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 1)) == (10, (6, 6))
    for layer in range(2):
        cache.update(*states(3, 2), layer)
    assert (cache.get_seq_length(0), cache.get_seq_length(1), cache.num_physical) == (12, 12, 6)
    assert cache.index.tolist() == [[6, 7, 8, 9, 10, 11]] * 3


@torch.no_grad()
def test_growth_is_geometric_and_in_place():
    cache, addresses, entry = EvictingCache(), set(), 2 * HEADS * SIZE * 4
    for _ in range(1200):
        cache.update(*states(1, 1), 0)
        addresses.add(cache.layers[0].keys.data_ptr())
        assert cache.nbytes() <= cache.allocated_bytes() <= entry * (1.125 * cache.num_physical + 256)
    assert len(addresses) <= 5
    assert cache.index.tolist() == [list(range(1200))]
    assert roomy_size(8000) == 9256


def test_growth_keeps_what_was_there():
    buffer = torch.full((2, 3), torch.nan)
    buffer[:, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    same = grown(buffer, 2, torch.tensor([[5.0], [6.0]]), 1)
    assert same is buffer and buffer.tolist() == [[1, 2, 5], [3, 4, 6]]
    larger = grown(buffer, 3, torch.tensor([[7.0, 8.0], [9.0, 0.0]]), 1)
    assert larger is not buffer and larger[:, :5].tolist() == [[1, 2, 5, 7, 8], [3, 4, 6, 9, 0]]


def test_with_gradients_nothing_is_written_in_place():
    cache, first, second = EvictingCache(), states(1, 3), states(1, 2, 5)
    for tensor in (*first, *second):
        tensor.requires_grad_()
    keys, _ = cache.update(*first, 0)
    saved, version = keys.clone(), keys._version
    cache.update(*second, 0)
    assert keys._version == version and keys.equal(saved)
    keep = torch.tensor([[True, False, True, False, True]])
    cache.evict(keep)
    cache.layers[0].keys.sum().backward()
    assert first[0].grad[0, 0, :, 0].tolist() == [1, 0, 1] and second[0].grad[0, 0, :, 0].tolist() == [0, 1]
    with torch.no_grad():
        cache.update(*states(1, 1), 0)
    assert keys.equal(saved)


@torch.no_grad()
def test_forks_are_independent():
    cache = filled(2, 300)
    fork = cache.fork()
    before = [layer.keys.clone() for layer in cache.layers]
    fork.layers[0].keys.zero_()
    fork.renumber(fork.index >= 0, torch.ones(2, 1, dtype=torch.int64))
    for layer in range(2):
        fork.update(*states(2, 1, 9), layer)
    keep = torch.ones(2, 301, dtype=torch.bool)
    keep[:, :50] = False
    fork.evict(keep)
    assert cache.num_physical == cache.num_seen == 300 and fork.num_physical == 251
    assert cache.span.eq(0).all() and fork.span[:, :-1].eq(1).all()
    assert all(layer.keys.equal(keys) for layer, keys in zip(cache.layers, before, strict=True))
    for layer in range(2):
        cache.update(*states(2, 1, 4), layer)
    assert not cache.layers[1].keys[:, :, -1].equal(fork.layers[1].keys[:, :, -1])
    assert EvictingCache().fork().num_physical == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_cache_is_the_same_bit_for_bit(tmp_path, dtype):
    cache = filled()
    keep = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    cache.evict(keep)
    for layer in cache.layers:
        layer.hold(layer.keys.to(dtype), layer.values.to(dtype))
    cache.save(tmp_path / "cache.safetensors")
    loaded = EvictingCache.load(tmp_path / "cache.safetensors", device="cpu")
    assert loaded.num_seen == 10 and loaded.has_holes
    for name in ("index", "kind", "span", "position_ids"):
        assert getattr(loaded, name).equal(getattr(cache, name))
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        assert one.keys.equal(other.keys) and one.values.equal(other.values) and other.keys.dtype == dtype
    with pytest.raises(FileNotFoundError, match="no saved cache"):
        EvictingCache.load(tmp_path / "other")


@torch.no_grad()
def test_a_loaded_cache_continues(tmp_path):
    layout, _, _ = random_layout(6, TWO, batch_size=2)
    model = tiny_model("llama")
    _, cache = recurrent_forward(model, layout, chunk_size=9)
    cache.save(tmp_path / "cache")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    columns = Columns.plain(ids, cache.position_ids.amax(1, keepdim=True) + 1 + torch.arange(3))
    logits = [feed(model, other, columns) for other in (EvictingCache.load(tmp_path / "cache"), cache.fork(), cache)]
    assert logits[0].equal(logits[1]) and logits[0].equal(logits[2])


def test_rows_are_chosen_with_what_is_known_of_them():
    for choose, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = filled()
        cache.evict(torch.arange(10) >= torch.tensor([[0], [4], [2]]))
        keys, index = [layer.keys.clone() for layer in cache.layers], cache.index.clone()
        choose(cache)
        assert cache.index.equal(index[rows])
        assert all(layer.keys.equal(before[rows]) for layer, before in zip(cache.layers, keys, strict=True))
        assert cache.has_holes == bool((index[rows] < 0).any())


@torch.no_grad()
def test_crop_takes_back_the_newest_columns():
    cache = filled()
    keys = cache.layers[0].keys[:, :, :8].clone()
    cache.crop(0)
    cache.crop(-2)
    assert cache.num_seen == cache.num_physical == cache.get_seq_length() == 8
    assert cache.layers[0].keys.equal(keys)
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[1, 6] = False
    cache.evict(keep)
    cache.crop(-1)
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    with pytest.raises(ValueError, match="evicted"):
        filled().crop(-11)


@torch.no_grad()
def test_reset_forgets_everything():
    cache = filled()
    cache.reset()
    assert (cache.num_seen, cache.num_physical, cache.get_seq_length(), cache.nbytes()) == (0, 0, 0, 0)
    layout, _, _ = random_layout(6, ONE, batch_size=2)
    model = tiny_model("llama")
    cache = EvictingCache()
    first, _ = recurrent_forward(model, layout, chunk_size=5, cache=cache)
    cache.reset()
    second, _ = recurrent_forward(model, layout, chunk_size=5, cache=cache)
    assert first.equal(second)


def test_wrong_use_is_refused():
    cache, row = filled(), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[3, 10\]"):
        cache.evict(torch.ones(3, 9, dtype=torch.bool))
    cache.append(kind=row, span=row, position_ids=row)
    with pytest.raises(ValueError, match="without a forward"):
        cache.append(kind=row, span=row, position_ids=row)
    with pytest.raises(ValueError, match="after the forward"):
        cache.evict(torch.ones(3, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="announced 2"):
        cache.update(*states(3, 3), 0)


@torch.no_grad()
def test_a_model_may_use_it_as_an_ordinary_cache():
    model, ids = tiny_model("llama"), torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids).logits
    cache = EvictingCache()
    parts = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
    assert (torch.cat(parts, 1) - wanted).abs().max() < 1e-5
    assert cache.kind.eq(0).all() and cache.position_ids.equal(torch.arange(12).expand(2, -1))


def lower_right_causal(module, query, key, value, attention_mask, scaling, **options):
    """What flash attention does: no mask, the last query sees the last key."""
    assert attention_mask is None
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2), None


@torch.no_grad()
def test_flash_attention_serves_plain_chunks_and_sdpa_the_others(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "flash_attention_2",
        lambda *states, **options: calls.append(1) or lower_right_causal(*states, **options),
    )
    rows = [list(range(3, 33)), list(range(40, 70))]
    layout = SpanLayout.from_spans(rows, [[(6, 14)], [(6, 14)]], ONE)
    model = tiny_model("llama")
    wanted = masked_forward(model, layout)
    model.config._attn_implementation = "flash_attention_2"
    logits, cache = recurrent_forward(model, layout, chunk_size=2)
    assert (logits - wanted).abs().max() < 1e-5
    # Columns 0-5 and 16-31 are plain and see everything, in chunks of two; each call has two layers.
    assert len(calls) == 2 * (3 + 8)
    assert model.config._attn_implementation == "flash_attention_2"
    # A slot without tokens of its own must not see the context, though the last token of its chunk sees everything.
    lone = SpanLayout.from_ids(torch.tensor([[101, 5, 6]] * 2), ONE)
    ours, _ = recurrent_forward(model, lone, cache=cache.fork())
    model.config._attn_implementation = "sdpa"
    assert (ours - recurrent_forward(model, lone, cache=cache)[0]).abs().max() < 1e-5
