"""One task, one model, one folder: every example answered once, whatever was killed in between.

Notable: each process appends its answers to a file of its own, a line flushed to the disk per example; a rerun
reads all of them and computes what is missing, with any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evaluation.cell_journal import CellJournal
from evaluation.peak_memory import PeakMemory
from evaluation.runner.answer_files import answers_done, claim_folder, publish
from evaluation.runner.answering import Answer, Answerer, answerer
from evaluation.runner.checks import Shape, acts_while_decoding, tell
from evaluation.runner.identity import run_identity
from evaluation.runner.prompts import Place, Prompt, PromptMaker, PromptOptions, Truncation, truncate
from evaluation.tasks.base import Example, Task
from patches.parallel_context import ParallelContext

__all__ = ["evaluate_task", "truncate"]

Scoring = Literal["generate", "teacher_forced"]


@dataclass(frozen=True)
class _Run:
    """Everything that the answers to one task are made with."""

    task: Task
    patch: ParallelContext | None
    model: Any
    tokenizer: Any
    maker: PromptMaker
    scoring: Scoring
    max_new_tokens: int | None


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

    Args:
        task: what is asked.
        patch: how the model reads the context; None: as it is.
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        examples: the questions (`Task.read`).
        output_dir: a folder of its own.
        max_context_tokens: this and the next two, chat_template and max_prompt_tokens: see `PromptOptions`.
        truncation: what a longer context loses.
        instruction: where the instruction stands.
        batch_size: examples answered together.
        rank: number of this process.
        world_size: number of processes.
        max_new_tokens: instead of the task's own.
        chat_template: None: the task's own wish, where the tokenizer has one.
        scoring: ``teacher_forced`` scores whether every token of the right answer is the likeliest, and its NLL.
        max_prompt_tokens: tokens of the whole prompt (with one piece of the context) at most.
        rope: rotary positions that the model was given for this run, for the protocol.

    Returns:
        The metrics; None as long as other processes are at work.

    Raises:
        ValueError: the folder belongs to other settings, or an option cannot serve this model.
    """
    _check(task, patch, examples, batch_size=batch_size, rank=rank, world_size=world_size, scoring=scoring)
    options = PromptOptions(max_context_tokens, truncation, instruction, chat_template, max_prompt_tokens)
    maker = PromptMaker(tokenizer, patch, options, chat=_wants_chat(task, tokenizer, chat_template))
    run = _Run(task, patch, model, tokenizer, maker, scoring, max_new_tokens)
    protocol = run_identity(
        task, patch, model, tokenizer, examples, options=options, scoring=scoring, max_new_tokens=max_new_tokens
    )
    # Weights do not show it; only where there is one, so that folders of before go on.
    protocol |= {} if rope is None else {"rope": dict(rope)}
    folder = Path(output_dir)
    claim_folder(folder, protocol, rank)
    with CellJournal(folder / f"predictions.rank{rank}.jsonl").held(wait=True):
        _answer(run, examples, range(rank, len(examples), world_size), folder=folder, rank=rank, batch_size=batch_size)
    return publish(folder, len(examples), protocol, rank)


def _check(
    task: Task,
    patch: ParallelContext | None,
    examples: Sequence[Example],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    scoring: str,
) -> None:
    if not examples:
        raise ValueError(f"{task.name} has no examples")
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"batch_size must be at least 1 and rank below world_size, got {batch_size}, {rank}")
    if scoring not in ("generate", "teacher_forced"):
        raise ValueError(f"scoring is generate or teacher_forced, got {scoring!r}")
    if scoring == "teacher_forced" and patch is not None and acts_while_decoding(patch):
        raise ValueError(
            "this patch drops slots after the query, and scoring=teacher_forced reads the answer with the query: "
            "pass scoring=generate"
        )


def _wants_chat(task: Task, tokenizer: Any, wanted: bool | None) -> bool:
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if wanted and not has_one:
        raise ValueError("chat_template=true, but the tokenizer has no chat template: leave it out for base models")
    return has_one and (task.chat_template if wanted is None else wanted)


