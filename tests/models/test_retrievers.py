"""Frozen retrievers: deterministic, blind to the future, and right by a count by hand."""

import math

import pytest
import torch
from model_cases import small_rpt, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from models.rpt import BM25Retriever, DenseRetriever, MeanPooledEncoder, OracleRetriever, RandomRetriever
from models.rpt.retrievers import best_visible


def _visible(batch_size, num_chunks, lag=2):
    number = torch.arange(num_chunks)
    last = (number - lag).clamp_min(0)
    return torch.stack([torch.zeros_like(last), last], dim=1).expand(batch_size, -1, -1)


def _tokens(batch_size=2, num_chunks=9, size=6, ids=30, seed=0):
    return torch.randint(ids, (batch_size, num_chunks, size), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return MeanPooledEncoder(BertModel(BertConfig(**sizes, num_hidden_layers=1, initializer_range=0.5)), batch_size=4)


@pytest.fixture(params=["bm25", "random", "dense"])
def retriever(request, encoder):
    return {"bm25": BM25Retriever, "random": RandomRetriever, "dense": lambda: DenseRetriever(encoder)}[request.param]()


def test_neighbours_are_visible_different_and_repeatable(retriever):
    chunks, visible = _tokens(), _visible(2, 9)
    found = retriever(chunks, 3, visible)
    assert found.shape == (2, 9, 3) and found.dtype == torch.int32
    for row in found.flatten(0, 1).tolist():
        real = [index for index in row if index >= 0]
        assert len(set(real)) == len(real)
        assert row == real + [-1] * (3 - len(real))
    assert (found < visible[..., 1:]).all()
    assert (found[:, :3] == -1).all() and (found[:, 3, 0] >= -1).all() and (found[:, 8] >= 0).any()
    assert torch.equal(retriever(chunks, 3, visible), found)
    assert torch.equal(retriever(chunks, 20, visible)[..., :3], found)


def test_the_future_changes_nothing(retriever):
    chunks = _tokens()
    found = retriever(chunks, 3, _visible(2, 9))
    edited = chunks.clone()
    edited[:, 6:] = _tokens(seed=1)[:, 6:]
    assert torch.equal(retriever(edited, 3, _visible(2, 9))[:, :6], found[:, :6])
    assert torch.equal(retriever(chunks[:, :6], 3, _visible(2, 6)), found[:, :6])


def test_bm25_by_hand():
    chunks, visible = _tokens(ids=12), _visible(2, 9, lag=1)
    found = BM25Retriever(k1=1.5)(chunks, 4, visible)
    for row in range(2):
        texts = chunks[row].tolist()
        for number in range(9):
            seen = range(max(0, number - 1))
            scores = {}
            for other in seen:
                total = 0.0
                for word in texts[number]:
                    holding = sum(word in texts[index] for index in seen)
                    count = texts[other].count(word)
                    idf = math.log(1 + (len(seen) - holding + 0.5) / (holding + 0.5))
                    total += idf * count * 2.5 / (count + 1.5)
                if total:
                    scores[other] = round(total, 5)
            best = sorted(scores, key=lambda index: (-scores[index], index))[:4]
            assert found[row, number].tolist() == best + [-1] * (4 - len(best))


def test_equal_chunks_tie_to_the_earlier_one():
    chunk = _tokens(1, 1)
    found = BM25Retriever()(chunk.expand(1, 8, -1).contiguous(), 3, _visible(1, 8))
    assert found[0, 7].tolist() == [0, 1, 2]
    assert best_visible(torch.zeros(1, 2, 4), 2, torch.tensor([[[1, 3], [0, 0]]])).tolist() == [[[1, 2], [-1, -1]]]


def test_random_neighbours_are_uniform_and_follow_the_seed():
    chunks, visible = _tokens(200, 12, ids=1000), _visible(200, 12)
    found = RandomRetriever(1)(chunks, 3, visible)[:, 11]
    counts = torch.bincount(found.flatten().long(), minlength=9)
    expected = 200 * 3 / 9
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chi-square, 8 degrees of freedom, 0.1 %
    other = RandomRetriever(2)(chunks, 3, visible)[:, 11]
    assert (other != found).any(-1).float().mean() > 0.9


def test_given_neighbours_are_cut_to_what_is_visible():
    given = torch.tensor([[[0, 5], [3, 1], [0, 1], [0, 1]]])
    found = OracleRetriever(given)(torch.zeros(1, 3, 2, dtype=torch.long), 2, _visible(1, 3, lag=1))
    assert found.tolist() == [[[-1, -1], [-1, -1], [0, -1]]]


def test_dense_neighbours_have_the_largest_products(encoder):
    chunks, visible = _tokens(ids=60), _visible(2, 9)
    found = DenseRetriever(encoder)(chunks, 2, visible)
    with torch.no_grad():
        vectors = torch.stack(
            [encoder.model(input_ids=row).last_hidden_state.mean(1) for row in chunks]
        )  # every token counts
    scores = vectors @ vectors.transpose(1, 2)
    for row in range(2):
        best = scores[row, 8, :6].topk(2).indices.tolist()
        assert found[row, 8].tolist() == best


def test_encoded_chunks_are_remembered(encoder):
    encoded = []

    def encode(tokens):
        encoded.append(len(tokens))
        return encoder(tokens)

    retriever, chunks = DenseRetriever(encode), _tokens(1, 9, ids=60)
    first = retriever(chunks[:, :8], 2, _visible(1, 8))
    second = retriever(chunks, 2, _visible(1, 9))
    assert encoded == [8, 1]
    assert torch.equal(second[:, :8], first)


@pytest.fixture
def folders(tmp_path):
    """An encoder with a tokenizer of its own, and the tokenizer of a language model."""
    words = {f"w{number}": number for number in range(60)}
    for name, vocabulary in (
        ("encoder", {"[PAD]": 0, "[UNK]": 1} | {w: n + 2 for w, n in words.items()}),
        ("lm", words),
    ):
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]" if name == "encoder" else "w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]" if name == "encoder" else "w0", model_max_length=64
        ).save_pretrained(tmp_path / name)
    torch.manual_seed(0)
    sizes = {"vocab_size": 70, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, num_hidden_layers=1, initializer_range=0.5)).save_pretrained(tmp_path / "encoder")
    return tmp_path


@torch.no_grad()
def test_a_configured_encoder_reads_chunks_as_text(folders):
    options = {"retriever": "dense", "retriever_encoder": str(folders / "encoder")}
    model = small_rpt(**options, retriever_tokenizer=str(folders / "lm"))
    ids = token_ids(1, 40)
    logits = model(ids).logits
    retriever = model.model.retriever
    texts = []
    plain = retriever.encode
    retriever.encode = lambda batch: texts.extend(batch) or plain(batch)
    retriever._remembered.clear()
    assert torch.equal(model(ids).logits, logits)
    assert texts[0] == " ".join(f"w{number}" for number in ids[0, :5].tolist())
    assert not any("retriever" in name for name in model.state_dict())
    by_ids = small_rpt(**options)
    by_ids(ids)
    assert by_ids.model.retriever.tokenizer is None


@torch.no_grad()
def test_padding_is_no_part_of_a_vector(folders):
    encoder = MeanPooledEncoder.from_pretrained(str(folders / "encoder"), text=True)
    together = encoder(["w3 w4 w5 w6", "w7"])
    torch.testing.assert_close(together[1:], encoder(["w7"]), atol=1e-5, rtol=0)
    assert together.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
