"""The four commands as a user runs them: help, one sentence for bad input, and the path from text to text."""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from configuration.errors import exit_with_sentence

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a command's ``main`` as the shell would, without paying for the imports each time."""

    def run(command, *arguments):
        main = importlib.import_module(command.removesuffix(".py")).main
        status = 0
        try:
            with exit_with_sentence(arguments):
                main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        return Result(status, *capsys.readouterr())

    monkeypatch.syspath_prepend(str(ROOT))
    return run


@pytest.mark.parametrize("command", ["train.py", "eval.py", "generate.py", "export.py"])
def test_help_lists_recipes(call, command):
    result = call(command, "--help")
    assert result.returncode == 0 and "recipe=NAME" in result.stdout
    if command == "train.py":
        assert "quickstart" in result.stdout and "scale=full|laptop|tiny" in result.stdout


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("train.py", ["recipe=quickstar"], "did you mean 'quickstart'"),
        ("train.py", ["recipe=quickstart", "trainer.max_step=3", "sed=1"], "2 problems"),
        ("train.py", ["recipe=books_gca", "scale=laptop", "data.path=nowhere"], "data.path=nowhere does not exist"),
        ("train.py", ["recipe=books_gca", "scale=tiny", "data.path=nowhere"], "data.path=nowhere does not exist"),
        ("train.py", ["recipe=quickstart", "model.config.num_attention_heads=5"], "model.config"),
        ("train.py", ["recipe=quickstart", "trainer.max_steps=many"], "trainer.max_steps must be int"),
        ("train.py", ["recipe=quickstart", "resume=runs/no.ckpt"], "no checkpoint file"),
        ("export.py", ["checkpoint=nowhere"], "no run folder"),
        ("generate.py", ["model.path=./nowhere", "prompt=hi"], "model.path=./nowhere does not exist"),
        ("eval.py", ["recipe=perplexity", "model.path=./nowhere", "data.path=./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(call, command, arguments, expected):
    result = call(command, *arguments)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr and "Traceback" not in result.stderr


def test_a_gpu_recipe_without_a_gpu_says_so(call):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = call("train.py", "recipe=pg19_gca", f"data.path={ROOT}")
    assert result.returncode == 2 and "no CUDA device" in result.stderr


def test_from_corpus_to_generated_text(call, tiny_corpus, tmp_path):
    run = tmp_path / "run"
    common = ["recipe=quickstart", "scale=tiny", f"data.path={tiny_corpus}", f"output={run}"]
    trained = call("train.py", *common, "trainer.max_steps=4", "data.max_eval_tokens=1200", "eval_every_n_steps=2")
    assert trained.returncode == 0, trained.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == 4 and metrics["validation"]["step"] == 4
    assert {"config.yaml", "versions.json", "train.jsonl", "checkpoints", "logs"} <= {p.name for p in run.iterdir()}

    exported = call("export.py", f"checkpoint={run}", f"output={tmp_path / 'export'}")
    assert exported.returncode == 0, exported.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run / "model", tmp_path / "export")]
    assert weights[0] == weights[1]

    generated = call("generate.py", f"model.path={run / 'model'}", "prompt=the cat", "task.max_new_tokens=5")
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.startswith("the cat") and "[7 + " in generated.stderr

    evaluated = call(
        "eval.py",
        "recipe=perplexity",
        f"model.path={run / 'model'}",
        f"data.path={tiny_corpus}",
        "task.lengths=[64,256]",
        "task.max_tokens=1000",
        f"output={tmp_path / 'eval'}",
    )
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert (tmp_path / "eval" / "metrics.json").is_file()
    nothing_of_another_command_is_overwritten(call, run, tmp_path / "eval", tiny_corpus)


def nothing_of_another_command_is_overwritten(call, run, evaluation, corpus):
    before = [(folder / "metrics.json").read_bytes() for folder in (run, evaluation)]
    model = f"model.path={run / 'model'}"
    for command, *options in (
        ("eval.py", "recipe=perplexity", model, f"data.path={corpus}", f"output={run}"),
        ("generate.py", model, "prompt=a", f"output={run}"),
        ("generate.py", model, "prompt=a", f"output={evaluation}"),
        ("export.py", f"checkpoint={run}", f"output={evaluation}"),
        ("export.py", f"checkpoint={evaluation}"),
        ("train.py", "recipe=quickstart", "scale=tiny", f"data.path={corpus}", f"output={evaluation}"),
        ("train.py", "recipe=quickstart", "scale=tiny", f"data.path={corpus}", f"output={run / 'model'}"),
    ):
        refused = call(command, *options)
        assert refused.returncode == 2 and refused.stderr.startswith("error: "), (command, options, refused)
    assert before == [(folder / "metrics.json").read_bytes() for folder in (run, evaluation)]


def test_a_checkpoint_of_another_model_and_another_run_are_refused(call, tiny_corpus, tmp_path):
    common = ["scale=tiny", f"data.path={tiny_corpus}", "trainer.max_steps=2", "data.max_eval_tokens=600"]
    first = call(
        "train.py",
        "recipe=quickstart",
        *common,
        f"output={tmp_path / 'a'}",
        "callbacks.checkpoint.every_n_train_steps=2",
    )
    assert first.returncode == 0, first.stderr[-3000:]
    checkpoint = next((tmp_path / "a" / "checkpoints").glob("*.ckpt"))
    other = call(
        "train.py", "recipe=quickstart_sliding_window", *common, f"output={tmp_path / 'b'}", f"resume={checkpoint}"
    )
    assert other.returncode == 2 and "another model" in other.stderr, other.stderr[-2000:]
    changed = call("train.py", "recipe=quickstart", *common, f"output={tmp_path / 'a'}", "seed=9")
    assert changed.returncode == 2 and "seed: 404 -> 9" in changed.stderr


def test_the_script_itself_exits_2_without_a_traceback():
    command = [sys.executable, str(ROOT / "train.py"), "recipe=quickstar"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 2 and result.stderr.startswith("error: unknown recipe")
