"""The encoded context: unchanged by queries, kept on disk bit for bit, selected, evicted, stacked."""

import copy

import pytest
import torch
from piece_models import pieces_of, text, tiny_model
from piece_reference import Reference, run_reference

from patches.parallel_context import ParallelContext, PieceCache, key_norms, value_norms
from patches.parallel_context.positions import POSITION_MODES

LENGTHS = (5, 9, 7)


def bind(model=None, **options):
    return ParallelContext(**({"prefix": None} | options)).bind(model or tiny_model())


def tensors(cache):
    return [*cache.keys, *cache.values, *cache.positions, *cache.segments, cache.next_position]


def same(first, second):
    pairs = zip(tensors(first), tensors(second), strict=True)
    plain = ("lengths", "source_pieces", "offsets", "mode", "piece_scores", "fingerprint", "num_pieces")
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs) and all(
        getattr(first, name) == getattr(second, name) for name in plain
    )


def test_layout():
    with bind(position_mode="ML") as pc:
        state = pc.encode([pieces_of(LENGTHS), pieces_of((4,), 2)], prefix=text(3, 1))
    assert [x.shape for x in state.keys] == [(2, 2, 24, 8)] * 3  # 2 kv heads of 4 query heads
    expected = [0] * 3 + [1] * 5 + [2] * 9 + [3] * 7
    assert state.segments[0][0, 1].tolist() == expected
    assert state.segments[2][1, 0].tolist() == [0] * 3 + [1] * 4 + [-2] * 17
    places = [0, 1, 2, *range(3, 8), *range(3, 12), *range(3, 10)]
    assert state.positions[1][0, 0].tolist() == places
    assert state.next_position.tolist() == [12, 7]
    assert (state.lengths, state.num_pieces) == ([[5, 9, 7], [4]], [3, 1])
    assert (state.offset, state.mode, state.source_pieces) == (3, "ML", [[1, 2, 3], [1]])
    assert state.num_bytes == sum(x.nbytes for x in state.keys) * 2
    norms = key_norms(state)
    torch.testing.assert_close(norms[0][0], state.keys[0][0].norm(dim=-1))
    assert not value_norms(state)[1][1, :, 7:].any()


def test_queries_leave_the_state_bitwise():
    with bind() as pc:
        state = pc.encode(pieces_of(LENGTHS), prefix=text(3, 1))
        before = [x.clone() for x in tensors(state)]
        first = pc.score(state, text(5, 9)).nll
        pc.generate(state, text(4, 8), max_new_tokens=6, eos_token_id=None)
        again = pc.score(state, text(5, 9)).nll
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_files_bring_everything_back(tmp_path, dtype):
    model = tiny_model("llama", dtype)
    with bind(model, fractional_positions=dtype == torch.float64) as pc:
        state = pc.encode([pieces_of(LENGTHS), pieces_of((4,), 2)], prefix=text(3, 1))
        state.save(tmp_path / "state.safetensors")
        loaded = PieceCache.load(tmp_path / "state.safetensors", model=model)
        assert same(state, loaded)
        queries = [text(4, 8), text(3, 9)]
        assert torch.equal(pc.score(state, queries).nll, pc.score(loaded, queries).nll)
    evicted = state.evict(
        [torch.arange(10).expand(2, 2, 10), torch.arange(6).expand(2, 2, 6), torch.ones(2, 2, 1).long()]
    )
    evicted.save(tmp_path / "evicted.safetensors")
    assert same(evicted, PieceCache.load(tmp_path / "evicted.safetensors"))


