"""One task, one model, one folder: every example answered once, whatever was killed in between.

Notable: each process appends its answers to a file of its own, a line flushed to the disk per example; a rerun
reads all of them and computes what is missing, with any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.cell_journal import CellJournal
from evaluation.peak_memory import PeakMemory
from evaluation.processes import Process
from evaluation.runner.answer_files import answers_done, claim_folder, publish
from evaluation.runner.answering import answerer
from evaluation.runner.checks import Shape, tell
from evaluation.runner.prompts import Place, PromptOptions, Truncation
from evaluation.runner.task_run import AnswerOptions, Scoring, TaskRun
from evaluation.tasks.base import Example, Task
from patches.parallel_context import ParallelContext


def evaluate_task(
    task: Task,
    patch: ParallelContext | None,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    output_dir: str | Path,
    *,
    max_context_tokens: int | None = None,
    truncation: Truncation = "none",
    instruction: Place = "prefix",
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    max_new_tokens: int | None = None,
    chat_template: bool | None = None,
    scoring: Scoring = "generate",
    max_prompt_tokens: int | None = None,
    rope: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Answer what is missing of a process's share of the examples, and publish once all are there.

    Example i belongs to process i % world_size. Files: ``predictions.rank{r}.jsonl``; of all processes
    ``predictions.jsonl`` in the order of the examples, and ``metrics.json`` with the protocol.

    The first five arguments and ``rope`` are those of `TaskRun`; ``output_dir`` is a folder of its own; rank and
    world_size say which process of how many this is. How examples become tokens (max_context_tokens, truncation,
    instruction, chat_template, max_prompt_tokens): see `PromptOptions`; how they are answered (batch_size,
    max_new_tokens, scoring): `AnswerOptions`.

    Returns:
        The metrics; None as long as other processes are at work.

    Raises:
        ValueError: the folder belongs to other settings, or an option cannot serve this model.
    """
    prompts = PromptOptions(max_context_tokens, truncation, instruction, chat_template, max_prompt_tokens)
    answers = AnswerOptions(scoring, max_new_tokens, batch_size)
    run = TaskRun(task, patch, model, tokenizer, examples, prompts, answers, rope)
    return run_share(run, Path(output_dir), Process(rank, world_size))


def run_share(run: TaskRun, folder: Path, process: Process) -> dict[str, Any] | None:
    """Answer what is missing of a process's share of a run, see `evaluate_task`.

    Raises:
        ValueError: the folder belongs to other settings.
    """
    if not 0 <= process.rank < process.world_size:
        raise ValueError(f"rank must be below world_size, got {process.rank} of {process.world_size}")
    protocol = run.protocol()
    claim_folder(folder, protocol, process.rank)
    journal = CellJournal(folder / f"predictions.rank{process.rank}.jsonl")
    with journal.held(wait=True):
        journal.mend()
        done = answers_done(folder)
        share = range(process.rank, len(run.examples), process.world_size)
        _answer(run, [index for index in share if index not in done], journal)
    return publish(folder, len(run.examples), protocol, process.rank)


def _answer(run: TaskRun, indices: list[int], journal: CellJournal) -> None:
    """Answer examples, batch by batch, and write each answer down."""
    if not indices:
        return
    shapes: list[Shape] = []
    device = next(run.model.parameters()).device
    with answerer(run.model, run.tokenizer, run.patch) as engine, PeakMemory(device) as memory:
        for batch in run.batches(indices):
            prompts = [prompt for _, prompt in batch]
            engine.check(prompts, run.longest_answer(batch))
            shapes += map(Shape.of, prompts)
            for line in run.answer(engine, batch):
                journal.append(line | {"peak_bytes": memory.bytes()})
    tell(run.task.name, run.model, run.patch, shapes)
