"""The progress line of tokenising: documents, tokens, tokens per second."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG_SECONDS = 10.0
REFRESH_SECONDS = 0.1


class TokenizeProgress:
    """A live bar on a terminal, a line every ten seconds elsewhere; both on the error stream.

    Args:
        name: of the source.
        num_parts: files or splits the source has.
        counted: what is counted beside tokens.
    """

    def __init__(self, name: str, num_parts: int, *, counted: str = "documents"):
        self.name, self.num_parts, self.counted = name, num_parts, counted
        self.live = sys.stderr.isatty()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not self.live)
        self.task = self.bar.add_task(name, total=num_parts)
        self.started = self.shown = time.monotonic()
        self.first_tokens: int | None = None

    def __enter__(self) -> TokenizeProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, documents: int, tokens: int, parts: int) -> None:
        """Take the counts so far; ``parts`` is the number of parts that are done."""
        now = time.monotonic()
        if self.first_tokens is None:
            # What an earlier run had written does not count for the speed of this one.
            self.first_tokens, self.started = tokens, now
        if now - self.shown < (REFRESH_SECONDS if self.live else LOG_SECONDS):
            return
        self.shown = now
        line = f"{self.name}: {documents:,} {self.counted}, {tokens:,} tokens"
        if tokens > self.first_tokens:
            line += f", {(tokens - self.first_tokens) / max(now - self.started, 1e-9):,.0f} tokens/s"
        if self.live:
            self.bar.update(self.task, completed=parts, description=line)
        else:
            print(f"{line}, part {parts + 1} of {self.num_parts}", file=sys.stderr, flush=True)
