"""Parallel context as a user runs it: the sweep, killed and shared; generation behind files; bad input."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configuration.errors import exit_with_sentence
from preprocess.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent
GRID = ["lengths=[24]", "degrees=[1,3]", "prefixes=[none,p2]", "selections=[none,top1]", "keep_tail=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte model of 64 positions with one whose angles depend on the length, and a text."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    growing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for name, rope in (("llama", {}), ("growing", {"rope_parameters": growing})):
        config = LlamaConfig(vocab_size=259, max_position_embeddings=64, eos_token_id=256, **sizes, **rope)
        LlamaForCausalLM(config).save_pretrained(path / name)
        byte_tokenizer().save_pretrained(path / name)
    texts = ["the quick brown fox jumps over the lazy dog, " * 6, "pack my box with five dozen jugs " * 6]
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (path / "a.txt").write_text("the cat sat")
    (path / "b.txt").write_text("a dog ran off")
    return path


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command's ``main`` as the shell would: exit status, standard output and error."""

    def run(command, *arguments):
        status = 0
        try:
            with exit_with_sentence(arguments):
                importlib.import_module(command).main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    monkeypatch.syspath_prepend(str(ROOT))
    return run


def sweep_arguments(folder, output, model="llama"):
    data = [f"data.path={folder / 'text.jsonl'}", "data.name=text"]
    return ["recipe=ppl_parallel", f"model.path={folder / model}", *data, *GRID, f"output_dir={output}"]


def numbers(output):
    rows = json.loads((output / "metrics.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_sweep_at_its_smallest_scale(call, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.parallel_context.sweep.redraw", lambda output: None)
    options = ["lengths=[160]", "degrees=[1,4]", f"output_dir={tmp_path}"]
    status, shown, _ = call("eval", "recipe=ppl_parallel", "scale=tiny", *options)
    assert status == 0 and len(shown.strip().splitlines()) == 2 + 8
    assert {row["prefix"] for row in numbers(tmp_path)} == {"none", "p2"}
    assert (tmp_path / "config.yaml").is_file() and (tmp_path / "rows.csv").is_file()


def test_generation_behind_files(call, folder, tmp_path):
    files = f"documents=[{folder / 'a.txt'},{folder / 'b.txt'}]"
    common = [f"model.path={folder / 'llama'}", "prompt=and", "task.max_new_tokens=4", files]
    status, plain, said = call("generate", *common)
    assert status == 0 and plain.startswith("and") and "[24 + 3 + " in said
    patched = [*common, "patch=parallel_context_top2", "patch.selection.top_k=1", "patch.prefix=null"]
    status, shown, said = call("generate", *patched, f"output={tmp_path}")
    assert status == 0 and shown.startswith("and") and "tokens behind 2 pieces" in said, said
    assert json.loads((tmp_path / "generations.jsonl").read_text())["num_pieces"] == 2
    with pytest.warns(UserWarning, match="selection has no effect on a context of 2 piece"):
        call("generate", *common, "patch=parallel_context_top2", "patch.prefix=p2")
    assert call("generate", *common, "patch=parallel_context_ape", "patch.max_piece_tokens=5")[0] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["degrees=[16]"], "degree 16 asks for more pieces than there are tokens: a length of 24 has a context of 15"),
        (["lengths=[90]"], "has a piece of 81 tokens behind a prefix of 0, but the model takes 64"),
        (["lengths=[400]"], "text has no document of 400 tokens: leave that length out"),
        (["prefixes=[none,none]"], "prefixes must be different"),
        (["selections=[best]"], "selections are none, topN or softT"),
        (["degrees=3"], "degrees must be list[int], got 3"),
        (["degree=[1]"], "did you mean 'degrees'?"),
        (["data.path=nowhere.jsonl"], "no text at nowhere.jsonl"),
        (["model.path=./nowhere"], "./nowhere does not exist"),
        (["patch.position_mode=XX"], "XX"),
        (["scale=huge"], "unknown choice scale=huge"),
    ],
)
def test_bad_input_of_the_sweep_is_a_sentence_and_status_2(call, folder, tmp_path, options, sentence):
    status, _, said = call("eval", *sweep_arguments(folder, tmp_path), *options)
    assert status == 2 and sentence in said and "Traceback" not in said, said


def test_rotary_factors_that_depend_on_length_are_refused(call, folder, tmp_path):
    arguments = [*sweep_arguments(folder, tmp_path, "growing"), "lengths=[120]", "degrees=[2,3]", "keep_tail=40"]
    status, _, said = call("eval", *arguments)
    assert status == 2 and "rotary angles change with the greatest position" in said and "below 64" in said
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
def test_killed_and_shared_sweeps_have_the_numbers_of_one(folder, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "eval.py")]
    whole = sweep_arguments(folder, tmp_path / "whole")
    subprocess.run([*command, *whole], check=True, capture_output=True, env=environment, timeout=300)
    killed = sweep_arguments(folder, tmp_path / "killed")
    process = subprocess.Popen([*command, *killed], stderr=subprocess.DEVNULL, env=environment)
    while process.poll() is None and not list((tmp_path / "killed" / "cells").glob("*.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, *killed], check=True, capture_output=True, env=environment, timeout=300)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", command[1]]
    shared = sweep_arguments(folder, tmp_path / "shared")
    done = subprocess.run([*launch, *shared], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0 and done.stdout.count("perplexity") == 1, done.stderr[-2000:]
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole") == numbers(tmp_path / "shared")


@pytest.mark.slow
def test_validation_in_two_processes_has_the_sums_of_one(tiny_corpus, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    common = ["recipe=pg19_dense", "scale=tiny", f"prepare.corpus={tiny_corpus}", "data.batch_size=1"]
    common += [f"data.{name}={tmp_path / name}" for name in ("sequences", "validation")]
    common += ["module.context_length=256", "module.base_length=64", "module.base_stride=48", "export_model=false"]
    common += ["trainer.limit_val_batches=1.0", "trainer.max_steps=1", "callbacks.parallel_perplexity.max_batches=null"]
    found = {}
    for devices in (1, 2):
        options = [f"trainer.devices={devices}", f"output={tmp_path / str(devices)}"]
        options += [f"trainer.accumulate_grad_batches={2 // devices}", "trainer.enable_progress_bar=false"]
        options += ["trainer.strategy=ddp"] if devices > 1 else []
        command = [sys.executable, str(ROOT / "train.py"), *common, *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        metrics = json.loads((tmp_path / str(devices) / "metrics.json").read_text())
        found[devices] = metrics["validation"]["parallel_perplexity"]
    assert list(found[1]) == ["1", "4", "16"] and found[1]["4"]["num_targets"] > 128
    for degree, report in found[1].items():
        assert found[2][degree] == {name: pytest.approx(value, rel=2e-5) for name, value in report.items()}
