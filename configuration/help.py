"""``--help`` of the four commands: the recipes with their purpose, the groups, the common options."""

from __future__ import annotations

from collections.abc import Sequence

from configuration.compose import group_choices, recipe_names, recipe_purpose


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for help."""
    return any(argument in ("-h", "--help", "help") for argument in arguments)


def help_text(command: str) -> str:
    """The help page of a command."""
    names = recipe_names(command)
    width = max(len(name) for name in names)
    recipes = "\n".join(f"  {name:<{width}}  {recipe_purpose(name)}" for name in names)
    # A scale chooses the sizes.
    chosen = {group: choices for group, choices in group_choices().items() if group != "sizes"}
    groups = "\n".join(f"  {group}={'|'.join(choices)}" for group, choices in chosen.items())
    options = {
        "train": "  output=FOLDER  resume=auto|PATH|false  dry_run=true  seed=N  trainer.max_steps=N  data.path=FOLDER",
        "eval": "  model.path=FOLDER  data.path=FOLDER  output=FOLDER  dry_run=true",
        "generate": "  model.path=FOLDER  prompt='TEXT'  prompt_file=PATH  task.max_new_tokens=N  dry_run=true\n"
        "  documents=[FILE,...]  patch=none|parallel_context|...",
        "export": "  checkpoint=RUN_FOLDER_OR_CKPT  output=FOLDER  dry_run=true",
    }[command]
    shown = f"\nChoices:\n{groups}\n" if command == "train" else ""
    return (
        f"python {command}.py recipe=NAME [key=value ...]\n\nRecipes:\n{recipes}\n{shown}\n"
        f"Common options (any key of the recipe can be set):\n{options}\n"
        "  --traceback    show the full traceback of an error\n"
    )
