"""What a pickle would import, found out without running it."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import IO

_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
_KEEP = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
_RECALL = ("GET", "BINGET", "LONG_BINGET")
UNREADABLE = "a name that is put together"


def imported_names(file: IO[bytes]) -> Iterator[str]:
    """Names ``module.name`` that a pickle imports; `UNREADABLE` for one that does not stand there plainly.

    A name of the newer protocols is two strings right before the instruction that imports it, each of them written
    out or recalled from the memo; anything else in their place could hide what is imported.
    """
    memo: dict[int, str | None] = {}
    strings: list[str | None] = []
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".", 1)
        if name == "STACK_GLOBAL":
            plain = len(strings) > 1 and None not in strings[-2:]
            yield f"{strings[-2]}.{strings[-1]}" if plain else UNREADABLE
        if name in ("EXT1", "EXT2", "EXT4"):
            yield UNREADABLE
        if name in _KEEP:
            memo[len(memo) if argument is None else int(str(argument))] = strings[-1] if strings else None
        elif name in _STRINGS:
            strings.append(str(argument))
        elif name in _RECALL:
            strings.append(memo.get(int(str(argument))))
        else:
            strings = []
