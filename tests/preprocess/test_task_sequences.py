"""Sequences of synthetic tasks: what the evaluation asks, and nothing counted before it."""

import pytest

from datamodules.sequence_store import SequenceStore
from evaluation.runner import answer_ids
from evaluation.runner.prompts import PromptMaker, PromptOptions
from evaluation.suite.sources import GeneratedTasks
from preprocess.command import run_command
from preprocess.task_sequences import main
from preprocess.tokenizers import load_tokenizer
from preprocess.verify import main as verify

TASKS = ["recall_multikey", "niah_single_1"]


@pytest.fixture
def essay(tmp_path):
    file = tmp_path / "essay.txt"
    file.write_text("It was late. The rain went on and nobody spoke. " * 20)
    return file


def make(folder, essay, *options, tasks=TASKS, length=700, count=5):
    numbers = ["--length", length, "--count", count]
    words = ["--tasks", *tasks, *numbers, "--tokenizer", "bytes", "--essay", essay, "--output", folder, *options]
    return run_command(main, [str(word) for word in words])


@pytest.mark.parametrize("loss", ["answer", "question", "all"])
def test_sequences_are_the_prompts_of_the_evaluation_and_their_answers(tmp_path, essay, loss):
    assert make(tmp_path / "train", essay, "--loss", loss, "--seed", 3) == 0
    store, tokenizer = SequenceStore(tmp_path / "train"), load_tokenizer("bytes")
    source = GeneratedTasks(TASKS, [700], num_examples=3, seed=3, essay=str(essay))
    first, second = (source.examples(cell, tokenizer) for cell in source.cells())
    expected = [first[0], second[0], first[1], second[1], first[2]]
    assert len(store) == 5
    for number, example in enumerate(expected):
        prompt, answer = PromptMaker(tokenizer, None, PromptOptions()).make(example), answer_ids(tokenizer, example)
        sequence, size = store[number], int(store.index[number, 2])
        assert sequence["input_ids"][:size].tolist() == prompt.tokens + answer
        counted = sequence["input_ids"][1:][sequence["valid"]].tolist()
        everything = prompt.tokens[1:] + answer
        assert counted == {"answer": answer, "question": prompt.query + answer, "all": everything}[loss]
        assert str(example.answers[0]) in tokenizer.decode(counted)


def test_made_once_whole_and_verifiable(tmp_path, essay, capsys):
    assert make(tmp_path / "a" / "train", essay) == 0 == make(tmp_path / "a" / "train", essay)
    assert make(tmp_path / "b" / "train", essay) == 0
    stores = [SequenceStore(tmp_path / name / "train") for name in "ab"]
    assert stores[0].store_id == stores[1].store_id
    assert run_command(verify, [str(tmp_path / "a" / "train")]) == 0
    assert make(tmp_path / "a" / "train", essay, "--seed", 1) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "a" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["nothing"]}, "unknown"),
        ({"length": 20}, "too few"),
        ({"count": 1}, "at least the number of tasks, 2"),
    ],
)
def test_refused(tmp_path, essay, capsys, options, message):
    assert make(tmp_path / "train", essay, **options) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("*train*"))


def test_tasks_in_a_text_need_one(tmp_path, capsys):
    words = ["--tasks", "recall_single", "--length", "200", "--count", "1", "--tokenizer", "bytes"]
    assert run_command(main, [*words, "--output", str(tmp_path / "train")]) == 2
    assert "essay" in capsys.readouterr().err
