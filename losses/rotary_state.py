"""Rotary embeddings whose frequencies depend on the length of the text.

Notable: transformers keeps the frequencies of the longest text seen so far ("dynamic"). A short window that follows a
long text would be read with those; here it is read as if it were the first.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_LENGTH_CACHE = "max_seq_len_cached"


def rotary_depends_on_length(model: nn.Module) -> bool:
    """Tell whether texts of different length are turned by different frequencies."""
    return any(_kinds(module) & {"dynamic", "longrope"} for module in model.modules())


@contextlib.contextmanager
def fresh_rotary(model: nn.Module) -> Iterator[None]:
    """Make every dynamic rotary embedding choose its frequencies anew; put back what was there before."""
    modules = [module for module in model.modules() if "dynamic" in _kinds(module)]
    kept = [_state(module) for module in modules]
    try:
        for module, state in zip(modules, kept, strict=True):
            for name in state:
                if name.endswith(_LENGTH_CACHE):
                    setattr(module, name, 0)
        yield
    finally:
        for module, state in zip(modules, kept, strict=True):
            for name, value in state.items():
                setattr(module, name, value)


def _kinds(module: nn.Module) -> set[str]:
    """Return the rotary types of a module; models with several kinds of layers keep one for each kind."""
    kind = getattr(module, "rope_type", None)
    return set(map(str, kind.values())) if isinstance(kind, Mapping) else {str(kind)}


def _state(module: nn.Module) -> dict[str, Any]:
    plain = {
        name: value
        for name, value in vars(module).items()
        if name.endswith(_LENGTH_CACHE) or name.endswith("attention_scaling")
    }
    return plain | {name: value for name, value in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
