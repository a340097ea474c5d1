"""The reader of sequence stores: what an item holds, and that nothing damaged is handed out."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from scored_cases import LENGTH, write_sequences

from datamodules.corpus_format import canonical_json, digest, identity_of
from datamodules.sequence_store import SequenceStore, open_sequences


@pytest.fixture
def store(tmp_path):
    return write_sequences(tmp_path / "store")


def test_an_item_is_the_sequence_its_targets_and_its_number(store):
    tokens = np.load(store.path / "tokens.npy")
    assert len(store) == len(tokens) == 12
    for number in range(len(store)):
        item = store[number]
        assert set(item) == {"input_ids", "valid", "sequence_index"} and item["sequence_index"] == number
        assert item["input_ids"].dtype == torch.int64 and item["input_ids"].tolist() == tokens[number].tolist()
        _, _, size, first = store.index[number].tolist()
        assert item["valid"].dtype == torch.bool and item["valid"].shape == (LENGTH - 1,)
        assert item["valid"].tolist() == [first <= t < size - 1 for t in range(LENGTH - 1)]
        assert item["valid"].sum() == store.num_targets[number] > 0
        assert (item["input_ids"][size:] == 0).all()
    assert store.num_targets.sum() == store.meta["num_targets"] == 24 + 3 + 9 + 60
    assert set(store.index[:, 3].tolist()) == {0, 3}
    for number in (-1, len(store)):
        with pytest.raises(IndexError, match=f"sequence {number} of 12"):
            store[number]


def test_items_are_the_callers_to_change(store):
    store[0]["input_ids"].fill_(-1)
    assert store[0]["input_ids"].min() > 0


def test_a_store_travels_without_its_tokens(tmp_path):
    store = write_sequences(tmp_path / "store", sizes=[5000])
    expected = store[17]["input_ids"].tolist()
    sent = pickle.dumps(store)
    assert len(sent) < 40_000 < (store.path / "tokens.npy").stat().st_size * 2
    assert pickle.loads(sent)[17]["input_ids"].tolist() == expected


def test_the_id_depends_on_content_and_options_not_on_the_place(tmp_path, store):
    assert write_sequences(tmp_path / "deep/same").store_id == store.store_id
    others = [{"tail": "pad"}, {"bos_token_id": 9}, {"length": 11}, {"sizes": (25, 4, 10, 60)}, {"tokenizer": "x"}]
    ids = {write_sequences(tmp_path / str(i), **options).store_id for i, options in enumerate(others)}
    assert len(ids | {store.store_id}) == 6
    meta = store.meta
    identity = {name: meta[name] for name in ("format", "version", "length", "bos_token_id", "tail", "parity")}
    identity["tokenizer"] = None
    for name in ("index", "hashes"):
        content = np.load(store.path / f"{name}.npy").tobytes()
        identity[name] = hashlib.sha256(content).hexdigest()
    assert store.store_id == digest(identity)


def test_a_flipped_token_is_found_when_it_is_read(store):
    file = store.path / "tokens.npy"
    content = bytearray(file.read_bytes())
    content[128 + 4 * LENGTH * 2] ^= 1
    file.write_bytes(content)
    damaged = SequenceStore(store.path)
    damaged[1], damaged[3]
    with pytest.raises(ValueError, match=r"sequence 2 of .* is damaged"):
        damaged[2]


@pytest.mark.parametrize("name", ["tokens.npy", "index.npy", "hashes.npy"])
def test_a_torn_or_missing_file_is_named(store, name):
    file = store.path / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name} is missing or torn"):
        SequenceStore(store.path)
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing or torn"):
        SequenceStore(store.path)
    np.save(file, np.zeros((3, 3), np.int32))
    with pytest.raises(ValueError, match=f"{name} is damaged: .* expected"):
        SequenceStore(store.path)


@pytest.mark.parametrize("name", ["index.npy", "hashes.npy"])
def test_a_flipped_bit_in_index_or_hashes_is_found(store, name):
    file = store.path / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="index or hashes are not those of its store_id"):
        SequenceStore(store.path)


def test_changed_or_missing_meta_is_refused(store, tmp_path):
    file = store.path / "meta.json"
    meta = json.loads(file.read_text())
    assert meta["identity"] == identity_of(meta)
    file.write_text(canonical_json(meta | {"bos_token_id": 5}))
    with pytest.raises(ValueError, match="was changed"):
        SequenceStore(store.path)
    file.write_text(canonical_json(meta | {"version": 2}))
    with pytest.raises(ValueError, match="version 1"):
        SequenceStore(store.path)
    file.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        SequenceStore(store.path)
    with pytest.raises(FileNotFoundError, match="no sequences at"):
        SequenceStore(tmp_path)


def test_a_store_is_given_itself_or_as_its_path(store):
    assert open_sequences(store) is store
    assert open_sequences(str(store.path)).store_id == open_sequences(store.path).store_id == store.store_id
