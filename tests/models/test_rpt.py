"""A frozen retriever: what may be read, by which rows, and how it is attended."""

import pytest
import torch
from model_cases import rpt_config, scaled_up, small_rpt, token_ids

from kernels.gca import grouped_cross_attention
from models.rpt import BM25Retriever, OracleRetriever, RandomRetriever, RPTConfig, RPTForCausalLM
from models.rpt.reading import Neighbours, QueryGroups, chunked_cross_attention


def _chunks(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw) for size in ((2, 3, 5, 4, 8), (2, 6, 7, 2, 8), (2, 6, 7, 2, 8))]


def test_one_neighbour_equals_grouped_cross_attention_with_weight_one():
    query, keys, values = _chunks()
    indices = torch.tensor([[[-1], [0], [4]], [[5], [-1], [2]]], dtype=torch.int32)
    found = Neighbours.gather(keys, values, indices)
    out = chunked_cross_attention(query, found.keys, found.values, found.real)
    expected = grouped_cross_attention(query, keys, values, indices, torch.ones(2, 3, 1), implementation="reference")
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_all_neighbours_share_one_softmax():
    query, keys, values = _chunks(1)
    indices = torch.tensor([[[3, -1, 1], [0, 2, 2], [-1, -1, -1]]] * 2, dtype=torch.int32)
    found = Neighbours.gather(keys, values, indices)
    out = chunked_cross_attention(query, found.keys, found.values, found.real)
    for b, group, row, head in torch.cartesian_prod(*map(torch.arange, (2, 3, 5, 4))).tolist():
        chosen = [index for index in indices[b, group].tolist() if index >= 0]
        if not chosen:
            assert (out[b, group, row, head] == 0).all()
            continue
        key, value = (torch.cat([x[b, index, :, head // 2] for index in chosen]) for x in (keys, values))
        weights = torch.softmax(key @ query[b, group, row, head] * 8**-0.5, dim=0)
        torch.testing.assert_close(out[b, group, row, head], weights @ value, atol=2e-6, rtol=0)


@pytest.mark.parametrize("past", [[0, 0], [4, 4], [3, 11], [5, 9]])
@pytest.mark.parametrize("length", [1, 4, 13])
def test_query_groups(past, length):
    groups = QueryGroups(past, length, chunk_size=5, device=torch.device("cpu"))
    place = torch.tensor(past)[:, None] + torch.arange(length)
    split = groups.split(place[..., None])[..., 0]
    assert torch.equal(groups.join(split[..., None])[..., 0], place)
    # The last token of a chunk and the first of the next read the neighbours of that chunk.
    owner = groups.join(groups.chunks[:, :, None, None].expand(-1, -1, split.shape[2], 1))[..., 0]
    assert torch.equal(owner, (place + 1) // 5 - 1)


@torch.no_grad()
def test_the_last_token_of_a_chunk_is_the_first_to_read_its_neighbours():
    # With a window of one position only neighbours connect tokens; chunk 4 reads chunk 1, nothing else is read.
    indices = torch.full((1, 8, 1), -1)
    indices[0, 4, 0] = 1
    model = small_rpt(OracleRetriever(indices), window_size=1, chunk_top_k=1)
    ids = token_ids(1, 40)
    edited = ids.clone()
    edited[0, 7] += 1
    moved = (model(edited).logits - model(ids).logits).abs().amax(-1)[0] > 1e-4
    assert moved.nonzero().flatten().tolist() == [7, *range(24, 29)]


def test_visible_range():
    asked = []

    def retriever(chunk_tokens, top_k, visible):
        asked.append((chunk_tokens, top_k, visible))
        return RandomRetriever()(chunk_tokens, top_k, visible)

    model = small_rpt(retriever, window_size=9)  # reaches into two chunks
    ids = token_ids(2, 33)
    model(ids, use_cache=False)
    ((tokens, top_k, visible),) = asked
    assert torch.equal(tokens, ids[:, :30].view(2, 6, 5))
    assert top_k == 2
    assert visible[0].tolist() == visible[1].tolist() == [[0, 0], [0, 0], [0, 0], [0, 1], [0, 2], [0, 3]]
    asked.clear()
    model(ids[:, :14], use_cache=False)
    assert not asked  # no chunk has an earlier one outside its window


def test_neighbours_teach_the_encoder():
    model, ids = small_rpt().train(), token_ids(1, 60) % 12
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_another_retriever_changes_logits_and_is_not_saved(tmp_path):
    model, ids = small_rpt(), token_ids(1, 60) % 12
    other = RPTForCausalLM(rpt_config(), RandomRetriever(3))
    other.load_state_dict(model.state_dict())
    assert isinstance(other.model.retriever, RandomRetriever)
    assert (other.eval()(ids).logits - model(ids).logits).abs().max() > 1e-3
    other.save_pretrained(tmp_path)
    again = RPTForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert isinstance(again.model.retriever, BM25Retriever)


def test_positions_of_neighbours_play_no_part():
    model = scaled_up(RPTForCausalLM(rpt_config(num_encoder_layers=2))).double()
    chunk = torch.randn(1, 5, 32, dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model.model.encoder(chunk)[:, order], model.model.encoder(chunk[:, order]))


def test_config_errors_and_published_fields():
    for changes, message in [
        ({"retriever": "tfidf"}, "retriever must be one of"),
        ({"retriever": "dense"}, "needs retriever_encoder"),
        ({"retriever_encoder": "x"}, "have no effect with retriever='bm25'"),
        ({"retriever_seed": 2}, "retriever_seed has no effect"),
        ({"num_upper_layers": 0}, "num_upper_layers must be"),
        ({"num_hidden_layers": 9}, "num_hidden_layers follows"),
    ]:
        with pytest.raises(ValueError, match=message):
            rpt_config(**changes)
    mapping = {"vocab_size": 200, "pad_id": 198, "bos_id": 197, "decoder_layers": [2, 3, 1], "enc_chunk_size": 32}
    config = RPTConfig.from_reference_config({**mapping, "chunk_topk": 3, "encoder_layers": 1, "slide_window": 64})
    assert (config.num_lower_layers, config.num_upper_layers, config.num_encoder_layers) == (2, 4, 1)
    assert (config.chunk_size, config.chunk_top_k, config.window_size, config.chunks_in_window) == (32, 3, 65, 3)
