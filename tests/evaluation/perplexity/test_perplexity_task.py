"""The evaluation command's work: files, protocol, resuming, bad requests."""

import csv
import json
import math

import pytest
import torch

from datamodules.corpus import open_corpus
from evaluation import cache_memory
from evaluation.perplexity import evaluate_perplexity
from evaluation.perplexity import journal as perplexity_journal
from evaluation.perplexity import stream as perplexity
from evaluation.perplexity import task as perplexity_task
from evaluation.perplexity.report import SHOWN
from evaluation.perplexity.task import PerplexityTask
from preprocess.index import CorpusWriter


@pytest.fixture(autouse=True)
def fixed_commit(monkeypatch):
    """Numbers of another commit are computed anew, and somebody may commit while these tests run."""
    monkeypatch.setattr("evaluation.arithmetic.git_commit", lambda: "a commit")


@pytest.fixture
def without_figures(monkeypatch):
    """Figures take longer than everything else here."""
    for figure in ("save_perplexity_by_length", "save_loss_by_position", "save_comparison"):
        monkeypatch.setattr(f"evaluation.perplexity.report.{figure}", lambda *_: None)


@pytest.fixture
def folders(tmp_path, llama, stream):
    """Two model folders and a corpus folder with one split."""
    llama.save_pretrained(tmp_path / "a" / "model")
    with torch.no_grad():
        llama.lm_head.weight *= 0.5
        llama.save_pretrained(tmp_path / "b")
        llama.lm_head.weight *= 2
    (tmp_path / "corpus").mkdir()
    options = {"dtype": "uint16", "tokenizer": "sha256:t", "vocab_size": 61, "eos_token_id": 0, "source": "test"}
    with CorpusWriter(tmp_path / "corpus" / "validation", append_eos=False, **options) as writer:
        writer.add(stream.tolist(), num_bytes=450)
    return tmp_path


def task(folders, **options):
    defaults = {
        "models": {"a": str(folders / "a" / "model"), "b": str(folders / "b")},
        "corpus": open_corpus(folders / "corpus", split="validation"),
        "lengths": [32, 8],
        "progress": False,
    }
    return PerplexityTask(**(defaults | options))


def test_results_equal_single_evaluations(folders, llama, stream, tmp_path):
    out = tmp_path / "out"
    result = task(folders, bos_token_id=3).run(out)
    assert [(r["model"], r["length"]) for r in result["results"]] == [("a", 8), ("a", 32), ("b", 8), ("b", 32)]
    for entry in result["results"][:2]:
        expected = evaluate_perplexity(llama, stream, window=entry["length"], bos_token_id=3)
        assert entry["nll_sum"] == pytest.approx(expected["nll_sum"], rel=1e-6)
        assert entry["bits_per_byte"] == pytest.approx(entry["loss"] / 0.6931471805599453 / 3)
        assert entry["num_targets"] == len(stream)
    assert result["results"][2]["nll_sum"] != result["results"][0]["nll_sum"]
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["protocol"]["bos_token_id"] == 3
    assert stored["protocol"]["dtype"] == "float32"
    assert stored["protocol"]["corpus"] == stored["results"][0]["corpus"]
    assert stored["models"]["a"]["identity"] != stored["models"]["b"]["identity"]
    rows = list(csv.DictReader((out / "perplexity.csv").open()))
    assert [float(row["perplexity"]) for row in rows] == [r["perplexity"] for r in stored["results"]]
    windows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    total = sum(w["nll_sum"] for w in windows if (w["model"], w["length"]) == ("b", 8))
    assert total == pytest.approx(stored["results"][2]["nll_sum"])
    assert result["table"].splitlines()[0].split() == list(SHOWN)
    for name in ("perplexity_by_length.png", "loss_by_position.png", "comparison.png"):
        assert (out / name).stat().st_size > 5000


