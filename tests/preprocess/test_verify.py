"""Verification finds a single wrong bit and names the file."""

import json
import shutil

import numpy as np
import pytest

from datamodules.corpus_format import canonical_json, file_sha256, identity_of
from preprocess.chunk_cut import Chunk
from preprocess.chunk_store import SequenceWriter
from preprocess.command import run_command
from preprocess.corpora import ensure_corpus
from preprocess.index import CorpusWriter
from preprocess.verify import main


@pytest.fixture
def corpus_folder(tmp_path):
    for split in ("train", "validation"):
        with CorpusWriter(
            tmp_path / split, dtype="uint16", tokenizer="t", vocab_size=300, eos_token_id=256, source=split
        ) as writer:
            for size in range(1, 20):
                writer.add(list(range(size)))
    return tmp_path


def test_whole_stores_pass(corpus_folder, capsys):
    assert run_command(main, [str(corpus_folder)]) == 0
    assert capsys.readouterr().out.count("whole, 19 documents, 209 tokens") == 2
    assert run_command(main, [str(corpus_folder / "train")]) == 0


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "meta.json"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_found(corpus_folder, capsys, name, place):
    file = corpus_folder / "validation" / name
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 2))] ^= 1
    file.write_bytes(content)
    assert run_command(main, [str(corpus_folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and str(file) in message


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin"])
def test_a_truncated_or_missing_file_is_found(corpus_folder, capsys, name):
    file = corpus_folder / "train" / name
    file.write_bytes(file.read_bytes()[:-2])
    assert run_command(main, [str(corpus_folder)]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err
    file.unlink()
    assert run_command(main, [str(corpus_folder)]) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


def test_another_tokenizer_in_the_folder_is_found(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/train.txt").write_text("words")
    ensure_corpus(tmp_path / "corpus", source=str(tmp_path / "raw"), tokenizer="bytes")
    assert run_command(main, [str(tmp_path / "corpus")]) == 0
    file = tmp_path / "corpus/tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace('"Z": 90', '"Z": 91').replace('"[": 91', '"[": 90'))
    assert run_command(main, [str(tmp_path / "corpus")]) == 2
    assert f"{file.parent} is damaged or was replaced" in capsys.readouterr().err


def test_offsets_that_do_not_fit_are_found_even_with_a_right_checksum(corpus_folder, capsys):
    folder = corpus_folder / "train"
    content = bytearray((folder / "documents.bin").read_bytes())
    content[8] = 200
    (folder / "documents.bin").write_bytes(content)
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["documents.bin"] = file_sha256(folder / "documents.bin")
    (folder / "meta.json").write_text(canonical_json(meta | {"identity": identity_of(meta)}))
    assert run_command(main, [str(corpus_folder)]) == 2
    assert "does not cut the tokens into documents" in capsys.readouterr().err


def test_nothing_there_is_said(tmp_path, capsys):
    assert run_command(main, [str(tmp_path)]) == 2
    assert "no token corpus and no sequences at" in capsys.readouterr().err


@pytest.fixture
def sequences_folder(tmp_path):
    (tmp_path / "train").mkdir()
    writer = SequenceWriter(tmp_path / "train", 8)
    for document in range(5):
        writer.add(document, Chunk(np.arange(3 + document, dtype=np.int32), 0, 0))
    writer.finish(bos_token_id=None, tail="short", parity=False, tokenizer="t", source="test")
    return tmp_path


def test_whole_sequences_pass(sequences_folder, capsys):
    assert run_command(main, [str(sequences_folder)]) == 0
    assert "train: whole, 5 sequences of 8 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokens.npy", "index.npy", "hashes.npy", "meta.json"])
def test_a_flipped_bit_of_sequences_is_found(sequences_folder, capsys, name):
    file = sequences_folder / "train" / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert run_command(main, [str(sequences_folder)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and str(file) in message


def test_whole_summaries_and_their_tokenizer_pass(summary_folder, tmp_path, capsys):
    store = shutil.copytree(summary_folder, tmp_path / "store")
    assert run_command(main, [str(store)]) == 0
    assert "train: whole, 23 documents with summaries" in capsys.readouterr().out
    assert run_command(main, [str(store / "test")]) == 0
    file = store / "tokenizer" / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"eos_token": "<|endoftext|>"', '"eos_token": "<|pad|>"'))
    assert run_command(main, [str(store)]) == 2
    assert f"{file.parent} is damaged or was replaced" in capsys.readouterr().err


def test_scores_of_sequences_are_sent_to_their_own_check(tmp_path, capsys):
    (tmp_path / "manifest.json").write_text("{}")
    assert run_command(main, [str(tmp_path)]) == 2
    assert (
        f"python -m preprocess.score_tokens --sequences FOLDER --output {tmp_path} --verify" in capsys.readouterr().err
    )
