"""The precision that a run states."""

from __future__ import annotations

from typing import Any


def precision_of(trainer: dict[str, Any]) -> str:
    """The precision of a trainer, which a plugin may state for it."""
    plugins = [plugin.get("precision") for plugin in trainer.get("plugins") or [] if isinstance(plugin, dict)]
    return str(trainer.get("precision") or next((name for name in plugins if name), "32-true"))
