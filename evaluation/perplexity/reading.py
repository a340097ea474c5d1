"""How a token stream is read: cut into windows, grouped into batches; what a report says of it.

Notable: each target appears exactly once, whatever the window and the stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Window = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a stream is read.

    Attributes:
        window: inputs per window, the BOS included.
        stride: distance of the windows' starts; None (or ``window``) means windows that do not overlap. With a BOS a
            window holds ``window - 1`` text tokens, and that is the largest stride in effect.
        bos_token_id: put before every window; then token 0 of the stream is a target, too.
        batch_size: windows per forward.
        max_windows: stop after so many windows.
        max_tokens: read only the first so many tokens of the stream.
        segment_length: windows longer than this go through the model's cache in pieces of so many tokens; None: one
            forward per window. A model without a cache reads every window in one forward.
        parity: ``"published"`` adds ``published_mean_loss``, the mean over non-overlapping windows of the windows'
            mean losses (nats), the first token of each window unscored; a shorter last window counts as much as the
            others. Published scripts print it under the name of perplexity, which it is not.

    Raises:
        ValueError: a count below 1, or a parity with other windows.
    """

    window: int
    stride: int | None = None
    bos_token_id: int | None = None
    batch_size: int = 1
    max_windows: int | None = None
    max_tokens: int | None = None
    segment_length: int | None = None
    parity: Literal["published"] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_windows", "max_tokens", "segment_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.parity not in (None, "published"):
            raise ValueError(f'parity must be "published" or None, got {self.parity!r}')
        if self.parity is not None and (self.bos_token_id is not None or self.stride_in_effect != self.window):
            raise ValueError('parity="published" means windows that do not overlap and no BOS; leave both options out')

    @property
    def stride_in_effect(self) -> int:
        """Distance of the windows' starts; a BOS takes one place of every window."""
        if self.stride is not None and self.stride != self.window:
            return self.stride
        return self.window - (self.bos_token_id is not None)

    def windows(self, num_tokens: int) -> list[Window]:
        """Return the windows of a stream of so many tokens.

        Raises:
            ValueError: too few tokens, or sizes that cannot be.
        """
        if num_tokens < 2:
            raise ValueError(f"at least 2 tokens are needed (one and its successor), got {num_tokens}")
        if self.bos_token_id is None:
            return evaluation_windows(num_tokens, self.window, self.stride)[: self.max_windows]
        if self.window < 2:
            raise ValueError(f"a window with a BOS needs room for one more token, got window {self.window}")
        (start, stop, _), *rest = evaluation_windows(num_tokens, self.window - 1, self.stride_in_effect)
        return [(start, stop, 0), *rest][: self.max_windows]

    def batches(self, num_tokens: int) -> list[list[Window]]:
        """Return the windows of a stream by batches."""
        return list(window_batches(self.windows(num_tokens), self.batch_size))

    def protocol(self) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "window": self.window,
            "stride": self.stride_in_effect,
            "bos_token_id": self.bos_token_id,
            "segment_length": self.segment_length,
        }


def evaluation_windows(num_tokens: int, window: int, stride: int | None = None) -> list[Window]:
    """Cut a stream into (start, stop, first_target): inputs ``x[start:stop]``, targets ``first_target..stop``.

    Target t is predicted at t - 1. ``start`` is 0, stride, 2 stride, ...; ``stop = min(start + window, n - 1)``;
    ``first_target`` is one past the previous ``stop`` (the first: 1). Each target 1..n-1 appears exactly once.

    Args:
        num_tokens: n; fewer than 2 tokens have no target and give no window.
        window: inputs per window.
        stride: distance of the starts, at most ``window``; None is ``window`` (no overlap).

    Raises:
        ValueError: ``window`` is below 1 or ``stride`` not in 1..window.
    """
    stride = window if stride is None else stride
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not 0 < stride <= window:
        raise ValueError(f"stride must lie between 1 and the window of {window}, got {stride}")
    windows: list[Window] = []
    start, stop = 0, 0
    while stop < num_tokens - 1:
        first_target = stop + 1
        stop = min(start + window, num_tokens - 1)
        windows.append((start, stop, first_target))
        start += stride
    return windows


def window_batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Group neighbouring windows of one shape (inputs and scored targets) into batches."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == batch_size or shape_of(window) != shape_of(batch[0])):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def shape_of(window: Window) -> tuple[int, int]:
    """Return how many tokens of the stream a window reads, and how many targets it scores."""
    start, stop, first_target = window
    return stop - start, stop - first_target + 1
