"""Where kernels keep what is costly to find out: the compiled library and the chosen tile sizes."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the folder of this user (``$XDG_CACHE_HOME/longhaul``), made if need be; None where none can be."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "longhaul"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or not ours to write
        return None
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; a place that refuses is left alone."""
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
