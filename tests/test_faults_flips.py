"""A flipped bit anywhere in a store: its check ends with an error that names the file."""

import random
import shutil

import numpy as np
import pytest

from datamodules.corpus_format import META_FILE, canonical_json, file_sha256, identity_of
from datamodules.span_scores import FORMAT as SPAN_SCORES
from preprocess import score_tokens, verify
from preprocess.command import run_command
from preprocess.index import CorpusWriter, write_text
from tests.datamodules.scored_cases import write_scores, write_sequences

FLIPS = 40


def corpus(folder, summary_folder):
    with CorpusWriter(
        folder / "train", dtype="uint16", tokenizer="t", vocab_size=300, eos_token_id=256, source="test"
    ) as writer:
        for size in range(1, 9):
            writer.add(list(range(size)), size)
    return [str(folder)]


def sequences(folder, summary_folder):
    write_sequences(folder / "train")
    return [str(folder)]


def scores(folder, summary_folder):
    store = write_sequences(folder / "sequences")
    write_scores(folder / "scores", store, model="m", schedule={"base_length": 4})
    return ["--sequences", str(store.path), "--output", str(folder / "scores"), "--verify"]


def summaries(folder, summary_folder):
    shutil.copytree(summary_folder / "test", folder / "test")
    return [str(folder)]


def span_scores(folder, summary_folder):
    folder.mkdir()
    np.save(folder / "train.npy", np.random.default_rng(0).random(20, np.float32))
    entry = {"corpus": "c", "num_tokens": 20, "sha256": file_sha256(folder / "train.npy")}
    meta = {"format": SPAN_SCORES, "version": 1, "work": {"stride": 4}, "splits": {"train": entry}}
    write_text(folder / META_FILE, canonical_json(meta | {"identity": identity_of(meta)}) + "\n")
    return [str(folder)]


STORES = {make.__name__: make for make in (corpus, sequences, scores, summaries, span_scores)}
FILES = {
    "corpus": {"tokens.bin", "documents.bin", "meta.json"},
    "sequences": {"tokens.npy", "index.npy", "hashes.npy", "meta.json"},
    "scores": {"manifest.json", *(f"shard-00000{i}.{kind}" for i in range(3) for kind in ("npy", "json"))},
    "summaries": {"tokens.bin", "documents.bin", "meta.json", "texts.jsonl"},
    "span_scores": {"train.npy", "meta.json"},
}


def check(kind, arguments):
    try:
        return run_command(score_tokens.main if kind == "scores" else verify.main, arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("kind", STORES)
def test_any_flipped_bit_is_found_and_its_file_named(kind, tmp_path, summary_folder, capsys):
    arguments = STORES[kind](tmp_path / "store", summary_folder)
    assert check(kind, arguments) == 0
    folder = tmp_path / "store" / "scores" if kind == "scores" else tmp_path / "store"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.name for path in files} == FILES[kind]
    draw = random.Random(kind)
    for path in files:
        content = path.read_bytes()
        for _ in range(FLIPS):
            place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            capsys.readouterr()
            status, said = check(kind, arguments), capsys.readouterr()
            shown = said.out + said.err
            assert status in (1, 2), (path, place, bit, shown)
            assert path.name in shown and str(folder) in shown, (path, place, bit, shown)
        path.write_bytes(content)
    assert check(kind, arguments) == 0
