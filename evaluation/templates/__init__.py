"""Published prompts, lengths and flags of the tasks, as data; and how fields are put into a prompt."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")


@lru_cache
def load_templates(family: str) -> dict[str, Any]:
    """Return the templates of ``longbench``, ``infinitebench``, ``helmet`` or ``ruler``, not to be changed."""
    return json.loads((Path(__file__).parent / f"{family}.json").read_text(encoding="utf-8"))


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Put fields into a template in one pass: braces in the fields stay as they are, doubled ones become one.

    Raises:
        ValueError: a field is missing.
    """
    missing = [name for name in _FIELD.findall(template) if name and name not in fields]
    if missing:
        raise ValueError(f"the prompt needs {', '.join(missing)}; the record has {', '.join(fields) or 'nothing'}")
    return _FIELD.sub(lambda found: str(fields[found[1]]) if found[1] else found[0][0], template)


def cut(template: str) -> tuple[str, str]:
    """Return what stands before and after ``{context}``."""
    before, _, after = template.partition("{context}")
    return before, after
