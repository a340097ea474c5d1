"""A disk that is full, or that may not be written: every command says so in one sentence, leaves no half of a result,
and makes the whole of it once there is room."""

import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from configuration.errors import exit_with_sentence
from preprocess.command import run_command
from tests.conftest import write_pairs, write_text_folder

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
SCORING = ["--dtype", "float32", "--device", "cpu"]
TRAINING = [
    "recipe=quickstart_sliding_window",
    "scale=tiny",
    "data.context_length=64",
    "data.eval_lengths=[64]",
    "data.max_eval_tokens=200",
    "trainer.max_steps=1",
    "trainer.enable_progress_bar=false",
    "~callbacks.sample_text",
    "~logger.tensorboard",
]
# What each writes, and the largest file that the disk of the test still takes.
COMMANDS = {
    "preprocess.tokenize": ("{text} --tokenizer bytes --output {output}", (1_000, 5_000)),
    "preprocess.train_tokenizer": ("{text} --vocab-size 300 --output {output}", (1_000,)),
    "preprocess.chunk_documents": ("--input {corpus}/train --length 64 --output {output}", (1_000, 200)),
    "preprocess.summarization": ("{pairs} --tokenizer bytes --output {output}", (500, 5_000)),
    "preprocess.task_sequences": (
        "--tasks niah_single_1 --length 1000 --count 4 --tokenizer {corpus}/tokenizer --output {output}",
        (1_000,),
    ),
    "preprocess.score_tokens": (
        "--sequences {sequences} --model {model} --base-length 16 --base-stride 8 --output {output}",
        (1_000, 100),
    ),
    "preprocess.span_scores": (
        "{corpus} --split validation --model {model} --context-length 64 --output {output}",
        (1_000, 200),
    ),
    "train": ("data.path={corpus} output={output}", (1_000, 100_000)),
    "export": ("checkpoint={run} output={output}", (1_000, 100_000)),
    "eval": (
        "recipe=perplexity model.path={run}/model data.path={corpus} output={output} task.lengths=[64] "
        "task.max_tokens=300",
        (300,),
    ),
    "generate": ("model.path={run}/model prompt=a task.max_new_tokens=300 output={output}", (20,)),
}


@pytest.fixture(scope="module")
def inputs():
    """What the commands read, in a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    write_text_folder(folder / "text")
    for number, (split, count) in enumerate((("train", 60), ("validation", 5))):
        write_pairs(folder / "pairs" / f"{split}.jsonl", count, seed=number)
    paths = {name: folder / name for name in ("text", "pairs", "corpus", "sequences", "run", "model")}
    assert command("preprocess.tokenize", paths, output=paths["corpus"])() == 0
    assert command("preprocess.chunk_documents", paths, output=paths["sequences"])() == 0
    assert command("train", paths, output=paths["run"])() == 0
    save_model(paths["model"])
    for path in folder.rglob("*"):
        path.chmod(0o755)
    yield paths
    shutil.rmtree(folder)


def save_model(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder)
    return folder


def command(name, paths, *, output):
    """Return the command as a function without arguments that gives its exit status."""
    arguments = COMMANDS[name][0].format(**paths, output=output).split()
    arguments += SCORING * name.endswith(("score_tokens", "span_scores")) + TRAINING * (name == "train")
    main = importlib.import_module(name).main

    def call():
        if name.startswith("preprocess"):
            return run_command(main, arguments)
        try:
            with exit_with_sentence(arguments):
                main(arguments)
        except SystemExit as ended:
            return ended.code
        return 0

    return call


def in_a_process(call, prepare):
    """Return the exit status of a command in a process of its own, and what it printed."""
    read, write = os.pipe()

    def work():
        # Not the descriptors: the test runner has put objects of its own in front of them.
        sys.stdout = sys.stderr = os.fdopen(write, "w", buffering=1)
        prepare()
        try:
            status = call()
        except BaseException:
            traceback.print_exc()
            status = 99
        os._exit(status)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        shown = pipe.read()
    process.join()
    return process.exitcode, shown


def small_disk(limit):
    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return prepare


def one_sentence(shown):
    errors = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in shown, shown
    return errors[0]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


LIMITS = [(name, limit) for name, (_, limits) in COMMANDS.items() for limit in limits]


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_a_full_disk(name, limit, inputs, tmp_path):
    output = tmp_path / "output"
    status, shown = in_a_process(command(name, inputs, output=output), small_disk(limit))
    assert status == 2, shown
    assert str(output) in one_sentence(shown), shown
    if name.startswith("preprocess") and not name.endswith("score_tokens"):
        assert not output.exists()
    assert command(name, inputs, output=output)() == 0
    if name.startswith("preprocess"):
        assert command(name, inputs, output=tmp_path / "whole")() == 0
        found, expected = contents(output), contents(tmp_path / "whole")
        assert found.keys() == expected.keys()
        records = {file for file in expected if file.startswith("shard-") and file.endswith(".json")}
        assert all(found[file] == expected[file] for file in expected.keys() - records)  # these say how long it took
        assert {path.name for path in tmp_path.iterdir()} <= {"output", "whole", "tokenizer"}


def without_rights():
    """Give up what lets the superuser write everywhere."""
    if os.getuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_may_not_be_written(name, inputs):
    folder = inputs["text"].parent / f"closed_{name}"
    folder.mkdir(mode=0o555)
    status, shown = in_a_process(command(name, inputs, output=folder / "output"), without_rights)
    assert status == 2, shown
    said = one_sentence(shown)
    assert str(folder) in said and "ermission denied" in said, shown
