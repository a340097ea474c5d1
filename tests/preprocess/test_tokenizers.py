"""Tokenizers: lossless, saved and loaded as Hugging Face folders, one identity wherever they lie."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from preprocess.command import run_command
from preprocess.encode import Encoder
from preprocess.tokenizers import (
    byte_tokenizer,
    canonical_backend,
    load_tokenizer,
    save_tokenizer,
    tokenizer_identity,
)
from preprocess.train_bpe import train_bpe
from preprocess.train_tokenizer import main as train_command

EVERY_BYTE_LENGTH = "".join(chr(code) for code in (*range(0x800), 0x20AC, 0x6F22, 0xFFFD, 0xFEFF, 0x1F600, 0x10FFFF))
TEXTS = [
    EVERY_BYTE_LENGTH,
    " leading and trailing  \r\n\t\n",
    "don't  stop , it 's",
    "a<|endoftext|>b<|pad|>",
    "e\u0301 \u00e9",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["the cat sat on the mat, the cat sat", "a mat for the cat\n"] * 5, vocab_size=270)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_bytes_are_their_own_ids(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_encoding_loses_nothing_and_makes_no_special_token(which, text, bpe):
    tokenizer = byte_tokenizer() if which == "bytes" else bpe
    (ids,) = Encoder(canonical_backend(tokenizer))([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)


def test_special_tokens_stand_where_they_are_documented(bpe):
    names = ["<|endoftext|>", "<|pad|>", "<|landmark|>"]
    assert byte_tokenizer().convert_tokens_to_ids(names) == [256, 257, 258] and len(byte_tokenizer()) == 259
    assert bpe.convert_tokens_to_ids(names) == [0, 1, 2] and len(bpe) == 270
    for tokenizer in (byte_tokenizer(), bpe):
        assert [tokenizer.eos_token, tokenizer.pad_token] == names[:2]


def test_saved_and_loaded_it_is_the_same(tmp_path, bpe):
    for number, tokenizer in enumerate((byte_tokenizer(), bpe)):
        folder = tmp_path / str(number)
        save_tokenizer(tokenizer, folder)
        for loaded in (load_tokenizer(folder), load_tokenizer(str(folder / "tokenizer.json"))):
            assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer)
            assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
            assert loaded.decode(loaded(TEXTS[2])["input_ids"]) == TEXTS[2]
    assert tokenizer_identity(byte_tokenizer()) != tokenizer_identity(bpe)


def test_identity_ignores_the_last_call(bpe):
    before = tokenizer_identity(bpe)
    bpe(["the cat", "a"], padding=True, truncation=True, max_length=3)
    assert tokenizer_identity(bpe) == before


def test_a_bare_file_finds_its_end_of_text(tmp_path):
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "</s>": 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token_id == 2
    assert load_tokenizer(tmp_path).pad_token_id is None


def test_training_is_repeatable():
    texts = ["one two three two one", "three one two"] * 3
    assert tokenizer_identity(train_bpe(texts, vocab_size=270)) == tokenizer_identity(train_bpe(texts, vocab_size=270))
    with pytest.raises(ValueError, match="259 to 4294967296 entries, got 258"):
        train_bpe(texts, vocab_size=258)


def test_missing_and_damaged_tokenizers_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a whole tokenizer folder"):
        load_tokenizer(tmp_path)


def test_the_training_command(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / f"text/{number}.txt").write_text(f"some words {number}, some more words " * 9)
    arguments = [str(tmp_path / "text"), "--vocab-size", "270", "--output", str(tmp_path / "deep/bpe")]
    assert run_command(train_command, arguments) == 0
    tokenizer = load_tokenizer(tmp_path / "deep/bpe")
    assert len(tokenizer) == 270 and tokenizer_identity(tokenizer) in capsys.readouterr().out
    assert run_command(train_command, arguments) == 2
    assert "use --overwrite" in capsys.readouterr().err
    assert run_command(train_command, [*arguments, "--overwrite", "--vocab-size", "265"]) == 0
    assert len(load_tokenizer(tmp_path / "deep/bpe")) == 265
    # The text itself is no tokenizer, and is not replaced by one.
    swallowing = [*arguments[:-1], str(tmp_path / "text"), "--overwrite"]
    assert run_command(train_command, swallowing) == 2
    assert "text also holds 0.txt, 1.txt, 2.txt, which would be lost" in capsys.readouterr().err
    assert len(list((tmp_path / "text").iterdir())) == 4
    assert run_command(train_command, [*arguments, "--overwrite", "--limit-bytes", "0"]) == 2
    content = json.loads((tmp_path / "deep/bpe/tokenizer.json").read_text())
    assert [token["content"] for token in content["added_tokens"]] == ["<|endoftext|>", "<|pad|>", "<|landmark|>"]
