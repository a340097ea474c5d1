"""The progress line of scoring: shards, sequences, tokens per second."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 10.0


class ScoreProgress:
    """A live bar on a terminal, a line every ten seconds elsewhere; both on the error stream.

    Args:
        name: of the score folder.
    """

    def __init__(self, name: str):
        self.name = name
        self.live = sys.stderr.isatty()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self.live)
        self.task = self.bar.add_task(f"{name}: reading the model", total=None)
        self.sequences = self.tokens = self.total = 0
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> ScoreProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the sequences scored so far per second, loading the model not counted."""
        return self.tokens / max(time.monotonic() - self.started, 1e-9)

    def start(self, num_sequences: int) -> None:
        """Begin to count; the model is loaded."""
        self.total, self.started = num_sequences, time.monotonic()
        self.bar.update(self.task, total=num_sequences)

    def scored(self, num_tokens: int) -> None:
        """Count a sequence."""
        self.sequences, self.tokens = self.sequences + 1, self.tokens + num_tokens
        line = f"{self.name}: {self.sequences:,} of {self.total:,} sequences, {self.tokens_per_second:,.0f} tokens/s"
        if self.live:
            self.bar.update(self.task, completed=self.sequences, description=line)
        elif time.monotonic() - self.shown >= LOG_SECONDS:
            self.shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)
