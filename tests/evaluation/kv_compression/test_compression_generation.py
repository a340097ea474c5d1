"""Generation quality: reproducible completions per prefix, resumable records, models by method and ratio."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configuration.task import run_task
from evaluation.kv_compression import models as compression_models
from evaluation.kv_compression.completions import Sampling, WordLimit, Writer, first_words
from evaluation.kv_compression.generation import COLUMNS, CompressionGeneration
from evaluation.kv_compression.models import Models
from evaluation.kv_compression.scorers import Scorers
from evaluation.prediction_log import PredictionLog
from patches.compressed_rows import sentinels_after
from patches.sentinel import SpanSampler, add_sentinels
from preprocess.tokenizers import load_tokenizer

PREFIXES = [("the quick brown fox jumps over", " the lazy dog"), ("a cat sat on a mat and slept", " all day long")]
SAMPLING = Sampling(num_samples=2, words=3, max_new_tokens=12, span_length=5, recent_tokens=2, num_sinks=2)
SENTINELS = sentinels_after(259)


def tiny_llama():
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape = {"num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = tiny_llama()
    add_sentinels(model, 259).save(path)
    model.save_pretrained(path)
    load_tokenizer("bytes").save_pretrained(path)
    return str(path)


def task(models, prefixes=PREFIXES, **options):
    options = {"ratios": [0.0, 0.5], "methods": ["sentinel", "local"], "sampling": SAMPLING, "device": "cpu"} | options
    return CompressionGeneration(models, lambda: prefixes, **options)


def test_files_rows_and_scorers(folder, tmp_path):
    result = task(folder, judge=folder).run(tmp_path)
    assert [(row["method"], row["nominal_ratio"]) for row in result["results"]] == [
        ("dense", 0.0),
        ("sentinel", 0.5),
        ("local", 0.5),
    ]
    for row in result["results"]:
        assert abs(row["achieved_ratio"] - row["nominal_ratio"]) < 0.1
        assert row["num_texts"] == 4 and row["tokens_per_text"] <= 12 and row["judge_perplexity_mean_text"] > 1
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(len(line["completions"]) == 2 for line in lines)
    assert all(len(text.split()) <= 3 for line in lines for text in line["completions"])
    assert (tmp_path / "table.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert {"figure.png", "figure.svg", "table.md", "prefixes.jsonl", "metrics.json"} < {
        path.name for path in tmp_path.iterdir()
    }
    assert result["protocol"]["judge"] == result["protocol"]["models"]["local 0.5"]


def test_the_content_of_an_encoder_is_part_of_its_scores(folder, tmp_path):
    options = {"tokenizer": None, "seed": 0, "dtype": torch.float32, "device": torch.device("cpu")}
    encoder = LlamaForCausalLM.from_pretrained(folder)
    found = []
    for scale in (1.0, 2.0):
        encoder.lm_head.weight.data *= scale
        encoder.save_pretrained(tmp_path)
        found.append(Scorers(None, {"encoder": str(tmp_path)}, **options).identity["bertscore"])
    assert found[0]["encoder"] == found[1]["encoder"] and found[0]["identity"] != found[1]["identity"]
    assert Scorers(None, {"num_layers": 3}, **options).identity["bertscore"]["identity"] == "roberta-large"


def test_a_killed_evaluation_goes_on_and_foreign_lines_are_refused(folder, tmp_path, monkeypatch):
    quick = {"ratios": [0.5], "methods": ["local"]}
    whole = task(folder, **quick).run(tmp_path / "whole")
    log = tmp_path / "broken" / "predictions.jsonl"
    log.parent.mkdir()
    content = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    log.write_bytes(content[: content.index(b"\n") + 20])
    written = []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *a, **o: written.append(o["example"]) or write(*a, **o))
    resumed = task(folder, **quick).run(log.parent)
    assert written == [1]
    lines = [[json.loads(line)["completions"] for line in text.splitlines()] for text in (content, log.read_bytes())]
    assert lines[0] == lines[1]
    assert {k: v for k, v in resumed["results"][0].items() if k != "seconds"} == {
        k: v for k, v in whole["results"][0].items() if k != "seconds"
    }
    with pytest.raises(ValueError, match="of other options"):
        task(folder, **quick, sampling=Sampling(num_samples=2, words=4, max_new_tokens=12)).run(log.parent)
    other = tmp_path / "other_model"
    shutil.copytree(folder, other)
    defaults = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(defaults | {"repetition_penalty": 1.5}))
    with pytest.raises(ValueError, match="another model"):
        task(str(other), **quick).run(log.parent)
    more = task(folder, ratios=[0.5], methods=["local", "streaming"]).run(log.parent)
    assert written == [1, 0, 1] and [row["method"] for row in more["results"]] == ["local", "streaming"]


@pytest.mark.parametrize("method", ["dense", "sentinel", "local", "scattered", "streaming"])
def test_samples_are_a_function_of_seed_and_prefix(folder, method):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer("bytes")
    writer = Writer(model, tokenizer, SENTINELS, SpanSampler(max_length=9), SAMPLING)
    state = torch.get_rng_state()
    options = {"method": method, "compression_ratio": 0.6}
    one, two = (writer.write(PREFIXES[1][0], **options, example=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert one["completions"] == two["completions"] and one["completions"][0] != one["completions"][1]
    assert writer.write(PREFIXES[1][0], **options, example=2)["completions"] != one["completions"]
    assert one["num_dropped"] == 0
    assert one["peak_entries"] >= (len(PREFIXES[1][0]) if method == "dense" else 1)
    if method != "dense":
        assert one["peak_entries"] < 0.75 * (len(PREFIXES[1][0]) + 12)


def test_a_ratio_out_of_reach_says_what_can_be_reached(folder):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    writer = Writer(model, load_tokenizer("bytes"), SENTINELS, SpanSampler(max_length=9), SAMPLING)
    with pytest.raises(ValueError, match=r"remove at most 0\.8889 of the 27 tokens of prefix 3"):
        writer.write(PREFIXES[1][0], method="sentinel", compression_ratio=0.95, example=3)


def test_ids_without_text_are_never_written(folder):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    writer = Writer(model, load_tokenizer("bytes"), SENTINELS, SpanSampler(), SAMPLING)
    assert writer.banned(320) == list(range(256, 320))


def test_rows_stop_after_their_words():
    limit = WordLimit(load_tokenizer("bytes"), 2)

    def done(*texts):
        return limit(torch.tensor([[0, *text.encode()] for text in texts]), None).tolist()

    assert done("a b", "abc") == [False, False]
    assert done("a b ", "abc ") == [True, False]
    assert done("a b cdef", "abc d  e") == [True, True]
    assert limit.completions == ["a b", "abc d"] and limit.num_tokens == [4, 8]
    assert first_words(" a  b c ", 2) == " a  b" and first_words(" a ", 2) == " a"


def test_models_by_method_and_ratio(folder, tmp_path):
    models = Models({"local": f"{folder}/../RATIO", "default": folder}, sentinels=None, seed=0)
    assert models.source("local", 0.5) == f"{folder}/../0.5" and models.source("dense", 0.0) == folder
    with pytest.raises(FileNotFoundError, match=r"local, ratio 0\.5"):
        models.check([("dense", 0.0), ("local", 0.5)])
    plain = tmp_path / "plain"
    tiny_llama().save_pretrained(plain)
    with pytest.raises(ValueError, match=r"no sentinels\.json"):
        task(str(plain))
    with pytest.raises(ValueError, match="no model is named for dense"):
        task({"local": folder}, methods=["local"])
    with pytest.raises(ValueError, match="no model is named: pass"):
        task(None)


def test_built_models_are_told_apart_by_their_weights():
    built = Models(tiny_llama, sentinels=SENTINELS, seed=0)
    names = [Models(tiny_llama, sentinels=None, seed=seed).identities([("local", 0.5)]) for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    model, sentinels = built.load("sentinel", 0.5, dtype=torch.float32, device=torch.device("cpu"))
    assert sentinels == SENTINELS and built.load("local", 0.1, dtype=torch.float32, device="cpu")[0] is model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": []}, "different entries"),
        ({"ratios": [1.0]}, r"in \[0, 1\)"),
        ({"methods": ["dense"]}, "dense is ratio 0"),
    ],
)
def test_options_that_cannot_be(options, message, folder):
    with pytest.raises(ValueError, match=message):
        task(folder, **options)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"top_p": 0.0}, {"temperature": 0.0}, {"span_length": 1}])
def test_sampling_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_models_of_the_hub_are_loaded_by_their_name(monkeypatch):
    asked = []
    monkeypatch.setattr(compression_models, "load_model", lambda name, **options: asked.append(name))
    models = Models("hub:owner/name", sentinels=None, seed=0)
    models.check([("local", 0.5)])
    models.load("local", 0.5, dtype=torch.float32, device=torch.device("cpu"))
    assert asked == ["owner/name"] and models.identities([("local", 0.5)]) == {"local 0.5": "hub:owner/name"}


def test_prefixes_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="takes 64"):
        task(folder, [("word " * 20, " end")]).run(tmp_path)
    with pytest.raises(ValueError, match="two are needed"):
        task(folder, [("a", " b c d")]).run(tmp_path / "other")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    PredictionLog(path, ("a",)).add({"a": 1})
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match=r"log\.jsonl line 1 is damaged"):
        PredictionLog(path, ("a",))


def test_the_tiny_recipe_from_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4-train.00000.json").write_text(json.dumps({"text": "word " * 40}) + "\n")
    arguments = ["scale=tiny", "data.source=c4-train.00000.json", "sweep.ratios=[0.5]", "sweep.methods=[sentinel]"]
    arguments += ["task.sampling.num_samples=1", "task.sampling.max_new_tokens=6", "output_dir=out"]
    result = run_task(["recipe=compression_generation", *arguments], lambda line: None, command="eval")
    assert result["results"][0]["num_texts"] == 1 and "sentinel" in result["table"]
    dry = ["recipe=c4_compression_generation", *arguments, "dry_run=true"]
    assert run_task(dry, lambda line: None, command="eval") is None
