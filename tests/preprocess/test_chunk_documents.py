"""Cutting documents: the published chunks, and every token a target exactly once."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from preprocess.chunk_documents import Chunk, chunk_document

FIXTURES = Path(__file__).parents[1] / "fixtures/token_weighting_data"
RECORDS = json.loads((FIXTURES / "chunks.json").read_text())
BOS = 7


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_chunks_of_the_fixtures(record):
    options = {name: record[name] for name in ("bos_token_id", "tail", "parity")}
    found = chunk_document(record["document"], record["length"], **options)
    assert all(isinstance(chunk, Chunk) and chunk.tokens.dtype == np.int32 for chunk in found)
    expected = record["chunks"]
    assert [chunk.tokens.tolist() for chunk in found] == [chunk["tokens"] for chunk in expected]
    if not record["parity"]:
        assert [(chunk.offset, chunk.first_target) for chunk in found] == [
            (chunk["offset"], chunk["first_target"]) for chunk in expected
        ]


def documents():
    draw = np.random.default_rng(0)
    for size in range(0, 27):
        document = draw.integers(100, 1000, size=size)
        yield document
        if size:
            yield np.concatenate([[BOS], document])  # at most one is removed
            yield np.concatenate([[BOS, BOS], document])


def positions(chunk, *, with_bos):
    """Document positions of the targets of a chunk that count."""
    first = chunk.offset + (0 if with_bos else 1)
    return list(range(first + chunk.first_target, first + len(chunk.tokens) - 1))


@pytest.mark.parametrize("length", [2, 3, 5, 8])
@pytest.mark.parametrize("bos_token_id", [None, BOS])
def test_every_token_is_a_target_exactly_once(length, bos_token_id):
    with_bos = bos_token_id is not None
    for document, tail in itertools.product(documents(), ("pad", "align")):
        chunks = chunk_document(document, length, bos_token_id=bos_token_id, tail=tail)
        body = document[1:] if with_bos and len(document) and document[0] == BOS else document
        counted = Counter(position for chunk in chunks for position in positions(chunk, with_bos=with_bos))
        assert counted == Counter(range(0 if with_bos else 1, len(body)))
        for chunk in chunks:
            assert 2 <= len(chunk.tokens) <= length
            inside = chunk.tokens[1:] if with_bos else chunk.tokens
            assert inside.tolist() == body[chunk.offset : chunk.offset + len(inside)].tolist()
            assert not with_bos or chunk.tokens[0] == BOS
            assert positions(chunk, with_bos=with_bos)
        if tail == "align" and len(body) >= length:
            assert {len(chunk.tokens) for chunk in chunks} == {length}


@pytest.mark.parametrize("bos_token_id", [None, BOS])
def test_dropping_leaves_out_the_rest_only(bos_token_id):
    for document in documents():
        padded = chunk_document(document, 5, bos_token_id=bos_token_id, tail="pad")
        dropped = chunk_document(document, 5, bos_token_id=bos_token_id, tail="drop")
        kept = [chunk for chunk in padded if len(chunk.tokens) == 5]
        assert [chunk.tokens.tolist() for chunk in dropped] == [chunk.tokens.tolist() for chunk in kept]
        assert len(padded) - len(dropped) <= 1


def test_documents_without_a_target_give_no_chunk():
    for tail in ("pad", "align", "drop"):
        assert chunk_document([], 4, tail=tail) == chunk_document([], 4, bos_token_id=BOS, tail=tail) == []
        assert chunk_document([5], 4, tail=tail) == chunk_document([BOS], 4, bos_token_id=BOS, tail=tail) == []
    assert chunk_document([], 4, tail="drop", parity=True) == []
    assert [c.tokens.tolist() for c in chunk_document([5], 4, bos_token_id=BOS)] == [[BOS, 5]]


def test_parity_loses_a_token_at_every_border():
    document = list(range(100, 130))
    chunks = chunk_document(document, 6, bos_token_id=BOS, tail="drop", parity=True)
    read = [token for chunk in chunks for token in chunk.tokens[1:].tolist()]
    assert set(document) - set(read) >= {100, 106, 112, 118}  # the first is dropped although it is no BOS
    assert all(chunk.tokens[0] == BOS and len(chunk.tokens) == 6 for chunk in chunks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"tail": "wrap"}, "tail is one of pad, align, drop, got wrap"),
        ({"parity": True}, "it needs tail='drop', got pad"),
        ({"parity": True, "tail": "align"}, "it needs tail='drop', got align"),
        ({"bos_token_id": -1}, "bos_token_id must be a token id, got -1"),
        ({"bos_token_id": 2**31}, "bos_token_id must be a token id"),
        ({"tokens": [1, -2]}, "token id -2"),
        ({"tokens": [1, 2**31]}, "token id 2147483648"),
        ({"tokens": [1.5]}, "flat list"),
        ({"tokens": [[1]]}, "flat list"),
    ],
)
def test_impossible_options_are_refused(options, message):
    arguments = {"tokens": [1, 2, 3], "length": 4} | options
    with pytest.raises(ValueError, match=message):
        chunk_document(arguments.pop("tokens"), arguments.pop("length"), **arguments)
