"""Synthetic long-context tasks to train on: python -m preprocess.task_sequences --tasks NAME ... --output DIR.

Notable: a sequence is the prompt that ``eval.py recipe=ruler`` would give, and its answer, token for token. The store
is an ordinary one (`datamodules.sequence_store`), so every fine-tuning recipe trains on it; targets before the answer
(or the question) are marked as counted already.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from datamodules.corpus_format import META_FILE, digest, file_sha256
from datamodules.sequence_store import TOKEN_DTYPE, SequenceStore
from evaluation.runner import answer_ids
from evaluation.runner.prompts import PromptMaker, PromptOptions
from evaluation.suite.sources import GeneratedTasks
from preprocess.chunk_cut import Chunk
from preprocess.chunk_store import SequenceWriter
from preprocess.command import run_command
from preprocess.disk import full_disk_named
from preprocess.folders import output_folder
from preprocess.index import is_taken, move_into_place
from preprocess.journal import WorkFolder
from preprocess.tokenizers import load_tokenizer, save_tokenizer, tokenizer_identity

EXAMPLES = """examples:
  python -m preprocess.task_sequences --tasks recall_single recall_multikey --length 512 --count 20000 \\
      --essay data/book.txt --tokenizer data/books/tokenizer --output data/recall_512/train
  python -m preprocess.task_sequences --tasks niah_single_1 vt --length 4096 --count 2000 --loss question \\
      --tokenizer models/llama --output data/ruler_4k/train

Train on them as on any sequences (recipe=pg19_ce data.sequences=... data.validation=...). Evaluate with
eval.py recipe=ruler, whose default seed is 42: a training set of that seed holds the examples of the evaluation.
"""
LossOn = Literal["answer", "question", "all"]


@dataclass(frozen=True)
class TaskSet:
    """What is generated.

    Attributes:
        tasks: names of `evaluation.ruler.TASKS`, in turns.
        length: tokens of an example at most.
        count: sequences.
        seed: of all draws.
        essay: file with the text that hides needles.
        loss_on: the targets that count: those of the ``answer``, from the ``question`` on, or ``all``.
    """

    tasks: tuple[str, ...]
    length: int
    count: int
    seed: int = 0
    essay: str | None = None
    loss_on: LossOn = "answer"

    def __post_init__(self) -> None:
        if self.count < len(self.tasks):
            raise ValueError(f"count must be at least the number of tasks, {len(self.tasks)}, got {self.count}")
        if self.loss_on not in get_args(LossOn):
            raise ValueError(f"loss_on is one of {', '.join(get_args(LossOn))}, got {self.loss_on!r}")


def task_chunks(wanted: TaskSet, tokenizer: Any) -> Iterator[Chunk]:
    """Yield the sequences, task by task in turns.

    Raises:
        ValueError: an unknown task, or a length that is too short for one.
    """
    each = -(-wanted.count // len(wanted.tasks))
    source = GeneratedTasks(wanted.tasks, [wanted.length], num_examples=each, seed=wanted.seed, essay=wanted.essay)
    maker = PromptMaker(tokenizer, None, PromptOptions())
    columns = [source.examples(cell, tokenizer) for cell in source.cells()]
    examples = [example for row in zip(*columns, strict=True) for example in row]
    for example in examples[: wanted.count]:
        prompt, answer = maker.make(example), answer_ids(tokenizer, example)
        tokens = np.array([*prompt.tokens, *answer], TOKEN_DTYPE)
        # A task reserves as many tokens for its answer as a model may generate; the right one is not longer.
        first = {"answer": len(prompt.tokens), "question": len(prompt.tokens) - len(prompt.query), "all": 1}
        yield Chunk(tokens, 0, max(first[wanted.loss_on], 1) - 1)


def make_task_sequences(wanted: TaskSet, tokenizer_name: str, *, output: Path) -> dict[str, Any]:
    """Make a sequence store of generated tasks, or find it made; its tokenizer is kept beside it.

    Returns:
        ``meta.json`` of the store.

    Raises:
        FileExistsError: something else is at ``output``.
        ValueError: as `task_chunks`.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    fields: dict[str, Any] = {
        "bos_token_id": None,
        "tail": "pad",
        "parity": False,
        "tokenizer": tokenizer_identity(tokenizer),
    }
    fields["source"] = {"tasks": digest(asdict(wanted) | {"essay": wanted.essay and file_sha256(Path(wanted.essay))})}
    if is_taken(output):
        if (output / META_FILE).is_file() and (meta := SequenceStore(output).meta)["source"] == fields["source"]:
            return meta
        raise FileExistsError(f"{output} exists and holds something else: choose another --output or remove it")
    folder = output.parent / f".{output.name}.{digest(fields)[:12]}.partial"
    try:
        with full_disk_named(output), WorkFolder(folder) as held:
            meta = _write(task_chunks(wanted, tokenizer), folder, wanted.length, fields)
            save_tokenizer(tokenizer, output.parent / "tokenizer")  # first: a store that is there is not touched again
            held.clear_tools()
            move_into_place(folder, output, overwrite=False)
    except ValueError:  # other options are needed, and those are other work
        shutil.rmtree(folder)
        raise
    return meta


def _write(chunks: Iterator[Chunk], folder: Path, length: int, fields: dict[str, Any]) -> dict[str, Any]:
    writer = SequenceWriter(folder, length)
    try:
        for number, chunk in enumerate(chunks):
            writer.add(number, chunk)
        return writer.finish(**fields, num_documents=writer.num_sequences)
    finally:
        writer.close()


def main(arguments: list[str]) -> None:
    """Make a store."""
    parser = argparse.ArgumentParser(
        prog="python -m preprocess.task_sequences",
        description="Generate synthetic long-context tasks with their answers as sequences to train on.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="as in eval.py recipe=ruler")
    parser.add_argument("--length", type=int, required=True, help="tokens of an example at most")
    parser.add_argument("--count", type=int, required=True, help="sequences, the tasks in turns")
    parser.add_argument("--tokenizer", required=True, help="a folder, a tokenizer.json or a hub name")
    parser.add_argument("--essay", help="file with the text that hides needles")
    parser.add_argument("--loss", choices=get_args(LossOn), default="answer", help="targets that count")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    parser.add_argument("--output", type=output_folder, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    wanted = TaskSet(
        tuple(options.tasks), options.length, options.count, options.seed, essay=options.essay, loss_on=options.loss
    )
    meta = make_task_sequences(wanted, options.tokenizer, output=options.output)
    sizes = f"{meta['num_sequences']:,} sequences of {meta['length']:,} tokens, {meta['num_targets']:,} targets"
    print(f"{options.output}: {sizes}, store_id {meta['store_id'][:12]}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
