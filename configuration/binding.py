"""Bind the options of every ``_target_`` node to its signature and say what does not fit."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from configuration.errors import did_you_mean
from configuration.targets import RESERVED, import_target, is_target, signature_of

_SIMPLE = (bool, int, float, str)


def bind_all(node: Any, path: str = "") -> list[str]:
    """Problems of a composed node and everything below it, as sentences."""
    if isinstance(node, list):
        return [p for i, item in enumerate(node) for p in bind_all(item, f"{path}.{i}".lstrip("."))]
    if not isinstance(node, dict):
        return []
    below = [p for key, value in node.items() for p in bind_all(value, f"{path}.{key}".lstrip("."))]
    if not is_target(node):
        return below
    try:
        target = import_target(node["_target_"])
    except ValueError as error:
        return [f"{path}: {error}", *below]
    options = {key: value for key, value in node.items() if key not in RESERVED}
    return bind(target, options, path, partial=bool(node.get("_partial_"))) + below


def bind(target: Callable[..., Any], options: Mapping[str, Any], path: str = "", *, partial: bool = False) -> list[str]:
    """Problems of calling ``target(**options)``: unknown, missing and wrongly typed options.

    Args:
        target: function or class.
        options: keyword arguments as they stand in the recipe.
        path: dotted place of the node, for the sentences.
        partial: options may still be missing, as they are given later.
    """
    parameters = signature_of(target).parameters
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not _closed(target)
    prefix = f"{path}." if path else ""
    problems = []
    for name, value in options.items():
        if name in named:
            problems += _type_problem(f"{prefix}{name}", value, _annotation(target, named[name]))
        elif not open_ended:
            problems.append(f"unknown option '{prefix}{name}'{did_you_mean(name, list(named))}")
    required = [n for n, p in named.items() if p.default is inspect.Parameter.empty and n not in options]
    if not partial:
        problems += [f"{prefix}{name} is required: pass {prefix}{name}=VALUE" for name in required]
    return problems


def _closed(target: Callable[..., Any]) -> bool:
    """Whether ``**kwargs`` only passes on to a base class that takes no recipe options.

    Model configurations of this project name every option; what remains in ``**kwargs`` is transformers' own.
    """
    return inspect.isclass(target) and target.__module__.startswith("models.")


def _annotation(target: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    holder = target.__init__ if inspect.isclass(target) else target  # type: ignore[misc]
    try:
        return typing.get_type_hints(holder).get(parameter.name, Any)
    except (NameError, TypeError, AttributeError):
        return Any if isinstance(parameter.annotation, str) else parameter.annotation


def _type_problem(path: str, value: Any, annotation: Any) -> list[str]:
    if is_target(value) or fits(value, annotation):
        return []
    if value is None:
        return [f"{path} is required: pass {path}=VALUE"]
    return [f"{path} must be {_spell(annotation)}, got {value!r}"]


def fits(value: Any, annotation: Any) -> bool:
    """Whether a recipe value fits a type annotation; annotations a recipe cannot express always fit."""
    if annotation in (Any, inspect.Parameter.empty, object) or isinstance(annotation, str | typing.TypeVar):
        return True
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if annotation in (None, type(None)):
        return value is None
    if value is None:
        return False
    if annotation in _SIMPLE:
        return _fits_simple(value, annotation)
    if annotation is Path:
        return isinstance(value, str)
    if origin is tuple and Ellipsis not in arguments:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin in (list, tuple, Sequence) or annotation in (list, tuple):
        return isinstance(value, list) and all(fits(v, arguments[0]) for v in value if arguments)
    if origin in (dict, Mapping) or annotation is dict:
        return isinstance(value, dict)
    return not isinstance(value, _SIMPLE) or origin is not None or not inspect.isclass(annotation)


def _fits_simple(value: Any, annotation: type) -> bool:
    if annotation is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if annotation is float:
        return isinstance(value, int | float)
    return isinstance(value, annotation)


def _spell(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_spell(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if annotation is type(None):
        return "null"
    if origin is not None:
        return str(annotation).replace("collections.abc.", "").replace("typing.", "")
    return str(getattr(annotation, "__name__", annotation))
