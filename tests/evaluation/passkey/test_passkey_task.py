"""The needle evaluation as a command runs it: files, resuming, baselines, and what is refused."""

import functools
import json

import pytest
import torch
from transformers import LlamaConfig

from datamodules.corpus import open_corpus
from datamodules.needle_task import model_needle_task
from evaluation import cache_memory
from evaluation.passkey.task import PasskeyTask
from models.drt import DRTConfig, DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

SIZES = {"vocab_size": 259, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "window_size": 9}
IDS = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257, "initializer_range": 0.5}
DRT = {"num_lower_layers": 1, "layers_per_group": [1], "num_encoder_layers": 1, "chunk_top_k": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DRT, one with other chunks, and a sliding-window model on disk."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, size in (("drt", 16), ("other", 8)):
        DRTForCausalLM(DRTConfig(**SIZES, **IDS, **DRT, chunk_size=size, landmark_token_id=258)).save_pretrained(
            root / name
        )
    SlidingWindowLMForCausalLM(SlidingWindowLMConfig(**SIZES, **IDS, num_hidden_layers=1)).save_pretrained(
        root / "window"
    )
    return {name: str(root / name) for name in ("drt", "other", "window")}


@pytest.fixture
def make(folders, tiny_corpus):
    """Build a task on the tiny corpus."""

    def build(models=None, *, kind="single", key_length=3, **options):
        needles = functools.partial(model_needle_task, tiny_corpus, kind=kind, key_length=key_length)
        corpus = open_corpus(tiny_corpus, split="validation")
        defaults = {"lengths": [160, 330], "num_samples": 2, "depths": [0.0, 1.0], "segment_length": 100}
        return PasskeyTask(
            folders["drt"] if models is None else models, corpus, needles, **defaults | {"progress": False} | options
        )

    return build


def test_files_table_and_heat_map(make, folders, tmp_path):
    result = make(baselines={"window": folders["window"]}).run(tmp_path)
    assert {row["length"]: row["num_tokens"] for row in result["results"]} == {160: 160, 330: 320}
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 4 and json.loads(lines[0]).keys() >= {"answer", "generated", "teacher_forced"}
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["protocol"]["task"]["kind"] == "single" and metrics["protocol"]["repeated"] == 1.0
    rows = (tmp_path / "passkey.csv").read_text().splitlines()
    assert rows[0].startswith("model,length,num_tokens,depth") and len(rows) == 1 + 2 * 2 * 2
    assert (tmp_path / "passkey.png").stat().st_size > 5000
    assert "window" in result["table"] and "exact_match" in result["table"]


def test_a_killed_evaluation_continues_to_the_same_answers(make, tmp_path):
    def answers(folder):
        found = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_bytes")} for line in found]

    make().run(tmp_path / "whole")
    make().run(tmp_path / "cut")
    (log,) = (tmp_path / "cut" / "answers").glob("*/rank0.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]) + lines[3][:20])
    kept = lines[:3]
    make().run(tmp_path / "cut")
    assert log.read_text().splitlines(keepends=True)[:3] == kept
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_more_samples_and_lengths_keep_what_is_done(make, tmp_path):
    make(lengths=[160], num_samples=1).run(tmp_path)
    (log,) = (tmp_path / "answers").glob("*/rank0.jsonl")
    before = log.read_text()
    result = make(num_samples=2).run(tmp_path)
    assert log.read_text().startswith(before) and len(log.read_text().splitlines()) == 8
    assert [row["num_samples"] for row in result["results"]] == [4, 4]
    make(seed=1).run(tmp_path)
    assert len(list((tmp_path / "answers").glob("*/rank0.jsonl"))) == 2


def test_a_short_text_is_said_to_be_repeated(make, tmp_path):
    task = make(lengths=[8192], num_samples=1, depths=None, segment_length=4096)
    result = task.run(tmp_path)
    assert task.stream.num_tokens < 8192 and "repeat it up to" in result["table"]
    assert result["protocol"]["repeated"] == 8192 / task.stream.num_tokens


def test_multihop_without_a_grid(make, tmp_path):
    result = make(kind="multihop", key_length=2, depths=None, lengths=[320], num_samples=3).run(tmp_path)
    assert result["results"][0]["num_samples"] == 3 and result["results"][0]["by_depth"] == []
    with pytest.raises(ValueError, match="needs kind=single"):
        make(kind="multihop", key_length=2, lengths=[320]).run(tmp_path / "grid")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lengths": []}, "lengths must be different"),
        ({"lengths": [160, 160]}, "lengths must be different"),
        ({"lengths": [32]}, "do not fit"),
        ({"key_length": 16}, "room for chunk_size - 1 = 15"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"depths": []}, "depths must be different"),
        ({"dtype": "float8"}, "dtype is one of"),
        ({"models": {}}, "models is empty"),
        ({"lengths": [10**15]}, r"a length of 1,000,000,000,000,000 needs [\d.]+ GiB of host memory, [\d.]+ GiB are"),
    ],
)
def test_impossible_options_are_refused(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


def test_models_that_do_not_fit_the_question_are_refused(make, folders):
    with pytest.raises(ValueError, match=r"retrieves nothing.*baselines"):
        make(folders["window"])
    with pytest.raises(ValueError, match="chunks of 8, the samples are made for 16"):
        make({"a": folders["drt"], "b": folders["other"]})
    with pytest.raises(ValueError, match="share a label"):
        make({"a": folders["drt"]}, baselines={"a": folders["window"]})
    with pytest.raises(FileNotFoundError, match="no model folder"):
        make("nowhere")


def test_memory_is_estimated_before_anything_is_read(monkeypatch):
    config = DRTConfig()
    options = {"segment_length": 16384, "itemsize": 2}
    need = cache_memory.estimate(config, 2**24, offload=True, **options)
    # 3,072 bytes a token in 16-bit, as two vectors of 768.
    assert need.chunks == 2**24 // 63 * 63 * 3072 and need.host > need.chunks > 50e9
    on_device = cache_memory.estimate(config, 2**24, offload=False, **options)
    assert on_device.device - need.device == need.chunks
    monkeypatch.setattr(cache_memory, "free_memory", lambda device: (40 * 2**30, 200 * 2**30))
    gpu = {"device": torch.device("cuda", 0)} | options
    with pytest.raises(ValueError, match=r"needs 5\d\.\d\d GiB of memory on cuda:0.*40.00 GiB.*offload=true"):
        cache_memory.check_memory(config, 2**24, offload=False, **gpu)
    cache_memory.check_memory(config, 2**24, offload=True, **gpu)
    with pytest.raises(ValueError, match="leave that length out"):
        cache_memory.check_memory(config, 2**27, offload=True, **gpu)
    dense = LlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    grown = [cache_memory.estimate(dense, length, offload=True, **options).device for length in (2**20, 2**21)]
    assert grown[1] - grown[0] == 2**20 * dense.num_hidden_layers * 2 * 2 * 16 * 2
