"""Prompts behind a user's documents: as ordinary context, or as pieces of a patch."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.loading import load_model
from evaluation.text_generation.documents import read_documents
from evaluation.text_generation.task import TextGeneration
from patches.parallel_context import KeepPieces, ParallelContext
from preprocess.tokenizers import byte_tokenizer

TEXTS = {"a.txt": "the cat sat", "b.txt": "a dog ran off", "c.md": "caf\u00e9"}
PLAIN = ParallelContext(prefix=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte model of 64 positions, and three documents beside it."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=259, max_position_embeddings=64, eos_token_id=256, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "documents").mkdir()
    for name, text in TEXTS.items():
        (path / "documents" / name).write_text(text, encoding="utf-8")
    (path / "documents" / "picture.png").write_bytes(b"\x89")
    return path


def generate(folder, names=("a.txt", "b.txt"), output=None, **options):
    documents = [str(folder / "documents" / name) for name in names]
    defaults = {"prompt": "and", "documents": documents, "max_new_tokens": 6, "device": "cpu"}
    return TextGeneration(str(folder), **(defaults | options)).run(output)["samples"]


def test_without_a_patch_documents_are_read_one_after_another(folder):
    joined = generate(folder, documents=None, prompt=TEXTS["a.txt"] + TEXTS["b.txt"] + "and")[0]
    found = generate(folder)[0]
    assert found["continuation"] == joined["continuation"] and "num_pieces" not in found
    assert (found["num_documents"], found["num_context_tokens"], found["num_prompt_tokens"]) == (2, 24, 3)


def test_one_document_is_ordinary_context(folder):
    options = {"names": ["a.txt"], "max_new_tokens": 12}
    assert generate(folder, patch=PLAIN, **options)[0]["continuation"] == generate(folder, **options)[0]["continuation"]


def test_files_become_pieces(folder, tmp_path):
    found = generate(folder, patch=PLAIN, output=tmp_path)
    model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    pieces = [list(TEXTS[name].encode()) for name in ("a.txt", "b.txt")]
    with PLAIN.bind(model, byte_tokenizer()) as bound:
        wanted = bound.generate(bound.encode(pieces), list(b"and"), max_new_tokens=6).text[0]
    assert found[0]["continuation"] == wanted and found[0]["num_pieces"] == 2
    assert [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()] == found


def test_samples_repeat_and_read_the_documents_once(folder, monkeypatch):
    encoded = []
    options = {"temperature": 3.0, "num_samples": 3, "patch": PLAIN}
    from patches.parallel_context.engine import BoundContext

    whole = BoundContext.encode
    monkeypatch.setattr(BoundContext, "encode", lambda *a, **k: encoded.append(1) or whole(*a, **k))
    draws = [[s["continuation"] for s in generate(folder, seed=seed, **options)] for seed in (0, 0, 5)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) > 1 and len(encoded) == 3


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"degree": 1}, 1),
        ({"degree": 4}, 4),
        ({"max_piece_tokens": 6}, 5),  # 11 tokens in two, 13 in three
        ({"degree": 2, "split_by": "passages"}, 2),
        ({"piece_policy": KeepPieces(1)}, 2),
    ],
)
def test_the_patch_says_what_the_pieces_are(folder, options, count):
    assert generate(folder, patch=ParallelContext(prefix=None, **options))[0]["num_pieces"] == count


def test_pieces_of_documents():
    texts = [[1, 2, 3], [], [4, 5], [6]]
    assert ParallelContext().split_documents(texts) == [[1, 2, 3], [4, 5], [6]]
    assert ParallelContext(degree=2).split_documents(texts) == [[1, 2, 3], [4, 5, 6]]
    assert ParallelContext(max_piece_tokens=2).split_documents(texts) == [[1, 2], [3], [4, 5], [6]]
    assert ParallelContext(degree=2, split_by="passages").split_documents(texts) == [[1, 2, 3, 4, 5], [6]]
    assert ParallelContext().num_positions([[1, 2, 3], [4, 5]], prefix=2, query=4) == 9
    assert ParallelContext(position_mode="order").num_positions([[1, 2, 3], [4, 5]], prefix=2, query=4) == 11


def test_a_folder_stands_for_its_text_files(folder):
    found = read_documents(str(folder / "documents"))
    assert list(found.values()) == list(TEXTS.values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"patch": PLAIN, "documents": None}, "a patch reads documents"),
        ({"documents": []}, "documents is empty"),
        ({"names": ["a.txt", "a.txt"]}, "names .*a.txt twice"),
        ({"names": ["picture.png"]}, "is not UTF-8 text"),
        ({"max_new_tokens": 40}, "2 documents have 27 tokens and 40 are to be added.*patch=parallel_context"),
        ({"patch": PLAIN, "max_new_tokens": 50}, "reach position 66 behind pieces of up to 13 tokens, but"),
        ({"patch": ParallelContext(prefix="x" * 60)}, "a piece of 13 tokens behind a prefix of 60, but"),
        ({"patch": ParallelContext(degree=40)}, "asks for 40 pieces of 24 tokens"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(folder, **options)


def test_missing_documents_are_one_sentence(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        generate(folder, names=["nowhere.txt"])
    with pytest.raises(FileNotFoundError, match="holds no text file"):
        generate(folder, documents=str(tmp_path))
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="has no text: leave it out"):
        generate(folder, documents=str(tmp_path))
