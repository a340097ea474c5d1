"""SIGKILL at random moments of tokenising, scoring, training and evaluation: what is there in the end is the same."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from callbacks.loss_log import read_rows
from configuration.compose import compose
from configuration.task import run_task
from configuration.training import run
from preprocess import chunk_documents, span_scores, summarization
from preprocess.command import run_command
from preprocess.corpora import ensure_corpus
from tests.conftest import write_pairs
from tests.preprocess.score_cases import save_llama

pytestmark = pytest.mark.slow


def tokenise(folder, text):
    ensure_corpus(str(folder / "corpus"), source=str(text), tokenizer="bpe:300")


def cut(folder, corpus):
    words = ["--input", f"{corpus}/train", "--length", "64", "--output", str(folder / "sequences")]
    assert run_command(chunk_documents.main, words) == 0


def pair(folder, source):
    words = [str(source), "--tokenizer", "bytes", "--output", str(folder / "summaries")]
    assert run_command(summarization.main, words) == 0


def score_spans(folder, corpus, model):
    words = [str(corpus), "--model", str(model), "--output", str(folder / "scores"), "--dtype", "float32"]
    assert run_command(span_scores.main, [*words, "--context-length", "64", "--stride", "8", "--device", "cpu"]) == 0


def train(folder, corpus, recipe):
    named = [f"recipe={recipe}", "scale=tiny", f"output={folder / 'run'}", "trainer.max_steps=8", "~logger.tensorboard"]
    named += ["trainer.enable_progress_bar=false", "callbacks.checkpoint.every_n_train_steps=2", "eval_every_n_steps=4"]
    if recipe == "quickstart":
        named += [f"data.path={corpus}", "data.max_eval_tokens=600", "~callbacks.sample_text"]
    else:
        named += [f"prepare.corpus={corpus}", f"data.sequences={folder}/train", f"data.validation={folder}/validation"]
        named += [
            f"prepare.scoring.output={folder}/scores",
            "~callbacks.long_perplexity",
            "~callbacks.parallel_perplexity",
        ]
    run(compose(named, command="train"))


def evaluate(folder, corpus, model):
    named = ["recipe=perplexity", f"model.path={model}", f"data.path={corpus}", f"output={folder / 'results'}"]
    run_task([*named, "task.lengths=[64,128]", "task.max_tokens=1500"], lambda line: None, command="eval")


def contents(folder):
    """What counts of the work: tokens, scores, losses, results."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name == "texts.jsonl" or (path.suffix in (".bin", ".npy") and "checkpoints" not in path.parts):
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif path.name == "train.jsonl":
            found["losses"] = read_rows(path)
        elif path.name == "metrics.json" and "results" in path.parts:
            found["nll_sums"] = list(sums(json.loads(path.read_text())))
    return found


def sums(node):
    """All values named ``nll_sum`` in nested results."""
    if isinstance(node, dict):
        if "nll_sum" in node:
            yield node["nll_sum"]
        node = list(node.values())
    for value in node if isinstance(node, list) else []:
        yield from sums(value)


def killed_and_repeated(work, arguments, kills, seed):
    """Start, kill at random moments, start again; in the end let it finish."""
    context, draw = multiprocessing.get_context("fork"), random.Random(seed)
    whole, broken = arguments[0] / "whole", arguments[0] / "broken"
    for folder in (whole, broken):
        folder.mkdir(parents=True)
    start = time.monotonic()
    process = context.Process(target=work, args=(whole, *arguments[1:]))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    took, done = time.monotonic() - start, 0
    for _ in range(10 * kills):
        process = context.Process(target=work, args=(broken, *arguments[1:]))
        process.start()
        process.join(draw.uniform(0.05, 0.7) * took)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        else:  # done before the moment came: from the beginning
            shutil.rmtree(broken)
            broken.mkdir()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if done == kills:
            break
    process = context.Process(target=work, args=(broken, *arguments[1:]))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    expected, found = contents(whole), contents(broken)
    assert expected and found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name
    return done


def test_tokenising(tiny_corpus, tmp_path):
    assert killed_and_repeated(tokenise, (tmp_path, Path(tiny_corpus).parent / "text"), 5, seed=0) == 5


def test_cutting(tiny_corpus, tmp_path):
    assert killed_and_repeated(cut, (tmp_path, tiny_corpus), 3, seed=3) == 3


def test_pairing(tmp_path):
    source = write_pairs(tmp_path / "pairs" / "train.jsonl", 3000)
    assert killed_and_repeated(pair, (tmp_path, source), 3, seed=4) == 3


def test_scoring_spans(tiny_corpus, tmp_path):
    model = save_llama(tmp_path / "model", vocab_size=259)
    assert killed_and_repeated(score_spans, (tmp_path, tiny_corpus, model), 4, seed=5) == 4


@pytest.mark.parametrize(("recipe", "kills"), [("quickstart", 6), ("pg19_dense_frozen", 6)])
def test_scoring_and_training(recipe, kills, tiny_corpus, tmp_path):
    assert killed_and_repeated(train, (tmp_path, tiny_corpus, recipe), kills, seed=1) == kills


def test_evaluation(tiny_corpus, tmp_path):
    train(tmp_path / "model", tiny_corpus, "quickstart")
    model = tmp_path / "model" / "run" / "model"
    assert killed_and_repeated(evaluate, (tmp_path, tiny_corpus, model), 5, seed=2) == 5