def _answer(run: _Run, examples: Sequence[Example], share: range, *, folder: Path, rank: int, batch_size: int) -> None:
    """Answer what is missing of a process's share, batch by batch, and write each answer down."""
    journal = CellJournal(folder / f"predictions.rank{rank}.jsonl")
    journal.mend()
    done = answers_done(folder)
    indices = [index for index in share if index not in done]
    if not indices:
        return
    shapes: list[Shape] = []
    device = next(run.model.parameters()).device
    with answerer(run.model, run.tokenizer, run.patch) as engine, PeakMemory(device) as memory:
        for batch in _batches(run, examples, indices, batch_size):
            prompts = [prompt for _, prompt in batch]
            engine.check(prompts, max(_longest_answer(run, examples[index]) for index, _ in batch))
            shapes += map(Shape.of, prompts)
            for line in _answer_batch(run, engine, examples, batch):
                journal.append(line | {"peak_bytes": memory.bytes()})
    tell(run.task.name, run.model, run.patch, shapes)


def _batches(
    run: _Run, examples: Sequence[Example], indices: list[int], size: int
) -> Iterator[list[tuple[int, Prompt]]]:
    """Yield batches of prompts behind the same prefix and of the same length of answer."""
    batch: list[tuple[int, Prompt]] = []
    for index in indices:
        prompt = run.maker.make(examples[index])
        same = not batch or (
            batch[0][1].prefix == prompt.prefix
            and (len(batch[0][1].tokens) == 1) == (len(prompt.tokens) == 1)
            and _new_tokens(run, examples[batch[0][0]]) == _new_tokens(run, examples[index])
        )
        if len(batch) == size or not same:
            yield batch
            batch = []
        batch.append((index, prompt))
    yield batch


def _new_tokens(run: _Run, example: Example) -> int:
    return run.max_new_tokens or int(example.extra.get("max_new_tokens", run.task.max_new_tokens))


def _longest_answer(run: _Run, example: Example) -> int:
    forced = run.scoring == "teacher_forced"
    return len(answer_ids(run.tokenizer, example)) if forced else _new_tokens(run, example)


def _answer_batch(
    run: _Run, engine: Answerer, examples: Sequence[Example], batch: list[tuple[int, Prompt]]
) -> list[dict[str, Any]]:
    started = time.perf_counter()
    chosen, prompts = [examples[index] for index, _ in batch], [prompt for _, prompt in batch]
    if run.scoring == "generate":
        found = engine.generate(prompts, _new_tokens(run, chosen[0]))
    else:
        found = engine.force(prompts, [answer_ids(run.tokenizer, example) for example in chosen])
    seconds = (time.perf_counter() - started) / len(batch)
    lines = []
    for (index, prompt), example, answer in zip(batch, chosen, found.answers, strict=True):
        text = answer.text.split(run.task.stop, 1)[0] if run.task.stop else answer.text
        lines.append(
            {
                "index": index,
                "id": example.id,
                "task": run.task.name,
                "prediction": text,
                "answers": list(example.answers),
                "scores": run.task.score(text, example) if answer.nll_sum is None else _forced_scores(answer),
                "num_pieces": len(prompt.pieces),
                "num_context_tokens": prompt.num_context_tokens,
                "num_query_tokens": len(prompt.query),
                "seconds": seconds,
                "prefill_seconds": None
                if found.prefill_seconds != found.prefill_seconds
                else found.prefill_seconds / len(batch),
            }
            | {key: example.extra[key] for key in ("depth", "length") if key in example.extra}
        )
    return lines


def answer_ids(tokenizer: Any, example: Example) -> list[int]:
    """Return the tokens of the right answer (all of them where several are asked for) behind the query."""
    text = ", ".join(str(answer) for answer in example.answers)
    space = "" if not example.query or example.query[-1].isspace() else " "
    return list(tokenizer(space + text, add_special_tokens=False)["input_ids"])


def _forced_scores(answer: Answer) -> dict[str, float]:
    assert answer.nll_sum is not None and answer.num_targets is not None
    return {
        "score": float(bool(answer.all_argmax)),
        "answer_nll": answer.nll_sum,
        "answer_tokens": float(answer.num_targets),
    }
