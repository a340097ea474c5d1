"""Frozen scores: what they are, what decides them, and what the command says."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from score_cases import report, save_llama, save_sequences, score, shard_bytes, slow_scores
from transformers import AutoModelForCausalLM

from datamodules.corpus_format import canonical_json
from datamodules.score_store import ScoreStore
from datamodules.sequence_store import SequenceStore
from preprocess.chunk_documents import main as chunk_main
from preprocess.command import run_command
from preprocess.score_model import WEIGHT_FILES, ScorerOptions, choose_device, find_scorer, weight_files
from preprocess.score_tokens import main

SCORING = Path(__file__).parents[1] / "fixtures/token_weighting"
FIXTURES = {key: case for key, case in json.loads((SCORING / "scoring.json").read_text()).items() if key != "longce"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    return save_sequences(tmp_path_factory.mktemp("sequences") / "store")


def rows_of(folder, sequences):
    store = ScoreStore(folder, SequenceStore(sequences), verify="full")
    return np.stack([store[number].numpy() for number in range(len(store))])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"schedule": (8, 5, "align")}),
        (["--tail", "short"], {"schedule": (8, 5, "short")}),
        (["--no-first-window"], {"schedule": (8, 5, "align"), "first_window": False}),
        (["--bos", "none"], {"schedule": (8, 5, "align"), "bos": False}),
        (["--base-stride", 2], {"schedule": (8, 2, "align")}),
        (["--base-length", 50], {"schedule": (50, 5, "align")}),
    ],
)
def test_scores_are_those_of_one_forward_per_window(model, sequences, tmp_path, options, expected):
    assert score(sequences, model, tmp_path / "scores", *options) == 0
    found, slow = rows_of(tmp_path / "scores", sequences), slow_scores(model, sequences, **expected)
    assert found.dtype == np.float32
    assert np.array_equal(np.isnan(found), np.isnan(slow)) and np.isfinite(found).any()
    np.testing.assert_allclose(found, slow, rtol=0, atol=3e-5)


@pytest.mark.parametrize("key", sorted(FIXTURES))
def test_scores_are_the_published_ones(tmp_path, key):
    case, arrays = FIXTURES[key], load_file(SCORING / "scoring.safetensors")
    ids, bos = arrays[f"{key}.ids"], case["bos_token_id"]
    lines = [json.dumps({"tokens": row.tolist()}) + "\n" for row in ids]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    arguments = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "store", "--length", case["num_tokens"]]
    arguments += [] if bos is None else ["--bos-token-id", bos]
    assert run_command(chunk_main, [str(argument) for argument in arguments]) == 0
    sizes = ["--base-length", case["base_length"], "--base-stride", case["base_stride"]]
    options = [*sizes, "--tail", case.get("tail", "align"), "--attention", "eager"]
    assert score(tmp_path / "store", SCORING / "tiny_llama", tmp_path / "scores", *options) == 0
    found = rows_of(tmp_path / "scores", tmp_path / "store")
    np.testing.assert_allclose(found, arrays[f"{key}.base_frozen"].numpy(), rtol=0, atol=3e-5)


def test_exactly_the_valid_targets_have_a_score(model, sequences, tmp_path):
    store = SequenceStore(sequences)
    valid = np.stack([store[number]["valid"].numpy() for number in range(len(store))])
    assert not valid.all()
    for options, first in (([], 0), (["--no-first-window"], 7)):
        folder = tmp_path / str(first)
        assert score(sequences, model, folder, *options) == 0
        assert np.array_equal(np.isfinite(rows_of(folder, sequences)), valid & (np.arange(23) >= first))


def test_the_folder_is_as_documented(model, sequences, tmp_path, capsys):
    folder, store = tmp_path / "scores", SequenceStore(sequences)
    assert score(sequences, model, folder) == 0
    content = (folder / "manifest.json").read_bytes()
    manifest, manifest_id = json.loads(content), hashlib.sha256(content).hexdigest()
    assert content == canonical_json(manifest).encode()
    assert manifest["sequences"] == store.store_id and manifest["shard_size"] == 4
    assert manifest["schedule"] == {
        "base_length": 8,
        "base_stride": 5,
        "tail": "align",
        "first_window": True,
        "bos": "replace",
        "bos_token_id": 1,
    }
    assert set(manifest["model"]) == {"config", "weights", "adapter"} and manifest["model"]["adapter"] is None
    assert manifest["rope_theta"] is None and manifest["rope_parameters"]["rope_theta"] == 10000
    assert (manifest["dtype"], manifest["attention"], manifest["nll_dtype"]) == ("float32", "sdpa", "float32")
    assert str(model) not in content.decode() and str(sequences) not in content.decode()
    count = -(-len(store) // 4)
    names = [f"shard-{k:06d}.{kind}" for k in range(count) for kind in ("json", "npy")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(["manifest.json", *names])
    for k in range(count):
        data = (folder / f"shard-{k:06d}.npy").read_bytes()
        record = json.loads((folder / f"shard-{k:06d}.json").read_bytes())
        rows = min(4, len(store) - 4 * k)
        expected = {"shard": k, "first": 4 * k, "rows": rows, "bytes": len(data), "manifest_id": manifest_id}
        assert expected.items() <= record.items() and record["sha256"] == hashlib.sha256(data).hexdigest()
        assert {"host", "seconds"} <= set(record)
        array = np.load(folder / f"shard-{k:06d}.npy")
        assert array.shape == (rows, 23) and array.dtype == np.float32
    output = capsys.readouterr().out
    assert f"{count} shards made" in output and "tokens/s" in output


def test_the_place_of_model_and_sequences_is_no_part_of_the_scores(model, sequences, tmp_path):
    shutil.copytree(model, tmp_path / "elsewhere")
    shutil.copytree(sequences, tmp_path / "copied")
    assert score(sequences, model, tmp_path / "a") == 0
    assert score(tmp_path / "copied", tmp_path / "elsewhere", tmp_path / "b") == 0
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_splitting_the_windows_changes_rounding_only(model, sequences, tmp_path):
    assert score(sequences, model, tmp_path / "a") == 0
    assert score(sequences, model, tmp_path / "b", "--windows-per-forward", 1) == 0
    np.testing.assert_allclose(
        rows_of(tmp_path / "a", sequences), rows_of(tmp_path / "b", sequences), rtol=0, atol=3e-5
    )


def test_bf16_models_give_scores_that_are_not_rounded_to_16_bit(model, sequences, tmp_path):
    assert score(sequences, model, tmp_path / "scores", "--dtype", "bfloat16") == 0
    scores = torch.from_numpy(rows_of(tmp_path / "scores", sequences)).nan_to_num()
    assert (scores != scores.bfloat16().float()).float().mean() > 0.5


def test_another_rotary_base_is_that_of_a_model_built_with_it(sequences, tmp_path):
    scaled = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    model = save_llama(tmp_path / "scaled", rope_parameters=scaled)
    plain = save_llama(tmp_path / "plain", rope_parameters={"rope_theta": 90.0, "rope_type": "default"})
    assert score(sequences, model, tmp_path / "kept") == score(sequences, plain, tmp_path / "built") == 0
    assert score(sequences, model, tmp_path / "set", "--rope-theta", 90) == 0
    assert shard_bytes(tmp_path / "set") == shard_bytes(tmp_path / "built") != shard_bytes(tmp_path / "kept")
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    assert manifest["rope_theta"] == 90 and manifest["rope_parameters"]["rope_type"] == "default"


def test_weights_in_several_files_give_the_same_scores(model, sequences, tmp_path):
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    assert len(weight_files(tmp_path / "parts", WEIGHT_FILES)) > 1
    assert score(sequences, model, tmp_path / "a") == score(sequences, tmp_path / "parts", tmp_path / "b") == 0
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")


def test_a_hub_name_is_fetched_once_with_its_best_weights(model, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(model)

    def offline(name, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_scorer(ScorerOptions("someone/llama")).folder == model
    assert asked == [("someone/llama", ["*.json", "model*.safetensors"])]
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no model someone/llama: neither a folder nor a name"):
        find_scorer(ScorerOptions("someone/llama"))


def test_ranks_take_the_gpus_of_a_machine_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices = [choose_device("auto", dtype="bfloat16", local_rank=rank) for rank in range(3)]
    assert devices == [torch.device("cuda", index) for index in (0, 1, 0)]
    assert choose_device("cpu", dtype="bfloat16", local_rank=1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", dtype="bfloat16", local_rank=1) == torch.device("cpu")
    with pytest.raises(ValueError, match="device cuda is not available here"):
        choose_device("cuda", dtype="bfloat16", local_rank=0)


def test_an_adapter_scores_as_the_adapted_model(model, sequences, tmp_path):
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert score(sequences, model, tmp_path / "a", "--adapter", tmp_path / "adapter") == 0
    assert score(sequences, tmp_path / "merged", tmp_path / "b") == score(sequences, model, tmp_path / "c") == 0
    a, b, c = (rows_of(tmp_path / name, sequences) for name in "abc")
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-5)
    assert np.nanmax(np.abs(a - c)) > 1e-2
    assert json.loads((tmp_path / "a/manifest.json").read_text())["model"]["adapter"]


def test_losses_that_are_not_finite_are_no_scores(model, sequences, tmp_path, capsys):
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.model.embed_tokens.weight.data[rare_token(sequences)] = torch.inf
    broken.save_pretrained(tmp_path / "broken")
    assert score(sequences, tmp_path / "broken", tmp_path / "scores") == 2
    assert "losses that are not finite for sequence" in capsys.readouterr().err
    assert report(sequences, tmp_path / "scores", "--verify") == 1


def rare_token(sequences):
    """The token that occurs least: checking the head of the model is not to meet it."""
    tokens = np.load(sequences / "tokens.npy")
    return int(np.bincount(tokens[tokens > 1], minlength=61)[2:].argmin()) + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base-length", 1], "base_length must be at least 2"),
        (["--base-stride", 8], "base_stride must lie between 1 and"),
        (["--tail", "strict"], "base_stride 5 leaves a remainder"),
        (["--base-length", 24, "--no-first-window"], "no window but the first"),
        (["--shard-size", 0], "shard_size must be at least 1, got 0"),
        (["--limit-shards", 0], "limit_shards must be at least 1"),
        (["--windows-per-forward", 0], "windows_per_forward must be at least 1"),
        (["--rank", 2, "--world-size", 2], "rank must lie between 0 and world_size - 1 = 1, got 2"),
        (["--dtype", "float16"], "float16 is not for CPUs"),
        (["--rope-theta", -1], "rope_theta must be above 0"),
        (["--model", "/nothing/here"], "no model at /nothing/here"),
        (["--adapter", "/nothing/here"], "no model at /nothing/here"),
        (["--sequences", "/nothing"], "no sequences at /nothing"),
    ],
)
def test_impossible_options_are_one_sentence(model, sequences, tmp_path, capsys, options, message):
    assert score(sequences, model, tmp_path / "scores", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "scores").exists()


def test_models_that_cannot_read_the_sequences_are_refused(model, sequences, tmp_path, capsys):
    no_bos = save_sequences(tmp_path / "no_bos", options=())
    assert score(no_bos, model, tmp_path / "scores", "--bos", "replace") == 2
    assert "--bos replace needs one" in capsys.readouterr().err
    small = save_llama(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    assert score(sequences, small, tmp_path / "scores") == 2
    assert "knows 40" in capsys.readouterr().err
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 7}))
    assert score(sequences, small, tmp_path / "scores") == 2
    assert "windows of 8 tokens exceed the 7 positions" in capsys.readouterr().err
    assert score(sequences, small, tmp_path / "extended", "--rope-theta", 5000) == 0
    (small / "model.safetensors").unlink()
    assert score(sequences, small, tmp_path / "scores") == 2
    assert "has no weights" in capsys.readouterr().err and not (tmp_path / "scores").exists()


def test_scoring_needs_its_options_and_reports_do_not(model, sequences, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(main, ["--sequences", str(sequences), "--output", str(tmp_path / "scores")])
    assert "--model, --base-length, --base-stride" in capsys.readouterr().err
    assert report(sequences, tmp_path / "scores", "--verify") == 1
    assert report(sequences, tmp_path / "scores", "--status") == 0
    assert capsys.readouterr().out.count("no scores") == 2 and not (tmp_path / "scores").exists()
