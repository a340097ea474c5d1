"""A progress bar in tokens, with tokens per second and the time left, on the error stream."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Tokens per second over the last while."""

    def render(self, task: Task) -> Text:
        """Return the rate, or a dash before there is one."""
        rate = task.finished_speed or task.speed
        return Text("- tok/s" if rate is None else f"{rate:,.0f} tok/s")


class TokenProgress:
    """A bar; entering gives the function that advances it.

    Args:
        label: what is going on.
        total: tokens in all.
        show: whether anything is shown.
    """

    def __init__(self, label: str, total: int, *, show: bool):
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), RateColumn())
        times = (TimeElapsedColumn(), TimeRemainingColumn(compact=True))
        console = Console(stderr=True)
        # Elsewhere than on a terminal nothing is drawn, but an empty line is left.
        disable = not (show and console.is_terminal)
        self._bar = Progress(*columns, *times, console=console, transient=True, disable=disable)
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> TokenProgress:
        self._bar.start()
        return self

    def __call__(self, tokens: int) -> None:
        """Advance by so many tokens."""
        self._bar.advance(self._task, tokens)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
