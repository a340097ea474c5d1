"""Long-context tasks by name: ``get_task("longbench/hotpotqa")``, ``"infinitebench/passkey"``, ``"ruler/vt"``, ..."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from evaluation.tasks import demonstrations, helmet, infinitebench, longbench, ruler
from evaluation.tasks.base import Example, Task

__all__ = ["FAMILIES", "Example", "Task", "get_task", "task_names"]


def _helmet_task(name: str) -> Task:
    return demonstrations.DemonstrationTask(name) if name in demonstrations.NAMES else helmet.file_task(name)


FAMILIES: dict[str, tuple[tuple[str, ...], Callable[[str], Task]]] = {
    "longbench": (longbench.NAMES, longbench.LongBenchTask),
    "longbench_parallelcomp": (longbench.NAMES, partial(longbench.LongBenchTask, parallelcomp=True)),
    "infinitebench": (infinitebench.NAMES, infinitebench.InfiniteBenchTask),
    "infinitebench_parallelcomp": (infinitebench.NAMES, partial(infinitebench.InfiniteBenchTask, parallelcomp=True)),
    "helmet": ((*helmet.NAMES, *demonstrations.NAMES), _helmet_task),
    "ruler": (ruler.NAMES, ruler.RulerTask),
}


def task_names(family: str | None = None) -> list[str]:
    """Return the names of all tasks, or of those of a family."""
    return [f"{name}/{part}" for name, (parts, _) in FAMILIES.items() if family in (None, name) for part in parts]


def get_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: there is none of that name.
    """
    family, _, part = name.partition("/")
    if family in FAMILIES and part in FAMILIES[family][0]:
        return FAMILIES[family][1](part)
    near = get_close_matches(name, task_names(), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    known = ", ".join(FAMILIES[family][0]) if family in FAMILIES else f"FAMILY/SET, families {', '.join(FAMILIES)}"
    raise ValueError(f"unknown task {name!r}{hint}; tasks: {known}")
