"""The published methods over one piece: full attention, StreamingLLM in all layers, H2O over the whole prompt."""

import copy

import pytest
import torch
from piece_models import pieces_of, text, tiny_model
from piece_reference import Reference, _installed, run_reference

from patches.parallel_context import APE, ParallelContext, TokenEviction, baseline

CONTEXT, QUERY = text(30, 1), text(6, 2)


def rotated(x, angles):
    """Pair the halves of the first 2 len(angles) dimensions as complex numbers and turn them."""
    half = angles.shape[-1]
    numbers = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag, x[..., 2 * half :]], -1)


def streaming_reference(model, tokens, eviction):
    """One forward whose every row sees the sinks, at their distance in the cache, and the window."""
    model = copy.deepcopy(model)
    rotary = model.get_decoder().rotary_emb
    t = torch.arange(len(tokens))
    distance = t[:, None] - t
    reach = eviction.capacity - eviction.sinks
    seen_from = t.clamp_max(eviction.capacity - 1) if eviction.rerotate else t

    def attend(module, query, key, value, mask, scaling, sliding_window=None, softcap=None, **options):
        kinds = getattr(model.config, "layer_types", None)
        name = f"{kinds[module.layer_idx]}_inv_freq" if kinds else "inv_freq"
        frequencies = getattr(rotary, name, None)
        frequencies = (rotary.inv_freq if frequencies is None else frequencies).double()
        window = 10**9 if sliding_window is None else sliding_window
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        logits = scaling * query @ keys.mT
        back = rotated(query, ((seen_from - t)[:, None] * frequencies).expand(*query.shape[:3], -1))
        sink_logits = scaling * back @ keys.mT
        far = (t < eviction.sinks) & (distance >= reach)
        logits = torch.where(far, sink_logits, logits)
        near = (distance >= 0) & (distance < min(window, reach))
        visible = near | (far & (distance >= 0) & (seen_from[:, None] - t < window))
        weights = torch.softmax(logits.masked_fill(~visible, -1e30), -1)
        return (weights @ values).transpose(1, 2), None

    with _installed(model, attend), torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