def test_files_know_their_model(tmp_path):
    with bind() as pc:
        state = pc.encode(pieces_of(LENGTHS))
        state.save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"another model: .*num_hidden_layers 3 is not 2"):
        PieceCache.load(tmp_path / "state.safetensors", model=tiny_model(layers=2))
    trained = copy.deepcopy(tiny_model())
    with torch.no_grad():
        trained.model.layers[0].self_attn.k_proj.weight[-1] += 0.1
    with pytest.raises(ValueError, match=r"another model: weights .* is not "):
        PieceCache.load(tmp_path / "state.safetensors", model=trained)
    with bind(trained) as pc, pytest.raises(ValueError, match="encoded by another model"):
        pc.score(state, text(3))
    assert PieceCache.load(tmp_path / "state.safetensors", model=tiny_model()).num_pieces == state.num_pieces
    with bind(tiny_model("qwen3")) as pc, pytest.raises(ValueError, match="encoded by another model"):
        pc.score(state, text(3))
    with pytest.raises(FileNotFoundError, match="no piece cache"):
        PieceCache.load(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        PieceCache.load(tmp_path / "text")


def test_selecting_pieces_is_encoding_them():
    prefix, pieces, query = text(3, 1), pieces_of(LENGTHS), text(5, 9)
    with bind(position_mode="ML") as pc:
        chosen = pc.encode(pieces, prefix=prefix).select([3, 1])
        alone = pc.encode([pieces[0], pieces[2]], prefix=prefix)
        assert torch.equal(chosen.segments[0], alone.segments[0])
        assert torch.equal(chosen.positions[0], alone.positions[0])
        assert chosen.next_position.tolist() == alone.next_position.tolist() == [10]
        assert chosen.source_pieces == [[1, 3]] and chosen.lengths == [[5, 7]]
        difference = pc.score(chosen, query).nll - pc.score(alone, query).nll
        assert difference.abs().max() < 1e-9
        again = chosen.select([2])
        assert again.source_pieces == [[3]] and again.next_position.tolist() == [10]


@pytest.mark.parametrize("mode", POSITION_MODES)
def test_next_position_after_selecting(mode):
    with bind(position_mode=mode) as pc:
        state = pc.encode(pieces_of(LENGTHS), prefix=text(3, 1))
        kept = state.select([1, 3])
        following = {"ML": 10, "AL": 9, "HL": 8}.get(mode, int(state.next_position))
        assert kept.next_position.tolist() == [following]


def test_order_of_pieces_does_not_matter_in_ml():
    prefix, pieces, query = text(3, 1), pieces_of(LENGTHS), text(5, 9)
    with bind(position_mode="ML") as pc:
        found = [
            pc.score(pc.encode([pieces[i] for i in order], prefix=prefix), query).nll
            for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))
        ]
    assert all((x - found[0]).abs().max() < 1e-9 for x in found)


def test_select_per_row_and_refusals():
    with bind() as pc:
        state = pc.encode([pieces_of(LENGTHS), pieces_of((4, 6), 2)], prefix=text(2, 1))
        kept = state.select([[2], [1, 2]])
        assert kept.num_pieces == [1, 2] and kept.segments[0].shape == (2, 2, 12)
        queries = [text(4, 7), text(4, 8)]
        rows = [
            pc.score(row.select(keep), query).nll
            for row, keep, query in zip(state.rows(), ([2], [1, 2]), queries, strict=True)
        ]
        assert (pc.score(kept, queries).nll - torch.cat(rows)).abs().max() < 1e-9
    for keep, sentence in (
        ([3], "row 1 has pieces 1 .. 2"),
        ([1, 1], "at most once"),
        ([[1]], "one list of pieces per row"),
    ):
        with pytest.raises(ValueError, match=sentence):
            state.select(keep)


def test_rows_stack_to_the_batch():
    batch = [pieces_of(LENGTHS), pieces_of((4,), 2)]
    with bind() as pc:
        state = pc.encode(batch, prefix=text(3, 1))
        assert same(PieceCache.stack(state.rows()), state)
        apart = PieceCache.stack([pc.encode(batch[0], prefix=text(3, 1)), pc.encode(batch[1], prefix=text(1, 4))])
        assert apart.offsets == [3, 1]
        with pytest.raises(ValueError, match="different lengths"):
            _ = apart.offset
        found = pc.score(apart, [text(4, 7), text(4, 8)]).nll
        alone = pc.score(pc.encode(batch[1], prefix=text(1, 4)), text(4, 8)).nll
    assert (found[1] - alone[0]).abs().max() < 1e-9
    with bind(position_mode="ML") as pc, pytest.raises(ValueError, match="same model and position mode"):
        PieceCache.stack([state, pc.encode(batch[0])])


