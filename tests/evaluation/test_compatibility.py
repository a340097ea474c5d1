"""Which corpus a model may be scored on, and what loading a model folder refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from datamodules.corpus import open_corpus
from evaluation.compatibility import SAME, UNKNOWN, check_length, check_tokens
from evaluation.loading import load_model, load_tokenizer
from evaluation.perplexity.task import PerplexityTask
from preprocess.corpora import ensure_corpus
from preprocess.tokenizers import load_tokenizer as any_tokenizer

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same text with three tokenizers; the last two have equally many entries and the same end of text."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, text in (("one", "a rat, a rat, a tart"), ("two", "no one, no oboe")):
        (folder / f"{name}.txt").write_text(text * 40)
        ensure_corpus(folder / name, source=str(folder / f"{name}.txt"), tokenizer="bpe:264")
    ensure_corpus(folder / "bytes", source=str(folder / "one.txt"), tokenizer="bytes")
    return folder


@pytest.fixture
def model_folder(tmp_path):
    """Make a model folder, with the tokenizer of a corpus if one is named."""

    def make(tokenizer=None, kind=LlamaConfig, **options):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        config = kind(**({"vocab_size": 264, "eos_token_id": 0, "bos_token_id": None} | sizes | options))
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        (LlamaForCausalLM if kind is LlamaConfig else GPT2LMHeadModel)(config).save_pretrained(folder)
        if tokenizer is not None:
            any_tokenizer(tokenizer).save_pretrained(folder)
        return str(folder)

    return make


def corpus(folder, name):
    return open_corpus(folder / name, split="train")


def test_the_same_tokenizer_is_recognised_by_what_it_does(corpora, model_folder):
    assert check_tokens(model_folder(corpora / "one/tokenizer"), corpus(corpora, "one")) == SAME
    assert check_tokens(model_folder("bytes", vocab_size=300, eos_token_id=256), corpus(corpora, "bytes")) == SAME


def test_another_tokenizer_of_the_same_size_is_refused(corpora, model_folder, tmp_path):
    folder = model_folder(corpora / "one/tokenizer")
    with pytest.raises(ValueError, match=r"made with another tokenizer than the model's: .*--tokenizer"):
        check_tokens(folder, corpus(corpora, "two"))
    task = PerplexityTask(folder, corpus(corpora, "two"), [8], progress=False)
    with pytest.raises(ValueError, match=r"model model.: the corpus was made with another tokenizer"):
        task.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocab_size": 263}, "264 token ids but the model only 263"),
        ({"eos_token_id": 2}, "ends documents with token 0 but the model with 2"),
        ({"eos_token_id": [2, 3]}, "ends documents with token 0 but the model with 2 or 3"),
        ({"eos_token_id": [2, 0]}, None),
        ({"eos_token_id": None, "vocab_size": 1000}, None),
    ],
)
def test_without_a_tokenizer_the_sizes_are_compared(corpora, model_folder, tmp_path, options, sentence):
    folder = model_folder(**options)
    if sentence is None:
        task = PerplexityTask(folder, corpus(corpora, "one"), [8], progress=False)
        assert list(task.run(tmp_path / "out")["protocol"]["tokenizers"].values()) == [UNKNOWN]
    else:
        with pytest.raises(ValueError, match=sentence):
            check_tokens(folder, corpus(corpora, "one"))


def test_a_length_beyond_a_position_table_is_refused(model_folder):
    folder = model_folder(kind=GPT2Config, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    check_length(folder, 16)
    with pytest.raises(ValueError, match="16 positions, too few for a length of 17"):
        check_length(folder, 17)
    check_length(model_folder(max_position_embeddings=16), 17)  # rotary positions go on


def test_missing_weights_are_refused_and_not_invented(model_folder):
    file = model_folder() + "/model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model\.norm\.weight"):
        load_model(file.removesuffix("/model.safetensors"), **CPU)


@pytest.mark.parametrize(("name", "load"), [("model.safetensors", load_model), ("tokenizer.json", load_tokenizer)])
def test_damaged_files_are_one_sentence(model_folder, name, load):
    folder = model_folder("bytes")
    with open(f"{folder}/{name}", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"(model|tokenizer in) .* does not load: [^\n]+$"):
        load(folder, **(CPU if load is load_model else {}))


def test_a_name_that_the_hub_does_not_know_is_no_model_without_a_tokenizer(monkeypatch):
    def unreachable(name):
        raise OSError("no connection")

    monkeypatch.setattr("models.pretrained.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match="no model some/model"):
        load_tokenizer("some/model")
