"""A model through a list of tasks, one method after another into one table; the work behind the task recipes.

Notable: results lie in ``<output>/<label>/<task>/``, so the same command with another method or patch adds a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.arithmetic import versions
from evaluation.gathering import gather, joined
from evaluation.model_sources import single_model
from evaluation.processes import Process
from evaluation.results import write_json
from evaluation.runner.identity import model_entries
from evaluation.runner.prompts import Place, PromptOptions, Truncation
from evaluation.runner.run import run_share
from evaluation.runner.task_run import AnswerOptions, Scoring, TaskRun
from evaluation.suite.column import Baseline, Column
from evaluation.suite.report import check_sets, write_report
from evaluation.suite.sources import Cell, Source
from evaluation.tasks.base import Example
from evaluation.weights import Backend, Dtype, Quantization, Weights
from patches.parallel_context import ParallelContext


class TaskSuite:
    """Evaluate one model on the tasks of a source.

    Args:
        model: model folder, ``hub:NAME``, or a function that builds one.
        source: where the examples come from (`evaluation.suite.sources`).
        patch: how the model reads contexts; None: as it is.
        method: a published baseline instead of a patch (`patches.parallel_context.baseline`).
        capacity: slots per layer and head that the baseline keeps.
        degree: windows of the baselines that have some (pcw, ape).
        max_piece_tokens: their greatest size, instead of the number.
        label: name of the column; None: made of method or patch.
        task_patches: options of the patch that single tasks change, ``{"passkey": {"piece_policy.keep": 1}}``.
        max_context_tokens: tokens of a context at most.
        max_prompt_tokens: tokens of instruction, query and context (or one piece of it) at most.
        truncation: what a longer context loses: none, middle, left, right.
        instruction: where the instruction stands: prefix, pieces, query.
        chat_template: True asks for one; None: where task and tokenizer want it.
        scoring: ``generate`` or ``teacher_forced``.
        max_new_tokens: instead of each task's own.
        batch_size: examples answered together.
        tokenizer: instead of the model folder's.
        quantization: int8 or int4 weights.
        quantization_backend: bitsandbytes or torchao.
        rope: rotary positions beyond the trained length (`models.rope_scaling.scale_rope`); None: the model's own.
        dtype: of weights and arithmetic.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: an option out of range, both a patch and a method, or a device that is not there.
        FileNotFoundError: the model does not exist.
    """

    def __init__(
        self,
        model: Any,
        source: Source,
        *,
        patch: ParallelContext | None = None,
        method: str | None = None,
        capacity: int | None = None,
        degree: int | None = None,
        max_piece_tokens: int | None = None,
        label: str | None = None,
        task_patches: Mapping[str, Mapping[str, Any]] | None = None,
        max_context_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        truncation: Truncation = "none",
        instruction: Place = "prefix",
        chat_template: bool | None = None,
        scoring: Scoring = "generate",
        max_new_tokens: int | None = None,
        batch_size: int = 1,
        tokenizer: Any = None,
        quantization: Quantization | None = None,
        quantization_backend: Backend = "bitsandbytes",
        rope: Mapping[str, Any] | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
    ) -> None:
        self.model, self.source = single_model(model, tokenizer), source
        self.prompts = PromptOptions(max_context_tokens, truncation, instruction, chat_template, max_prompt_tokens)
        self.answers = AnswerOptions(scoring, max_new_tokens, batch_size)
        self.process = Process.current()
        self.weights = Weights(dtype, self.process.device(device, dtype), quantization, quantization_backend, rope)
        baseline = Baseline(method, capacity, degree, max_piece_tokens)
        self.column = Column.of(patch, baseline, label=label, rope=rope, task_patches=task_patches)
        self.weights.check(self.column.patch, batch_size)

    def run(self, output: Path) -> dict[str, Any] | None:
        """Compute what is missing under ``<output>/<label>``; return all methods' scores and their table.

        Files: ``<label>/<task>/`` (predictions, metrics), ``metrics.json``, ``rows.csv``, ``table.md``,
        ``score_by_length.png``, ``needle_<label>.png``.

        Returns:
            None on all processes but the first.
        """
        tokenizer = self.model.tokenizer
        work = [(cell, self.source.examples(cell, tokenizer)) for cell in self.source.cells()]
        self._check_chat(work)
        folder = output / self.column.label
        check_sets(folder, [cell.folder for cell, _ in work])
        with joined(self.process):
            self._evaluate(work, folder)
            gather(None, self.process)
        if not self.process.is_first:
            return None
        write_json(folder / "versions.json", versions())
        return write_report(output)

    def _evaluate(self, work: list[tuple[Cell, list[Example]]], folder: Path) -> None:
        model, tokenizer = self.weights.load(self.model), self.model.tokenizer
        options = {"rope": self.weights.rope, "described": model_entries(model)}
        for cell, examples in work:
            patch = self.column.patch_of(cell.task.set_name)
            run = TaskRun(cell.task, patch, model, tokenizer, examples, self.prompts, self.answers, **options)
            run_share(run, folder / cell.folder, self.process)

    def _check_chat(self, work: list[tuple[Cell, list[Example]]]) -> None:
        if self.prompts.chat_template and not getattr(self.model.tokenizer, "chat_template", None):
            raise ValueError(
                f"task.chat_template=true, but the tokenizer of {self.model.label} has no chat template: "
                "leave it out for base models"
            )
