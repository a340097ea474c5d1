"""Windows of short context over a sequence: which tokens are fed, and which targets of them are scored.

Legend: C tokens of the sequence, B tokens of a window (``base_length``), s their distance (``base_stride``).
"""

from typing import Literal, NamedTuple, get_args

Tail = Literal["align", "short", "strict"]


class Window(NamedTuple):
    """Tokens ``[start, end)`` are fed; the targets at positions ``[first_target, end)`` are scored."""

    start: int
    first_target: int
    end: int


def plan_windows(num_tokens: int, base_length: int, base_stride: int, tail: Tail = "align") -> list[Window]:
    """Cover the targets ``1 .. C - 1`` of a sequence once, each beyond the first window with B - s .. B - 1 tokens.

    Window j starts at j s and ends at j s + B; its first target is the end of the one before.

    Args:
        num_tokens: C.
        base_length: B; with C <= B there is one window.
        base_stride: s, in 1 .. B - 1.
        tail: where s does not divide C - B: ``"align"`` moves the last window back, ``"short"`` cuts it off at C,
            ``"strict"`` refuses.

    Raises:
        ValueError: sizes without windows, an unknown tail, or ``"strict"`` with a remainder.
    """
    if num_tokens < 2:
        raise ValueError(f"num_tokens must be at least 2 (a token and its target), got {num_tokens}")
    if base_length < 2:
        raise ValueError(f"base_length must be at least 2 (a token and its target), got {base_length}")
    if not 1 <= base_stride <= base_length - 1:
        raise ValueError(
            f"base_stride must lie between 1 and base_length - 1 = {base_length - 1}, got {base_stride}; "
            "every target needs a token before it"
        )
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}, got {tail!r}")
    remainder = (num_tokens - base_length) % base_stride if num_tokens > base_length else 0
    if tail == "strict" and remainder:
        raise ValueError(
            f"base_stride {base_stride} leaves a remainder of {remainder} tokens of {num_tokens} after windows of "
            f"{base_length}; choose a divisor of {num_tokens - base_length}, or tail='align'"
        )
    windows = [Window(0, 1, min(base_length, num_tokens))]
    while (reached := windows[-1].end) < num_tokens:
        start = len(windows) * base_stride
        end = min(start + base_length, num_tokens)
        windows.append(Window(end - base_length if tail == "align" else start, reached, end))
    return windows
