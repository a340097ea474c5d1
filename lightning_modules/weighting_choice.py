"""A token weighting as recipes and users write it down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losses.token_weights import TokenWeighting


def as_weighting(given: TokenWeighting | Mapping[str, Any] | str) -> TokenWeighting:
    """A `TokenWeighting` from itself, its fields (with ``preset`` for those of a preset), or a preset's name.

    Raises:
        ValueError: a field or a preset that does not exist, or fields that contradict each other.
    """
    if isinstance(given, TokenWeighting):
        return given
    fields = {"preset": given} if isinstance(given, str) else dict(given)
    if "preset" in fields:
        return TokenWeighting.preset(fields.pop("preset"), **fields)
    try:
        return TokenWeighting(**fields)
    except TypeError as error:
        raise ValueError(f"weighting={fields}: {error}") from error
