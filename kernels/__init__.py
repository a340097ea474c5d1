"""Tensor operations: one folder each, with the plain version (`reference.py`) beside the fast ones.

Notable: this folder shares its name with Hugging Face's `kernels` distribution, which `transformers` imports when it is
installed. From a checkout ours is found first, so an installed one is let through below: its folder joins our
`__path__` (submodules) and its `__init__` runs in this namespace (names). Our own submodules still come first, and
with nothing installed nothing happens: `transformers` then sees a package without a version and leaves it alone.
"""

import os as _os
import sys as _sys
from importlib.machinery import PathFinder as _PathFinder

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
_elsewhere = [path for path in _sys.path if _os.path.realpath(path) != _os.path.realpath(_root)]
_installed = _PathFinder.find_spec(__name__, _elsewhere)
if _installed is not None and _installed.origin is not None and _installed.submodule_search_locations:
    __path__.extend(_installed.submodule_search_locations)
    with open(_installed.origin, encoding="utf-8") as _source:
        exec(compile(_source.read(), _installed.origin, "exec"))
