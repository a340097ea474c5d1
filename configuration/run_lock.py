"""One run at a time in an output folder, and sentences for what ends several processes at once."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".lock"
_LOST_CONTACT = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote process exited"
    r"|nccl (error|communicator)|\[gloo\]",
    re.IGNORECASE,
)


@contextmanager
def only_run_in(folder: Path, *, first: bool) -> Iterator[None]:
    """Hold the lock of a folder; the system takes it back from a process that dies.

    Args:
        folder: of the run, made if it is absent.
        first: whether this is the process that writes; the others hold nothing.

    Raises:
        FileExistsError: another process holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # not on this system
        fcntl = None  # type: ignore[assignment]
    if not first or fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Not flock, which workers of data loaders would inherit and outlive their parent with.
    with (folder / _LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise FileExistsError(
                f"another run is writing to {folder} (process {file.read().strip()}): "
                "wait for it, or pass another output="
            ) from None
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextmanager
def naming_lost_processes(several: bool) -> Iterator[None]:
    """Say in one sentence that another process of the run has gone.

    Raises:
        ConnectionError: instead of what the library for their exchange says.
    """
    try:
        yield
    except RuntimeError as error:
        if not several or not _LOST_CONTACT.search(str(error)):
            raise
        raise ConnectionError(
            "another process of this run has died or does not answer: look at what it printed; the same command "
            f"resumes from the last checkpoint ({str(error).splitlines()[0][:200]})"
        ) from error
