import random

import pytest
import torch
from sentinel_cases import ARCHITECTURES, ONE, TWO, random_spans, tiny_model

from patches.sentinel import CompressedContext, SpanLayout, SpanSampler, compress, masked_forward, recurrent_forward

SIZES = (27, 11, 34)


def ragged(seed: int, slots: int):
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 100) for _ in range(size)] for size in SIZES]
    return rows, [random_spans(draw, size, slots) for size in SIZES]


def padded(rows, *, left: bool):
    ids, mask = torch.zeros(len(rows), max(SIZES), dtype=torch.int64), torch.zeros(len(rows), max(SIZES))
    for number, row in enumerate(rows):
        place = slice(max(SIZES) - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


def continued_logits(model, rows, spans, sentinels, more):
    """Logits of more tokens after each row, in one pass over row and tokens."""
    out = []
    for row, own, tokens in zip(rows, spans, more, strict=True):
        layout = SpanLayout.from_spans([row + tokens], [own], sentinels)
        out.append(masked_forward(model, layout)[0, -len(tokens) :])
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("sentinels", [ONE, TWO], ids=["K1", "K2"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_and_chunks_give_the_same_context(architecture, sentinels):
    rows, spans = ragged(1, sentinels.slots)
    model = tiny_model(architecture)
    contexts = []
    for left, chunk_size in ((False, None), (True, None), (True, 7), (False, 1)):
        ids, mask = padded(rows, left=left)
        contexts.append(compress(model, ids, sentinels, spans=spans, attention_mask=mask, chunk_size=chunk_size))
    layout = SpanLayout.from_spans(rows, spans, sentinels)
    for context in contexts:
        for name in ("index", "kind", "span", "position_ids"):
            assert getattr(context.cache, name).equal(getattr(contexts[0].cache, name))
        for one, other in zip(context.cache.layers, contexts[0].cache.layers, strict=True):
            live = context.cache.index[:, None, :, None] >= 0
            assert ((one.keys - other.keys) * live).abs().max() < 1e-5
        assert context.num_tokens.tolist() == context.next_position.tolist() == list(SIZES)
        assert context.num_kept.equal(layout.num_kept)
        assert context.compression_ratio.equal(layout.achieved_ratio)
        assert context.next_logits[:, list(sentinels.ids)].eq(-torch.inf).all()
    text = [column for column in range(128) if column not in sentinels.ids]
    wanted = continued_logits(model, [row[:-1] for row in rows], spans_before_last(rows, spans), sentinels, lasts(rows))
    ends_outside = [not own or own[-1][1] < len(row) for own, row in zip(spans, rows, strict=True)]
    assert any(ends_outside)
    for context in contexts:
        assert (context.next_logits - wanted[:, 0])[ends_outside][:, text].abs().max() < 1e-5


def lasts(rows):
    return [row[-1:] for row in rows]


def spans_before_last(rows, spans):
    return [[span for span in own if span[1] < len(row)] for own, row in zip(spans, rows, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma3"])
def test_extending_at_once_and_one_by_one(architecture):
    rows, spans = ragged(2, 2)
    more = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    model = tiny_model(architecture, window=9)
    ids, mask = padded(rows, left=False)
    context = compress(model, ids, TWO, spans=spans, attention_mask=mask)
    single = context.fork()
    wanted = continued_logits(model, rows, spans, TWO, more)
    at_once = context.extend(model, torch.tensor(more))
    one_by_one = torch.cat([single.extend(model, torch.tensor(more)[:, [place]]) for place in range(4)], 1)
    for logits, state in ((at_once, context), (one_by_one, single)):
        assert (logits - wanted).abs().max() < 1e-5
        assert state.next_position.tolist() == [size + 4 for size in SIZES]
        assert (state.next_logits[:, :100] - wanted[:, -1, :100]).abs().max() < 1e-5
        assert state.cache.num_kept.tolist() == state.num_kept.tolist()


@torch.no_grad()
def test_spans_come_from_the_sampler_the_seed_and_the_row():
    model, ids = tiny_model("llama"), torch.arange(3, 53).expand(2, -1)
    contexts = [compress(model, ids, ONE, seed=seed) for seed in (0, 0, 1)]
    indices = [context.cache.index.tolist() for context in contexts]
    assert indices[0] == indices[1] != indices[2]
    assert indices[0][0] != indices[0][1]
    assert compress(model, ids[:1], ONE).cache.index[0].tolist() == [i for i in indices[0][0] if i >= 0]
    for context in contexts:
        assert context.compression_ratio.tolist() == pytest.approx([0.5, 0.5])
    small = compress(model, ids, TWO, sampler=SpanSampler(0.2, max_length=9))
    assert small.compression_ratio.tolist() == pytest.approx([0.2, 0.2])


@torch.no_grad()
def test_a_saved_context_is_the_same(tmp_path):
    rows, spans = ragged(3, 2)
    model = tiny_model("llama")
    ids, mask = padded(rows, left=True)
    context = compress(model, ids, TWO, spans=spans, attention_mask=mask)
    context.save(tmp_path / "context.safetensors")
    loaded = CompressedContext.load(tmp_path / "context.safetensors", device="cpu")
    assert loaded.sentinels == TWO and loaded.next_logits.equal(context.next_logits)
    assert loaded.next_position.equal(context.next_position) and loaded.num_kept.equal(context.num_kept)
    question = torch.tensor([[5, 6]] * 3)
    assert loaded.extend(model, question).equal(context.fork().extend(model, question))
    with pytest.raises(FileNotFoundError, match="no saved cache"):
        CompressedContext.load(tmp_path / "nothing")
    path = tmp_path / "context.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or holds no cache"):
        CompressedContext.load(path)


@torch.no_grad()
@pytest.mark.parametrize("changed", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_saved_context_belongs_to_the_weights_that_read_it(tmp_path, changed):
    model, path = tiny_model("llama"), tmp_path / "context.safetensors"
    context = compress(model, torch.tensor([[5, 6, 7, 8, 9, 10]]), TWO, spans=[[(1, 5)]])
    context.fork().save(path)
    assert CompressedContext.load(path, model=tiny_model("llama")).weights == context.weights
    assert CompressedContext.load(path, model=tiny_model("llama").bfloat16()).weights == context.weights
    model.get_parameter(changed)[TWO.slot_ids[1] if "embed" in changed else -1] += 0.1
    with pytest.raises(ValueError, match="was read by a model with other weights"):
        CompressedContext.load(path, model=model)
    assert CompressedContext.load(path).num_kept.equal(context.num_kept)


@torch.no_grad()
def test_the_ratio_is_the_memory_that_goes():
    model, ids = tiny_model("llama"), torch.randint(3, 100, (1, 400), generator=torch.Generator().manual_seed(0))
    _, whole = recurrent_forward(model, SpanLayout.from_spans(ids, [[]], ONE))
    for ratio in (0.0, 0.3, 0.7, 0.9):
        context = compress(model, ids, ONE, sampler=SpanSampler(ratio))
        assert context.cache.nbytes() == round((1 - ratio) * 400) * whole.nbytes() // 400


def test_gradients_are_not_kept():
    model = tiny_model("llama")
    context = compress(model, torch.arange(3, 30)[None], ONE)
    assert not context.next_logits.requires_grad and not context.cache.layers[0].keys.requires_grad


def test_empty_rows_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
        compress(tiny_model("llama"), torch.zeros(2, 3, dtype=torch.int64), ONE, attention_mask=mask)
