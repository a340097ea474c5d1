"""The reader of score stores: rows by number, and nothing that is missing, torn or of other sequences."""

import json
import pickle

import numpy as np
import pytest
import torch
from scored_cases import write_scores, write_sequences

from datamodules.corpus_format import canonical_json
from datamodules.score_store import ScoreStore, describe_problems, shards_of


@pytest.fixture
def sequences(tmp_path):
    return write_sequences(tmp_path / "sequences")


@pytest.fixture
def folder(tmp_path, sequences):
    return write_scores(tmp_path / "scores", sequences)


def test_rows_are_those_of_the_shards(folder, sequences):
    written = np.concatenate([np.load(file) for file in sorted(folder.glob("*.npy"))])
    store = ScoreStore(folder, sequences, verify="full")
    assert len(store) == len(sequences) == len(written) == 12
    for number in reversed(range(12)):
        row = store[number]
        assert row.dtype == torch.float32 and row.shape == (9,)
        assert row.numpy().tobytes() == written[number].tobytes()
    for number in (-1, 12):
        with pytest.raises(IndexError):
            store[number]
    assert ScoreStore(folder, sequences.path).manifest_id == store.manifest_id


def test_rows_are_the_callers_to_change(folder, sequences):
    store = ScoreStore(folder, sequences)
    store[3].fill_(0)
    assert store[3].nansum() > 0


def test_shards_cover_the_sequences():
    assert [tuple(shard) for shard in shards_of(11, 4)] == [(0, 0, 4), (1, 4, 4), (2, 8, 3)]
    assert [shard.rows for shard in shards_of(8, 4)] == [4, 4] and shards_of(1, 256)[0].rows == 1


def test_a_store_travels_without_its_maps(folder, sequences):
    store = ScoreStore(folder, sequences)
    expected = store[7].tolist()
    assert str(pickle.loads(pickle.dumps(store))[7].tolist()) == str(expected)
    assert len(pickle.dumps(store)) < 2000


def test_missing_shards_are_listed(tmp_path, sequences):
    folder = write_scores(tmp_path / "partial", sequences, limit=1)
    with pytest.raises(ValueError, match=r"missing shards 1, 2 of 3; run python -m preprocess\.score_tokens"):
        ScoreStore(folder, sequences)


def test_torn_shards_are_found_by_size_and_flipped_ones_by_hash(folder, sequences):
    file = folder / "shard-000001.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="torn shards 1 of 3"):
        ScoreStore(folder, sequences)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    damaged = ScoreStore(folder, sequences)
    damaged[4], damaged[10]
    with pytest.raises(ValueError, match=r"shard-000001\.npy is damaged"):
        damaged[5]
    with pytest.raises(ValueError, match="corrupt shards 1 of 3"):
        ScoreStore(folder, sequences, verify="full")
    with pytest.raises(ValueError, match="verify is one of sizes, full, got hash"):
        ScoreStore(folder, sequences, verify="hash")


@pytest.mark.parametrize("name", ["shard", "first", "rows", "manifest_id"])
def test_a_record_that_is_not_of_the_shard_does_not_count(folder, sequences, name):
    record = folder / "shard-000002.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {name: 77}))
    with pytest.raises(ValueError, match="missing shards 2 of 3"):
        ScoreStore(folder, sequences)


def test_a_record_without_an_identity_holds_only_what_is_documented(folder, sequences):
    record = folder / "shard-000000.json"
    content = json.loads(record.read_text())
    content.pop("identity")
    record.write_text(json.dumps(content))
    ScoreStore(folder, sequences, verify="full")
    record.write_text(json.dumps(content | {"idfntity": "?"}))
    with pytest.raises(ValueError, match=r"missing shards 0 of 3; .* \(look at shard-000000\.json\)"):
        ScoreStore(folder, sequences)


def test_scores_of_other_sequences_name_both(folder, sequences, tmp_path):
    other = write_sequences(tmp_path / "other", sizes=(25, 4, 10, 60))
    with pytest.raises(ValueError, match=sequences.store_id) as caught:
        ScoreStore(folder, other)
    assert other.store_id in str(caught.value)


def test_an_array_of_another_shape_is_refused_when_it_is_read(folder, sequences):
    file = folder / "shard-000000.npy"
    size = file.stat().st_size
    np.save(file, np.zeros((9, 5), np.float32))
    assert file.stat().st_size == size
    with pytest.raises(ValueError, match=r"shard 0 of .* not float32 \(5, 9\)"):
        ScoreStore(folder, sequences)[0]


def test_changed_or_missing_manifests_are_refused(folder, sequences, tmp_path):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for content, message in [
        (json.dumps(manifest, indent=1), "was changed"),
        ("{", "is damaged"),
        (canonical_json(manifest | {"version": 9}), "version 1"),
        (canonical_json(manifest | {"shard_size": 0}), "lacks a valid shard_size"),
        (canonical_json(manifest | {"note": 1}), r"look at manifest\.json"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            ScoreStore(folder, sequences)
    with pytest.raises(FileNotFoundError, match="no scores at"):
        ScoreStore(tmp_path, sequences)


def test_problems_are_listed_by_kind():
    assert describe_problems({0: "intact"}) == ""
    states = {0: "corrupt", 1: "missing", 2: "intact", 3: "missing", 4: "torn"}
    assert describe_problems(states) == "missing shards 1, 3 of 5; torn shards 4 of 5; corrupt shards 0 of 5"
