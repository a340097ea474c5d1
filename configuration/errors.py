"""How a command tells its user what is wrong: one list of sentences, exit status 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

# Wrong input, and what the disk refuses: missing, existing or unreadable files, no space left.
USER_ERRORS = (ValueError, OSError)


class ConfigError(ValueError):
    """All problems found in a configuration, reported together."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""


@contextmanager
def user_errors_exit_2(argv: Sequence[str]) -> Iterator[None]:
    """Print user errors as sentences on standard error and exit with status 2.

    ``--traceback`` among the arguments lets the exception through, for developers.
    """
    try:
        yield
    except USER_ERRORS as error:
        if "--traceback" in argv:
            raise
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        head = "error:" if len(problems) == 1 else f"{len(problems)} problems:"
        lines = [head + " " + problems[0]] if len(problems) == 1 else [head, *(f"  - {p}" for p in problems)]
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(2) from None
