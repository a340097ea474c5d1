"""A model through a list of tasks, one method after another into one table; the work behind the task recipes.

Notable: results lie in ``<output>/<label>/<task>/``, so the same command with another method or patch adds a column.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from evaluation.gathering import gather, joined
from evaluation.model_sources import single_model
from evaluation.processes import Process
from evaluation.results import git_commit, write_json
from evaluation.runner.prompts import Place, PromptOptions, Truncation
from evaluation.runner.run import Scoring, evaluate_task
from evaluation.suite.quantization import Backend, Quantization, check_quantization, load_quantized
from evaluation.suite.report import write_report
from evaluation.suite.sources import Cell, Source
from evaluation.tasks.base import Example
from models.rope_scaling import check_rope, scale_model_rope
from patches.parallel_context import ParallelContext, baseline

Dtype = Literal["float32", "bfloat16", "float16"]


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
        if patch is not None and method is not None:
            raise ValueError(f"method={method} is a patch of its own: pass patch=none, or leave method out")
        numbers = {"capacity": capacity, "degree": degree, "max_piece_tokens": max_piece_tokens}
        for name, number in numbers.items():
            if method is None and number is not None:
                raise ValueError(f"{name} belongs to a method: pass method={'snapkv' if capacity else 'pcw'}, say")
        PromptOptions(max_context_tokens, truncation, instruction, chat_template, max_prompt_tokens)
        for name, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.model = single_model(model, tokenizer)
        self.source = source
        self.patch = baseline(method, **numbers) if method is not None else patch  # type: ignore[arg-type]
        self.task_patches = dict(task_patches or {})
        if self.patch is None and self.task_patches:
            raise ValueError("task_patches change a patch, but there is none: pass patch=NAME")
        for changes in self.task_patches.values():
            changed_patch(self.patch, changes)
        self.rope = _checked_rope(rope, self.patch, batch_size)
        self.label = _label(label, method or ("plain" if patch is None else "parallel_context"), numbers, self.rope)
        self.options: dict[str, Any] = {
            "max_context_tokens": max_context_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "truncation": truncation,
            "instruction": instruction,
            "chat_template": chat_template,
            "scoring": scoring,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "rope": self.rope,
        }
        self.quantization, self.backend = quantization, quantization_backend
        self.process = Process.current()
        self.dtype, self.device = dtype, self.process.device(device, dtype)
        if quantization is not None:
            check_quantization(quantization, quantization_backend, self.device)

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
        with joined(self.process):
            self._evaluate(work, output / self.label)
            gather(None, self.process)
        if not self.process.is_first:
            return None
        write_json(output / self.label / "versions.json", _versions())
        return write_report(output)

    def _evaluate(self, work: list[tuple[Cell, list[Example]]], folder: Path) -> None:
        model = self._load()
        for cell, examples in work:
            evaluate_task(
                cell.task,
                changed_patch(self.patch, self.task_patches.get(cell.task.set_name, {})),
                model,
                self.model.tokenizer,
                examples,
                folder / cell.folder,
                rank=self.process.rank,
                world_size=self.process.world_size,
                **self.options,
            )

    def _check_chat(self, work: list[tuple[Cell, list[Example]]]) -> None:
        if self.options["chat_template"] and not getattr(self.model.tokenizer, "chat_template", None):
            raise ValueError(
                f"task.chat_template=true, but the tokenizer of {self.model.label} has no chat template: "
                "leave it out for base models"
            )

    def _load(self) -> Any:
        dtype = getattr(torch, self.dtype)
        if self.quantization is None:
            model = self.model.load(dtype=dtype, device=self.device)
        else:
            name = str(self.model.source)
            model = load_quantized(name, self.quantization, self.backend, dtype=dtype, device=self.device)
        if self.rope is not None:
            # A model that was built here stays as it is for the next run.
            model = model if isinstance(self.model.source, str) else deepcopy(model)
            scale_model_rope(model, self.rope)
        return model


def changed_patch(patch: ParallelContext | None, changes: Mapping[str, Any]) -> ParallelContext | None:
    """Return a patch with other options; ``piece_policy.keep`` names an option inside an option.

    Raises:
        ValueError: there is no such option.
    """
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        holder = getattr(patch, outer, None) if inner else patch
        if not hasattr(holder, inner or outer):
            raise ValueError(f"task_patches: the patch has no option {name}")
        assert patch is not None
        if inner:
            value = replace(holder, **{inner: value})  # type: ignore[type-var]
        patch = replace(patch, **{outer: value})
    return patch


def _checked_rope(
    rope: Mapping[str, Any] | None, patch: ParallelContext | None, batch_size: int
) -> dict[str, Any] | None:
    if rope is None:
        return None
    check_rope(rope)
    if rope["rope_type"] == "dynamic" and patch is None and batch_size > 1:
        raise ValueError(
            f"dynamic rotary angles follow the longest row of a batch: pass batch_size=1, got {batch_size}"
        )
    return dict(rope)


def _label(label: str | None, first: str, numbers: Mapping[str, int | None], rope: Mapping[str, Any] | None) -> str:
    """Return the name of the column: ``label``, or method, its numbers and the rotary type."""
    if label is None:
        given = {"capacity": "", "degree": "degree", "max_piece_tokens": ""}
        parts = [f"{given[name]}{number}" for name, number in numbers.items() if number is not None]
        label = "_".join([first, *parts, *([f"{rope['rope_type']}{rope['factor']:g}"] if rope else [])])
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", label) or label.startswith("."):
        raise ValueError(f"label names a folder: letters, digits, . _ + -, got {label!r}")
    return label


def _versions() -> Mapping[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git": git_commit(),
    }
