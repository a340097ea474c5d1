"""Options of a recipe as plain values that tell them apart."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from evaluation.results import model_identity


def described_option(option: Any) -> Any:
    """Return plain values that tell an option of a recipe apart; of a model folder, those of its content."""
    if isinstance(option, functools.partial):
        words = {name: described_option(value) for name, value in sorted(option.keywords.items())}
        if isinstance(words.get("path"), str) and (Path(words["path"]) / "config.json").is_file():
            words["path"] = model_identity(Path(words["path"]))
        target = getattr(option.func, "__qualname__", repr(option.func))
        return {"target": target, **words}
    if dataclasses.is_dataclass(option) and not isinstance(option, type):
        return {name: described_option(value) for name, value in dataclasses.asdict(option).items()}
    if isinstance(option, dict):
        return {str(name): described_option(value) for name, value in option.items()}
    if isinstance(option, list | tuple):
        return [described_option(value) for value in option]
    if option is None or isinstance(option, bool | int | float | str):
        return option
    to_dict = getattr(option, "to_dict", None)
    return described_option(to_dict()) if callable(to_dict) else type(option).__qualname__
