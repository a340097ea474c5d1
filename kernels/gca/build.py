"""Compile `native.c` at first use, keep the library in the user's cache, and load it.

Notable: a library is named after what it was made of (source, compiler, options, processor) and after its own hash, so
a stale or damaged file is never loaded. Nothing here raises: without a compiler there is no library.
"""

import ctypes
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from kernels.gca.cache import cache_folder, write_atomically

SOURCE = Path(__file__).with_name("native.c")
OPTIONS = ["-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC"]


class Problem(ctypes.Structure):
    """The arguments that `native.c` calls Problem."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("entries", "top_k", "rows", "keys", "dim")),
        ("scale", ctypes.c_float),
        ("off_by_one", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("chunks", "slots", "lengths", "weights", "scratch")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None where they cannot be built."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _declare(ctypes.CDLL(str(_compiled(compiler, Path(folder)))))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).info("native.c is not used: %s", error)
        return None


def _compiled(compiler: str, folder: Path) -> Path:
    """Return a library file from the cache, or compile one into ``folder`` and keep a copy."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    parts = [SOURCE.read_bytes(), version, " ".join(OPTIONS).encode(), _processor()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = cache_folder()
    for path in [] if cache is None else sorted(cache.glob(f"gca-{key}-*.so")):
        if path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()[:16]):
            return path
    target = folder / "gca.so"
    command = [compiler, *OPTIONS, str(SOURCE), "-o", str(target), "-lm"]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    if cache is not None:
        content = target.read_bytes()
        write_atomically(cache / f"gca-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so", content)
    return target


def _processor() -> bytes:
    """Name the instruction set: a library made for one processor may be illegal on another."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model name"))}))
    except OSError:
        return platform.processor().encode()


def _declare(functions: ctypes.CDLL) -> ctypes.CDLL:
    problem = ctypes.POINTER(Problem)
    functions.gca_scratch.argtypes, functions.gca_scratch.restype = [problem], ctypes.c_int64
    functions.gca_forward.argtypes, functions.gca_forward.restype = [problem] + [ctypes.c_void_p] * 6, None
    functions.gca_backward.argtypes, functions.gca_backward.restype = [problem] + [ctypes.c_void_p] * 7, None
    return functions
