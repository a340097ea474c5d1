"""``_target_`` nodes: import them (from a short list of packages), bind their options, build them."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

PACKAGES = (
    "callbacks",
    "configuration",
    "datamodules",
    "evaluation",
    "kernels",
    "lightning",
    "lightning_modules",
    "losses",
    "models",
    "patches",
    "peft",
    "preprocess",
    "torch",
    "transformers",
)
RESERVED = ("_target_", "_partial_")


def import_target(path: str) -> Callable[..., Any]:
    """Import ``package.module.Name`` or ``package.module.Class.method``.

    Raises:
        ValueError: the package is not one a recipe may name, or the name does not exist.
    """
    if path.split(".")[0] not in PACKAGES:
        raise ValueError(f"_target_ {path!r} is outside the packages a recipe may name: {', '.join(PACKAGES)}")
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A missing optional package inside the module is another matter than a wrong path.
            if error.name and not (module_name + ".").startswith(error.name + "."):
                raise ValueError(
                    f"_target_ {path!r} needs the package {error.name!r}, which is not installed"
                ) from None
            continue
        try:
            for name in parts[cut:]:
                found = getattr(found, name)
        except AttributeError:
            break
        if not callable(found):
            raise ValueError(f"_target_ {path!r} is not callable")
        return found
    raise ValueError(f"_target_ {path!r} does not exist")


def is_target(node: Any) -> bool:
    """Whether a composed node describes an object to build."""
    return isinstance(node, dict) and "_target_" in node


def signature_of(target: Callable[..., Any]) -> inspect.Signature:
    """Signature of a target as it is called (a class through its constructor).

    ``lightning.pytorch.Trainer`` and the like hide theirs behind ``functools.wraps``, which this follows.
    """
    return inspect.signature(target)


def named_parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a target that a recipe can set by name, without ``*args`` and ``**kwargs``."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in signature_of(target).parameters.items() if p.kind not in variadic}


def build(node: Any, path: str = "") -> Any:
    """Build an object from a composed node: nested targets first, ``_partial_`` as ``functools.partial``.

    Nodes without ``_target_`` come back as plain dicts, lists and values.

    Args:
        node: section of a composed recipe.
        path: its dotted place, for the sentences.

    Raises:
        ValueError: a constructor refuses its options, in whatever way its library refuses.
        OSError: a file that it needs is not there.
    """
    prefix = f"{path}." if path else ""
    if isinstance(node, list):
        return [build(item, f"{prefix}{index}") for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    options = {key: build(value, prefix + key) for key, value in node.items() if key not in RESERVED}
    if not is_target(node):
        return options
    target = import_target(node["_target_"])
    if node.get("_partial_"):
        return functools.partial(target, **options)
    try:
        return target(**options)
    except OSError:
        raise
    except Exception as error:
        # A function may do work, whose errors are its own; a constructor has only its options to complain about.
        if not inspect.isclass(target) and not isinstance(error, ValueError):
            raise
        sentence = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {sentence}" if path else sentence) from error
