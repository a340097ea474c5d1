"""The one flow of ``eval.py``, ``generate.py`` and ``export.py``: compose, check, build the task, run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configuration.compose import compose
from configuration.errors import ConfigError
from configuration.help import help_text, wants_help
from configuration.targets import build


def run_task(
    arguments: Sequence[str], say: Callable[[str], None], *, command: str, default_recipe: str | None = None
) -> dict[str, Any] | None:
    """Run the task of a recipe; return its result, or None for ``--help`` and ``dry_run=true``, which ``say`` answers.

    Raises:
        ConfigError: with all problems of the command line and the recipe.
    """
    if wants_help(arguments):
        say(help_text(command))
        return None
    config = compose(arguments, command=command, default_recipe=default_recipe)
    # Later imports are slow; a mistyped recipe should not wait for them.
    from configuration.check import check

    check(config)
    import models  # noqa: F401 - registers the suite's models with transformers' Auto classes
    from configuration.quiet import quiet
    from configuration.run_folder import write_start
    from evaluation.processes import Process
    from preprocess.disk import full_disk_named

    quiet()
    task = build(config["task"])
    if config.get("dry_run"):
        say(f"recipe={config['recipe']} composes, checks and builds")
        return None
    process = Process.current()
    if process.world_size > 1 and not hasattr(task, "process"):  # tasks that share their work hold theirs
        raise ConfigError(
            [f"recipe={config['recipe']} works in one process, {process.world_size} were started: leave torchrun out"]
        )
    output = config.get("output")
    if command == "eval" and not output:
        raise ConfigError(["output is required: pass output=FOLDER for the metrics and figures"])
    folder = Path(output or ".")
    with full_disk_named(folder):
        if output and command != "export" and process.is_first:  # an export's folder is a model
            write_start(folder, config)
        return task.run(Path(output) if output else None)
