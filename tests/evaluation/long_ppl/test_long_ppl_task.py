"""LongPPL as a task: its files, its sums, what it refuses."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluation.long_ppl.task as task_module
from evaluation.long_ppl import encode_text, evaluate_long_ppl, find_key_intervals
from evaluation.long_ppl.documents import TextModel
from evaluation.long_ppl.task import LongPplTask

OPTIONS = {"max_tokens": 40, "context_length": 6, "stride": 4, "alpha": 0.02, "beta": -9.0}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "that", "dog", "ran", "to", "his", "hat")


class Texts:
    """Three documents, the last one too short to have a target."""

    def __init__(self, seed=0):
        draw = torch.Generator().manual_seed(seed)
        lengths = (30, 60, 1)
        self.texts = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=draw)) for n in lengths]

    def describe(self):
        return {"texts": self.texts}

    def documents(self):
        return (SimpleNamespace(text=text) for text in self.texts)


def save_model(folder, seed):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 1, initializer_range=0.4, **size)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [save_model(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1)]


def test_sums_files_and_stored_keys(folders, tmp_path):
    first, second = folders
    task = LongPplTask({"a": first, "b": second}, Texts(), evaluator=first, **OPTIONS)
    result = task.run(tmp_path / "one")
    model, tokenizer = task._model(second).model, task._model(second).tokenizer
    texts = [encode_text(tokenizer, text, max_tokens=40) for text in Texts().texts]
    options = {name: OPTIONS[name] for name in ("context_length", "stride", "alpha", "beta")}
    keys = [find_key_intervals(task._model(first).model, text, **options) for text in texts]
    expected = evaluate_long_ppl(model, texts, keys)
    assert expected["num_key_tokens"] > 3 and expected["num_targets"] == 29 + 39
    row = result["results"][1]
    assert row["long_ppl"] == pytest.approx(expected["long_ppl"], rel=1e-12)
    assert (row["perplexity"], row["num_targets"]) == (pytest.approx(expected["ppl"], rel=1e-12), 68)
    lines = [json.loads(line) for line in (tmp_path / "one" / "predictions.jsonl").read_text().splitlines()]
    assert [line["num_targets"] for line in lines if line["model"] == "b"] == [29, 39, 0]
    for name in ("metrics.json", "long_ppl.csv", "loss_by_position.png"):
        assert (tmp_path / "one" / name).stat().st_size
    stored = LongPplTask(second, Texts(), key_file=str(tmp_path / "one" / "key_intervals.txt"), **OPTIONS)
    again = stored.run(tmp_path / "two")
    assert again["results"][0]["long_ppl"] == row["long_ppl"]
    assert again["protocol"]["key_file_identity"].startswith("sha256:")
    assert {"torch", "transformers", "git"} < again["protocol"]["versions"].keys()


def test_positions_add_up(folders, tmp_path):
    LongPplTask(folders[0], Texts(), evaluator=folders[0], **OPTIONS).run(tmp_path)
    for file in (tmp_path / "results").iterdir():
        document = json.loads(file.read_text())
        assert sum(document["position_counts"]) == document["num_targets"]
        assert math.fsum(document["position_nll_sum"]) == pytest.approx(document["nll_sum"], rel=1e-12)


def test_an_interrupted_run_continues_and_changes_are_computed_anew(folders, tmp_path, monkeypatch):
    scored = []
    score = task_module.score_document

    def count(*args, **options):
        scored.append(1)
        return score(*args, **options)

    monkeypatch.setattr(task_module, "score_document", count)
    run = LongPplTask(folders[0], Texts(), evaluator=folders[1], **OPTIONS).run
    first = run(tmp_path)["results"]
    sorted((tmp_path / "results").iterdir())[1].unlink()
    assert len(scored) == 3 and run(tmp_path)["results"][0]["nll_sum"] == first[0]["nll_sum"] and len(scored) == 4
    LongPplTask(folders[0], Texts(seed=1), evaluator=folders[1], **OPTIONS).run(tmp_path)
    assert len(scored) == 7


def test_another_tokenizer_is_another_model(folders, tmp_path):
    before = TextModel(folders[0], torch.float32, torch.device("cpu")).identity
    shutil.copytree(folders[0], tmp_path / "copy")
    rules = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    assert TextModel(str(tmp_path / "copy"), torch.float32, torch.device("cpu")).identity == before
    rules["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(rules))
    assert TextModel(str(tmp_path / "copy"), torch.float32, torch.device("cpu")).identity != before


def test_without_key_tokens_there_is_no_value(folders, tmp_path):
    result = LongPplTask(folders[0], Texts(), evaluator=folders[1], **OPTIONS | {"alpha": 99.0}).run(tmp_path)
    assert result["results"][0]["long_ppl"] is None and result["results"][0]["perplexity"] > 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"evaluator": None}, ValueError, "either an evaluator"),
        ({"key_file": "x"}, ValueError, "either an evaluator"),
        ({"evaluator": None, "key_file": "nowhere"}, FileNotFoundError, "no key file"),
        ({"evaluator": "nowhere"}, FileNotFoundError, "no model folder"),
        ({"max_tokens": 10}, ValueError, "short and full context are the same"),
        ({"max_documents": 0}, ValueError, "max_documents"),
        ({"dtype": "int8"}, ValueError, "dtype is one of"),
    ],
)
def test_refused(folders, change, error, message):
    with pytest.raises(error, match=message):
        LongPplTask(folders[0], Texts(), **{"evaluator": folders[1]} | OPTIONS | change)


def test_key_files_of_other_texts_and_models_without_tokenizers(folders, tmp_path):
    (tmp_path / "lines").write_text("[0, 3]\n")
    with pytest.raises(ValueError, match="has 1 lines, but there are 3"):
        LongPplTask(folders[0], Texts(), key_file=str(tmp_path / "lines"), **OPTIONS).run(tmp_path)
    LlamaForCausalLM.from_pretrained(folders[0]).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer"):
        LongPplTask(str(tmp_path / "bare"), Texts(), evaluator=folders[0], **OPTIONS).run(tmp_path)


def test_documents_longer_than_embedded_positions_are_refused(folders, tmp_path):
    config = GPT2Config(vocab_size=15, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    for source, evaluator in ((str(tmp_path / "gpt2"), folders[0]), (folders[0], str(tmp_path / "gpt2"))):
        task = LongPplTask(source, Texts(), evaluator=evaluator, **OPTIONS)
        with pytest.raises(ValueError, match=r"32 positions, too few .* or lower task\.max_tokens"):
            task.run(tmp_path / "out")
