"""How a command ends early: sentences on standard error and an exit status, never a traceback.

Status 2 is a user error, 128 + N a stop by signal N (130 Ctrl-C, 143 SIGTERM), as shells count them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from preprocess.command import print_anything

# Wrong input, and what the disk refuses: missing, existing or unreadable files, no space left.
USER_ERRORS = (ValueError, OSError)


class ConfigError(ValueError):
    """All problems found in a configuration, reported together."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class Stopped(Exception):
    """A signal ended the command in good order; the message says where it stands."""

    def __init__(self, sentence: str, number: signal.Signals):
        self.number = number
        super().__init__(sentence)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


@contextmanager
def exit_with_sentence(argv: Sequence[str]) -> Iterator[None]:
    """Print user errors and stops by a signal as sentences on standard error, and exit with their status.

    ``--traceback`` among the arguments lets the exception through, for developers.
    """
    print_anything()
    try:
        yield
    except (*USER_ERRORS, Stopped, KeyboardInterrupt) as error:
        if "--traceback" in argv:
            raise
        text, status = _ending(error)
        print(text, file=sys.stderr)
        raise SystemExit(status) from None


def _ending(error: BaseException) -> tuple[str, int]:
    if isinstance(error, Stopped):
        return str(error), 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 128 + signal.SIGINT
    # What libraries say may have several lines.
    problems = error.problems if isinstance(error, ConfigError) else [" ".join(str(error).split())]
    if len(problems) == 1:
        return f"error: {problems[0]}", 2
    return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)]), 2
