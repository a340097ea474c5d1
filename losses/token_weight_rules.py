"""What a `TokenWeighting` may hold: transforms as text, ranges of the numbers, combinations that make sense."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

COMPARISONS = ("difference", "quotient")
NORMALIZATIONS = (None, "L1", "softmax")
ZERO_FILLS = ("none", "random")
PLAIN_TRANSFORMS = ("absolute", "minus", "exp", "max")
_SHIFT = re.compile(r"shift ((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


def shift_of(transform: str) -> float | None:
    """Return x of ``"shift x"``, None for another text or an x that is not finite and positive."""
    match = _SHIFT.fullmatch(transform)
    x = float(match[1]) if match else 0.0
    return x if 0 < x < math.inf else None


def canonical_transforms(transforms: Any) -> tuple[Any, ...]:
    """Return transforms as a tuple in which equal shifts are written alike (``"shift 2.0"`` as ``"shift 2"``).

    Raises:
        ValueError: it is not a list of transforms.
    """
    if isinstance(transforms, str) or not isinstance(transforms, Iterable):
        raise ValueError(f'transforms must be a list such as ["absolute"], got {transforms!r}')
    return tuple(_canonical(transform) for transform in transforms)


def _canonical(transform: Any) -> Any:
    x = shift_of(transform) if isinstance(transform, str) else None
    if x is None:
        return transform
    return f"shift {int(x) if x.is_integer() else x!r}"


def can_be_negative(compare: str, transforms: Sequence[str]) -> bool:
    """Tell whether any pair of losses can leave a negative score.

    A difference starts with both signs, a quotient without the negative one. ``absolute``, ``exp`` and ``max`` leave
    no negative score, ``minus`` exchanges the signs, ``shift`` gives both.
    """
    negative, positive = compare == "difference", True
    for transform in transforms:
        if transform == "minus":
            negative, positive = positive, negative
        else:
            negative, positive = transform.startswith("shift"), True
    return negative


def find_problems(weighting: Any) -> list[str]:
    """Return one sentence for every rule a weighting breaks, each with the names of the fields it is about."""
    problems = _bad_choices(weighting) + _bad_numbers(weighting) + _idle_options(weighting)
    transforms_known = not any(text.startswith(("transforms", "compare")) for text in problems)
    if transforms_known and can_be_negative(weighting.compare, weighting.transforms):
        problems += _negative_scores(weighting)
    return problems


def _bad_choices(weighting: Any) -> list[str]:
    problems = [
        f"{name} must be one of {', '.join(map(repr, options))}, got {getattr(weighting, name)!r}"
        for name, options in (
            ("compare", COMPARISONS),
            ("normalization", NORMALIZATIONS),
            ("zero_fill", ZERO_FILLS),
            ("parity", (False, True)),
        )
        if getattr(weighting, name) not in options
    ]
    for transform in weighting.transforms:
        if transform not in PLAIN_TRANSFORMS and (not isinstance(transform, str) or shift_of(transform) is None):
            names = ", ".join(map(repr, PLAIN_TRANSFORMS))
            problems.append(f"transforms may hold {names} and 'shift x' with a number x > 0, got {transform!r}")
    return problems


def _bad_numbers(weighting: Any) -> list[str]:
    truncation, sparsity, interpolation = weighting.truncation, weighting.sparsity, weighting.interpolation
    problems = []
    if truncation is not None and not (_is_finite(truncation) and truncation > 0):
        problems.append(f"truncation must be a finite number above 0 or None, got {truncation!r}")
    if sparsity is not None and not (_is_finite(sparsity) and 0 < sparsity <= 1):
        problems.append(f"sparsity, the share that is kept, must lie in (0, 1] or be None, got {sparsity!r}")
    if interpolation is not None and not (_is_finite(interpolation) and 0 <= interpolation <= 1):
        problems.append(f"interpolation must lie in [0, 1] or be None, got {interpolation!r}")
    return problems


def _idle_options(weighting: Any) -> list[str]:
    """Options that would have no effect, or none that can be reproduced."""
    problems = []
    if weighting.interpolation is not None and weighting.normalization is None:
        problems.append("interpolation needs weights of mean 1: set normalization to 'L1' or 'softmax', got None")
    if weighting.sparsity is not None and weighting.normalization == "softmax":
        problems.append("sparsity leaves zeros and ones, which normalization='softmax' would blur; use 'L1'")
    if weighting.zero_fill == "random" and weighting.sparsity is None:
        problems.append("zero_fill='random' fills the mask that sparsity makes; set sparsity, got None")
    if weighting.parity and weighting.sparsity is not None and weighting.zero_fill == "none":
        problems.append("parity with sparsity reproduces a random filling; set zero_fill='random', got 'none'")
    return problems


def _negative_scores(weighting: Any) -> list[str]:
    problems, end = [], "end them with 'absolute', 'exp' or 'max'"
    if weighting.normalization in (None, "L1"):
        problems.append(
            f"transforms={weighting.transforms!r} can leave negative scores, which normalization="
            f"{weighting.normalization!r} cannot turn into weights; {end}, or use 'softmax'"
        )
    if weighting.sparsity is not None:
        problems.append(
            f"transforms={weighting.transforms!r} can leave negative scores, among which sparsity cannot choose; {end}"
        )
    return problems


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
