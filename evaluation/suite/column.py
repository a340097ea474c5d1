"""A column of the table: the method by which a model reads contexts, under its label."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from patches.parallel_context import ParallelContext, baseline


@dataclass(frozen=True)
class Baseline:
    """A published baseline by name (`patches.parallel_context.baseline`), or none.

    Attributes:
        method: its name; None: none.
        capacity: slots per layer and head that it keeps.
        degree: windows, of baselines that have some.
        max_piece_tokens: their greatest size, instead of the number.

    Raises:
        ValueError: a number without a method.
    """

    method: str | None = None
    capacity: int | None = None
    degree: int | None = None
    max_piece_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, number in self.numbers.items():
            if self.method is None and number is not None:
                fitting = "snapkv" if self.capacity else "pcw"
                raise ValueError(f"{name} belongs to a method: pass method={fitting}, say")

    @property
    def numbers(self) -> dict[str, int | None]:
        """Its numbers by name."""
        return {"capacity": self.capacity, "degree": self.degree, "max_piece_tokens": self.max_piece_tokens}


@dataclass(frozen=True)
class Column:
    """How contexts are read, and what that is called.

    Attributes:
        label: name of the column, and of its folder.
        patch: how the model reads contexts; None: as it is.
        task_patches: options of the patch that single tasks change, ``{"passkey": {"piece_policy.keep": 1}}``.
    """

    label: str
    patch: ParallelContext | None
    task_patches: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        patch: ParallelContext | None,
        method: Baseline,
        *,
        label: str | None = None,
        rope: Mapping[str, Any] | None = None,
        task_patches: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Column:
        """Return the column of a patch, of a baseline, or of the model as it is.

        Raises:
            ValueError: both a patch and a baseline, changes of a patch that is not there, or a label that is no name.
        """
        if patch is not None and method.method is not None:
            raise ValueError(f"method={method.method} is a patch of its own: pass patch=none, or leave method out")
        name = method.method or ("plain" if patch is None else "parallel_context")
        if method.method is not None:
            patch = baseline(method.method, **method.numbers)  # type: ignore[arg-type]
        changes = dict(task_patches or {})
        if patch is None and changes:
            raise ValueError("task_patches change a patch, but there is none: pass patch=NAME")
        for options in changes.values():
            changed_patch(patch, options)
        return cls(_label(label, name, method.numbers, rope), patch, changes)

    def patch_of(self, set_name: str) -> ParallelContext | None:
        """Return the patch of a task."""
        return changed_patch(self.patch, self.task_patches.get(set_name, {}))


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


def _label(label: str | None, first: str, numbers: Mapping[str, int | None], rope: Mapping[str, Any] | None) -> str:
    """Return the name of the column: ``label``, or method, its numbers and the rotary type."""
    if label is None:
        given = {"capacity": "", "degree": "degree", "max_piece_tokens": ""}
        parts = [f"{given[name]}{number}" for name, number in numbers.items() if number is not None]
        label = "_".join([first, *parts, *([f"{rope['rope_type']}{rope['factor']:g}"] if rope else [])])
    if not re.fullmatch(r"[A-Za-z0-9._+-]+", label) or label.startswith("."):
        raise ValueError(f"label names a folder: letters, digits, . _ + -, got {label!r}")
    return label
