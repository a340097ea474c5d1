"""The keys that stand at the top level of a recipe, beside its sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrainOptions:
    """Top-level keys of a recipe for ``train.py``.

    Attributes:
        recipe: name of the recipe file.
        command: the command that runs it.
        name: name of the run; the default output folder is ``runs/<name>``.
        scale: chosen size, ``full``, ``laptop`` or ``tiny`` (an option group).
        sizes: the method whose sizes a scale chooses, a folder of ``recipes/sizes``.
        vocabulary: number of token ids and the special ones (an option group); the model's configuration takes them.
        seed: seed of initial weights, data order and retrieval noise.
        output: run folder: composed config, versions, logs, checkpoints, ``metrics.json``, ``model/``.
        resume: ``auto`` continues the run in ``output`` if there is one, a path continues from that checkpoint or
            the newest of that run folder, ``false`` starts anew and refuses a folder that already holds a run.
        dry_run: build on the meta device, print sizes and memory, train nothing.
        sequences_per_step: sequences of an optimiser step over all processes, from which the accumulation follows;
            null: as many as batch size, accumulation and processes make.
        eval_every_n_steps: optimiser steps between validations; null validates only at the end.
        export_model: write a Hugging Face folder ``<output>/model`` at the end.
        prepare: target that makes sure the corpus exists and returns its folder.
        model: factory of the model (a ``_partial_``).
        data: the datamodule.
        module: the Lightning module.
        trainer: ``lightning.pytorch.Trainer`` options.
        callbacks: named callbacks; remove one with ``~callbacks.NAME``.
        logger: named loggers.
    """

    recipe: str
    name: str
    output: str
    model: dict[str, Any]
    data: dict[str, Any]
    module: dict[str, Any]
    trainer: dict[str, Any]
    command: Literal["train"] = "train"
    scale: str = "full"
    sizes: str = "pretraining"
    seed: int = 404
    vocabulary: dict[str, Any] = field(default_factory=dict)
    resume: str | bool = "auto"
    dry_run: bool = False
    sequences_per_step: int | None = None
    eval_every_n_steps: int | None = None
    export_model: bool = True
    prepare: dict[str, Any] | None = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskOptions:
    """Top-level keys of a recipe for ``eval.py``, ``generate.py`` and ``export.py``.

    Attributes:
        recipe: name of the recipe file.
        command: the command that runs it.
        name: name of the task.
        output: folder for results.
        model: where the model comes from.
        data: where the data come from.
        task: target that does the work.
        prompt: text to continue (generate).
        prompt_file: file with the text to continue (generate).
        checkpoint: run folder or checkpoint file (export).
        dry_run: check everything, run nothing.
        scale: chosen size, where the recipe declares ``sizes`` (a task that trains).
        sizes: whose sizes a scale chooses, a folder of ``recipes/sizes``.
        seed: of what a task trains.
        vocabulary: number of token ids and the special ones (a task that trains).
        prepare: target that makes the corpus (a task that trains).
        module: Lightning module, but what the task varies (a task that trains).
        trainer: ``lightning.pytorch.Trainer`` options (a task that trains).
        sweep: what a sweep varies.
        output_dir: folder for results, as ``output``, of a sweep.
        patch: inference-time method over the model (an option group); null: the model as it is.
        documents: files or folders with the context of a prompt (generate).
        lengths: context lengths of a sweep over parallel contexts.
        degrees: its numbers of pieces.
        prefixes: its shared prefixes.
        selections: its selections of pieces.
        keep_tail: last tokens of each text, which it scores.
        unsplit: tokens before them that no piece holds.
        max_documents: documents that it reads for each length.
        tasks: names of the tasks to evaluate, inside their family.
        method: published baseline that reads their contexts, instead of a patch.
        capacity: slots per layer and head that it keeps.
        label: column of the results; null: made of method or patch.
    """

    recipe: str
    command: Literal["eval", "generate", "export"]
    name: str
    task: dict[str, Any]
    output: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    prompt_file: str | None = None
    checkpoint: str | None = None
    dry_run: bool = False
    scale: str = "full"
    sizes: str = ""
    seed: int = 0
    vocabulary: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] | None = None
    module: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    patch: dict[str, Any] | None = None
    documents: str | list[str] | None = None
    lengths: list[int] = field(default_factory=list)
    degrees: list[int] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    selections: list[str] = field(default_factory=list)
    keep_tail: int = 1024
    unsplit: int = 1
    max_documents: int = 50
    tasks: list[str] = field(default_factory=list)
    method: str | None = None
    capacity: int | None = None
    label: str | None = None