def test_evicted_slots_are_gone_head_by_head():
    """A different number of slots in every layer, different slots in every head."""
    prefix, pieces, query = text(2, 1), pieces_of((5, 6), 3), text(4, 9)
    generator = torch.Generator().manual_seed(0)
    keep = []
    for size in (9, 6, 11):
        heads = [torch.randperm(13, generator=generator)[:size].sort().values for _ in range(2)]
        keep.append(torch.stack(heads)[None])
    gone = [[sorted(set(range(13)) - set(head.tolist())) for head in layer[0]] for layer in keep]
    reference = Reference(prefix, pieces, query, hidden=lambda layer, row, head: gone[layer][head])
    expected = run_reference(tiny_model(), reference)
    for implementation in ("auto", "grouped", "eager"):
        with bind(implementation=implementation) as pc:
            state = pc.encode(pieces, prefix=prefix).evict(keep)
            assert [x.shape[2] for x in state.keys] == [9, 6, 11]
            found = pc.score(state, query, return_logits=True, meters=["entropy", "mass"])
            assert pc.generate(state, query, max_new_tokens=2).live_slots == [9, 6, 11]
        assert (found.logits[0] - expected).abs().max() < 2e-5
        assert (found.meters["entropy"][:, 0] - torch.stack(reference.entropy)).abs().max() < 5e-5
        assert (found.meters["mass"][:, 0] - torch.stack(reference.mass).mean(2)).abs().max() < 5e-5
    with pytest.raises(ValueError, match="each of 3 layers"):
        state.evict(keep[:1])
    with pytest.raises(ValueError, match="slots must be"):
        state.evict([layer[0] for layer in keep])


def test_mixing_keys_and_values():
    prefix, pieces, query = text(2, 1), pieces_of((5, 6), 3), text(4, 9)
    with bind(position_mode="order") as pc:
        apart = pc.encode(pieces, prefix=prefix)
        whole = pc.encode([pieces[0] + pieces[1]], prefix=prefix)
        with pytest.raises(ValueError, match="same layers, rows and slots"):
            apart.mix(whole)
        whole.segments, whole.lengths, whole.source_pieces = apart.segments, apart.lengths, apart.source_pieces
        mixed = apart.mix(whole)
        assert mixed.keys is whole.keys and mixed.values is apart.values
        both = apart.mix(whole, values=True)
        assert torch.equal(pc.score(both, query).nll, pc.score(whole, query).nll)
        assert not torch.equal(pc.score(mixed, query).nll, pc.score(apart, query).nll)


def test_prefix_alone_is_a_context():
    model, prefix, query = tiny_model(), text(4, 1), text(6, 2)
    with bind(model) as pc:
        found = pc.score(pc.encode([], prefix=prefix), query, return_logits=True).logits[0]
        mixed = pc.encode([[], [text(3, 5)]], prefix=prefix)
        assert mixed.num_pieces == [0, 1]
        both = pc.score(mixed, [query, query], return_logits=True).logits
        with pytest.raises(ValueError, match="needs a prefix"):
            pc.encode([])
    expected = model(torch.tensor([prefix + query])).logits[0, 4:]
    assert (found - expected).abs().max() < 2e-5 and (both[0] - expected).abs().max() < 2e-5


def test_a_second_query_may_have_any_shape():
    with bind() as pc:
        state = pc.encode([pieces_of(LENGTHS), pieces_of((4,), 2)])
        tensor = torch.tensor([text(4, 1), text(4, 2)])
        assert torch.equal(pc.score(state, tensor).nll, pc.score(state, tensor.tolist()).nll)
        targets = torch.full((2, 4), -100)
        targets[0, 1], targets[1, 3] = 7, 8
        found = pc.score(state, tensor, targets, return_logits=True)
        expected = torch.nn.functional.cross_entropy(found.logits.transpose(1, 2), targets, reduction="none")
        assert (found.nll - expected).abs().max() < 1e-9
        assert found.mask.equal(targets != -100) and found.num_targets.tolist() == [1, 1]
        assert found.nll_sum.dtype == torch.float64 and (found.nll_sum - expected.sum(1)).abs().max() < 1e-9
        assert found.perplexity == pytest.approx(float((expected.sum() / 2).exp()))
        for query, sentence in (([[1, 2]], "as many queries"), ([[1], []], "at least one token")):
            with pytest.raises(ValueError, match=sentence):
                pc.score(state, query)
        with pytest.raises(ValueError, match="row 1 needs 4"):
            pc.score(state, tensor, [[-100] * 4, [-100] * 3])
        with pytest.raises(ValueError, match="empty piece"):
            pc.encode([[1, 2], []])
        with pytest.raises(ValueError, match="unknown meter 'entropies'"):
            pc.score(state, tensor, meters=["entropies"])
