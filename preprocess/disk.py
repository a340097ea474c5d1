"""A disk that is full or closed, as one sentence, whichever library meets it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")


@contextmanager
def full_disk_named(output: Path, *, keeps: Path | None = None) -> Iterator[None]:
    """Say of a full disk what could not be made, and what is not lost.

    Args:
        output: what is being made.
        keeps: the folder whose content the next run takes up, None if it begins anew.

    Raises:
        OSError: instead of the error of the file system, which names no file, or of a library, which has its own kind.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in FULL_DISK:
            kept = "" if keeps is None else f"{keeps} keeps what is done; "
            raise OSError(f"no space left for {output}: {kept}make room and run this again") from error
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(number, os.strerror(number), str(output)) from error


def _error_number(error: Exception) -> int | None:
    """Return the number that the system gave an error; tokenizers, safetensors and shutil have it in their text."""
    if isinstance(error, ValueError) or (isinstance(error, OSError) and not isinstance(error, shutil.Error)):
        return error.errno if isinstance(error, OSError) else None
    found = _NUMBER.search(str(error))
    return int(found[1] or found[2]) if found else None