@pytest.mark.parametrize("rerotate", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral_window", "gemma3"])
def test_streaming_agrees_with_the_definition(family, rerotate):
    model = tiny_model(family)
    eviction = TokenEviction("streaming", capacity=12, sinks=3, rerotate=rerotate)
    for context in (30, 5):
        expected = streaming_reference(model, [1, *CONTEXT[:context], *QUERY], eviction)
        with ParallelContext(degree=1, eviction=eviction, micro_batch_tokens=7).bind(model) as pc:
            state = pc.encode([CONTEXT[:context]])
            assert all(x.shape[2] == min(context + 1, 12) for x in state.keys)
            found = pc.score(state, QUERY, return_logits=True, meters=["entropy", "mass"])
            out = pc.generate(state, QUERY, max_new_tokens=5, eos_token_id=None)
        assert (found.logits[0] - expected[-6:]).abs().max() < 2e-5
        assert (found.meters["mass"].sum(-1) - 1).abs().max() < 1e-9
        tokens = [1, *CONTEXT[:context], *QUERY]
        for _ in range(5):
            tokens.append(int(streaming_reference(model, tokens, eviction)[-1].argmax()))
        assert out.token_ids[0] == tokens[-5:]
        assert all(slots <= 12 for slots in out.live_slots)


def test_streaming_with_room_is_full_attention():
    model = tiny_model()
    expected = model(torch.tensor([[1, *CONTEXT, *QUERY]])).logits[0, -6:]
    for name, capacity in (("full", None), ("streaming", 60)):
        with baseline(name, capacity=capacity).bind(model) as pc:
            found = pc.score(pc.encode([CONTEXT]), QUERY, return_logits=True).logits[0]
        assert (found - expected).abs().max() < 2e-5


def pcw_reference(model, context, query, size):
    """One forward: token i of the context at 1 + i mod size, behind the BOS; a window sees the BOS and itself."""
    step, count = torch.arange(len(context)), 1 + len(context) + len(query)
    places = torch.cat([torch.zeros(1).long(), 1 + step % size, 1 + size + torch.arange(len(query))])
    window = torch.cat([torch.tensor([-1]), step // size, torch.full((len(query),), -2)])
    slot = torch.arange(count)
    visible = (slot <= slot[:, None]) & ((window == window[:, None]) | (slot == 0) | (window[:, None] == -2))
    mask = torch.zeros(count, count, dtype=torch.float64).masked_fill(~visible, -1e30)
    with torch.no_grad():
        tokens = torch.tensor([[1, *context, *query]])
        return model(tokens, position_ids=places[None], attention_mask=mask[None, None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("size", [7, 13, 40])
def test_parallel_windows_agree_with_one_masked_forward(family, size):
    model, patch = tiny_model(family), baseline("pcw", max_piece_tokens=size)
    context = text({7: 28, 13: 39, 40: 23}[size], 1)
    with patch.bind(model) as pc:
        state = pc.encode(patch.split(context))
        found = pc.score(state, QUERY, return_logits=True).logits[0]
        tokens = pc.generate(state, QUERY, max_new_tokens=3, eos_token_id=None).token_ids[0]
    read = list(QUERY)
    for _ in range(3):
        read.append(int(pcw_reference(model, context, read, min(size, len(context)))[-1].argmax()))
    assert (found - pcw_reference(model, context, QUERY, min(size, len(context)))[-6:]).abs().max() < 2e-5
    assert tokens == read[-3:]


def test_adaptive_encoding_sharpens_the_windows():
    model, patch = tiny_model(), baseline("ape", degree=3)
    pieces = patch.split(CONTEXT[:29])
    with patch.bind(model) as pc:
        found = pc.score(pc.encode(pieces), QUERY, return_logits=True).logits[0]
    expected = run_reference(model, Reference([1], pieces, QUERY, "ML", ape=APE(0.9, 0.9)))
    assert (found - expected).abs().max() < 2e-5
    windows = baseline("pcw", degree=3)
    with windows.bind(model) as pc:
        plain = pc.score(pc.encode(windows.split(CONTEXT[:29])), QUERY, return_logits=True).logits[0]
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pcw", "ape"])
def test_a_batch_of_windows_is_its_rows(name):
    patch, queries = baseline(name, max_piece_tokens=8), [text(4, 7), text(6, 8)]
    batch = [patch.split(CONTEXT), patch.split(CONTEXT[:9])]
    with patch.bind(tiny_model()) as pc:
        found = pc.generate(pc.encode(batch), queries, max_new_tokens=4).token_ids
        alone = [
            pc.generate(pc.encode(row), query, max_new_tokens=4) for row, query in zip(batch, queries, strict=True)
        ]
    assert [one.token_ids[0] for one in alone] == found


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("pcw", {}, "needs degree or max_piece_tokens"),
        ("ape", {"degree": 2, "max_piece_tokens": 9}, "one of them, got 2 and 9"),
        ("pcw", {"degree": 2, "capacity": 8}, "keeps every slot"),
        ("pcw", {"degree": 0}, "degree must be an integer of at least 1"),
        ("snapkv", {"degree": 2, "capacity": 8}, "belong to pcw and ape"),
        ("full", {"max_piece_tokens": 2}, "belong to pcw and ape"),
    ],
)
def test_options_of_other_methods_are_refused(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        baseline(name, **options)


def test_streaming_refusals():
    with baseline("streaming", capacity=8).bind(tiny_model()) as pc:
        with pytest.raises(ValueError, match="one piece, got 2"):
            pc.encode(pieces_of((4, 5)))
        with pytest.raises(ValueError, match="lower sinks"):
            pc.encode([[5, 6]])
    with pytest.raises(ValueError, match="capacity must be an integer"):
        baseline("snapkv")
    with pytest.raises(ValueError, match="'fullest'"):
        baseline("fullest", capacity=4)


def test_h2o_sums_the_rows_of_prompt_and_query():
    """The kept slots are those of `keep` over all rows of one ordinary forward."""
    model, eviction = tiny_model(), baseline("h2o", capacity=9).eviction
    keys, queries = [], []

    def attend(module, query, key, value, mask, scaling, **options):
        keys.append(key)
        queries.append(query)
        repeat = query.shape[1] // key.shape[1]
        full = (x.repeat_interleave(repeat, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, *full, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    copied = copy.deepcopy(model)
    with _installed(copied, attend), torch.no_grad():
        copied(torch.tensor([[1, *CONTEXT, *QUERY]]), use_cache=False)
    with baseline("h2o", capacity=9).bind(model) as pc:
        state = pc.encode([CONTEXT])
        out = pc.generate(state, QUERY, max_new_tokens=3, eos_token_id=None)
        assert state.received[0].shape == (1, 2, 31) and not state.received[0][..., 0].any()
        kept = [
            torch.cat([torch.zeros(1, 2, 1).long(), eviction.keep(query, key, scale=8**-0.5, start=1, stop=31)], -1)
            for query, key in zip(queries, keys, strict=True)
        ]
        assert out.live_slots == [10] * 3
        # The first token sees everything, the others what is kept: decode them behind the evicted state.
        first = pc.score(state, QUERY, return_logits=True).logits[0, -1].argmax()
        assert out.token_ids[0][0] == int(first)
    tokens = list(QUERY)
    for _ in range(3):
        tokens.append(int(reference_logits(model, tokens, kept).argmax()))
    assert out.token_ids[0] == tokens[-3:]


def reference_logits(model, tokens, kept):
    from piece_reference import Reference, run_reference

    gone = [[sorted(set(range(31)) - set(head.tolist())) for head in layer[0]] for layer in kept]
    reference = Reference([1], [CONTEXT], tokens, "ML")
    reference.hidden = lambda layer, row, head: gone[layer][head] if row >= len(QUERY) else []
    return run_reference(model, reference)[-1]


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "random"])
def test_baselines_of_one_piece(name):
    patch = baseline(name, capacity=10)
    assert (patch.degree, patch.eviction.stage, patch.eviction.observation, patch.eviction.kernel) == (
        1,
        "query",
        32,
        7,
    )
    with patch.bind(tiny_model()) as pc:
        out = pc.generate(pc.encode([CONTEXT]), QUERY, max_new_tokens=3, eos_token_id=None)
    assert out.live_slots == ([21, 11, 1] if name == "pyramidkv" else [11] * 3)


@pytest.mark.parametrize("name", ["full", "streaming", "snapkv", "h2o"])
def test_a_batch_is_its_rows(name, tmp_path):
    batch, queries = [[CONTEXT], [CONTEXT[:9]]], [text(4, 7), text(6, 8)]
    with baseline(name, capacity=8).bind(tiny_model()) as pc:
        state = pc.encode(batch)
        state.save(tmp_path / "state.safetensors")
        found = pc.generate(type(state).load(tmp_path / "state.safetensors"), queries, max_new_tokens=4).token_ids
        for row in range(2):
            alone = pc.encode(batch[row])
            assert pc.generate(alone, queries[row], max_new_tokens=4).token_ids[0] == found[row]
            assert pc.generate(state.row(row), queries[row], max_new_tokens=4).token_ids[0] == found[row]