@pytest.mark.usefixtures("without_figures")
def test_finished_lengths_are_not_repeated(folders, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "out", perplexity.score_stream, []

    def counting(model, corpus, reading, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(reading.window)
        return real(model, corpus, reading, **options)

    monkeypatch.setattr(perplexity_task, "score_stream", counting)
    with pytest.raises(KeyboardInterrupt):
        task(folders).run(out)
    assert calls == [8, 32, 8]
    assert not (out / "metrics.json").exists()
    calls.clear()
    first = task(folders).run(out)
    assert calls == [32]
    monkeypatch.setattr(perplexity_task.PerplexityTask, "_load", None)  # nothing is left to load a model for
    assert task(folders).run(out)["results"] == first["results"]


@pytest.mark.usefixtures("without_figures")
def test_another_protocol_or_model_is_never_served_old_numbers(folders, tmp_path, llama):
    out = tmp_path / "out"
    numbers = [task(folders, models=str(folders / "b")).run(out)["results"][0]["nll_sum"]]
    numbers.append(task(folders, models=str(folders / "b"), max_tokens=100).run(out)["results"][0]["nll_sum"])
    numbers.append(task(folders, models=str(folders / "b"), stride=4).run(out)["results"][0]["nll_sum"])
    numbers.append(task(folders, models=str(folders / "b"), dtype="bfloat16").run(out)["results"][0]["nll_sum"])
    numbers.append(task(folders, models=str(folders / "b"), dtype="bfloat16-mixed").run(out)["results"][0]["nll_sum"])
    llama.save_pretrained(folders / "b")
    numbers.append(task(folders, models=str(folders / "b")).run(out)["results"][0]["nll_sum"])
    assert len(set(numbers)) == len(numbers)


def test_a_broken_model_gets_strict_json_and_the_same_table_twice(folders, tmp_path, llama):
    with torch.no_grad():
        kept = llama.lm_head.weight.clone()
        llama.lm_head.weight.fill_(torch.nan)
        llama.save_pretrained(folders / "b")
        llama.lm_head.weight.copy_(kept)
    out = tmp_path / "out"
    first, again = (task(folders, models=str(folders / "b")).run(out) for _ in range(2))
    assert first["table"] == again["table"] and " nan " in first["table"]
    texts = [file.read_text() for file in out.glob("**/*.json")] + (out / "predictions.jsonl").read_text().splitlines()
    for text in texts:
        stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert {entry["value"] for entry in stored["not_finite"]} == {"nan"}


@pytest.mark.usefixtures("without_figures")
def test_the_published_mean_stands_beside_the_perplexity(folders, tmp_path, llama, stream):
    result = task(folders, models=str(folders / "b"), lengths=[32], parity="published").run(tmp_path / "out")
    row = result["results"][0]
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"])) != row["published_mean_loss"]
    assert result["table"].splitlines()[0].split()[-1] == "published_mean_loss"
    assert "published_mean_loss" in (tmp_path / "out" / "perplexity.csv").read_text().splitlines()[0]


@pytest.mark.usefixtures("without_figures")
def test_segments_and_offload(folders, tmp_path, llama, stream):
    whole, pieces = (
        task(folders, models=str(folders / "b"), lengths=[64], segment_length=length).run(tmp_path / str(length))
        for length in (None, 10)
    )
    assert pieces["results"][0]["nll_sum"] == pytest.approx(whole["results"][0]["nll_sum"], rel=1e-6)
    assert pieces["protocol"]["segment_length"] == 10
    with pytest.raises(ValueError, match="offload=true has no effect"):
        task(folders, offload=True).run(tmp_path / "offload")


@pytest.mark.usefixtures("without_figures")
def test_a_length_that_does_not_fit_the_memory_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_memory, "_host_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"model b: a length of 64 needs .* are free"):
        task(folders, models=str(folders / "b"), lengths=[64], segment_length=10).run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    task(folders, models=str(folders / "b"), lengths=[64]).run(tmp_path / "out")  # one forward, as in training


@pytest.mark.usefixtures("without_figures")
def test_a_killed_length_goes_on_in_its_middle(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity_journal, "FLUSH_SECONDS", 0.0)
    real, calls = perplexity.score_windows, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    options = {"models": str(folders / "b"), "lengths": [32], "batch_tokens": 32}
    without = {"seconds": 0, "peak_memory_bytes": 0}
    whole = task(folders, **options).run(tmp_path / "whole")["results"][0]
    monkeypatch.setattr(perplexity, "score_windows", stopping)
    with pytest.raises(KeyboardInterrupt):
        task(folders, **options).run(tmp_path / "out")
    again = task(folders, **options).run(tmp_path / "out")["results"][0]
    assert len(calls) == 2 + whole["num_windows"] - 2 + 1
    assert again | without == whole | without
    assert [entry.suffix for entry in (tmp_path / "out" / "results").iterdir()] == [".json"]


def test_labels_come_from_the_folder(folders):
    assert list(task(folders, models=str(folders / "a" / "model")).models) == ["a"]
    assert list(task(folders, models=str(folders / "b")).models) == ["b"]
    assert list(task(folders, models="hub:org/name").models) == ["name"]


def test_one_corpus_can_be_given_directly(folders, tmp_path):
    corpus = open_corpus(folders / "corpus" / "validation", split="test")
    direct = task(folders, corpus=corpus, models=str(folders / "b"))
    assert direct.run(tmp_path / "x")["results"][0]["num_targets"] == 149


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"models": {}}, "models is empty"),
        ({"lengths": []}, "lengths must be"),
        ({"lengths": [8, 8]}, "lengths must be"),
        ({"lengths": [1], "bos_token_id": 0}, "lengths must be"),
        ({"stride": 9}, "stride must lie between 1 and the shortest length of 8"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"parity": "paper"}, "parity is published or null"),
        ({"parity": "published", "stride": 4}, "windows that do not overlap and no BOS"),
        ({"bos_token_id": -1}, "bos_token_id must be a token id"),
        ({"lengths": [8, 150]}, "a length of 150 needs 151 tokens, the text has 150"),
        ({"lengths": [8, 151], "bos_token_id": 0}, "a length of 151 needs 151 tokens, the text has 150"),
        ({"max_tokens": 32}, "a length of 32 needs 33 tokens, the text has 32"),
        ({"dtype": "float8"}, "dtype is one of"),
        ({"dtype": "float16", "device": "cpu"}, "float16 is unusably slow"),
        ({"device": "tpu9"}, "device must be"),
        ({"device": "meta"}, "device must be"),
        ({"device": "cuda:-1"}, "device must be"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_bad_options_are_explained(folders, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        task(folders, **options)


def test_missing_models_are_explained(folders):
    with pytest.raises(FileNotFoundError, match="model nowhere: nowhere is no model folder"):
        task(folders, models="nowhere")
    with pytest.raises(FileNotFoundError, match="model a: 3 is no model folder"):
        task(folders, models={"a": 3})


@pytest.mark.usefixtures("without_figures")
def test_the_longest_length_that_the_text_allows(folders, tmp_path):
    alone, with_bos = (
        task(folders, models=str(folders / "b"), lengths=[149 + extra], bos_token_id=bos).run(tmp_path / f"{extra}")
        for extra, bos in ((0, None), (1, 0))
    )
    assert alone["results"][0]["num_windows"] == 1 and alone["results"][0]["num_targets"] == 149
    assert with_bos["results"][0]["num_windows"] == 1 and with_bos["results"][0]["num_targets"] == 150
