"""Export a checkpoint as a Hugging Face folder: ``python export.py checkpoint=runs/NAME [output=FOLDER]``."""

import sys

from configuration.errors import exit_with_sentence


def main(arguments: list[str]) -> None:
    """Compose, check, build, run."""
    from configuration.task import run_task

    result = run_task(arguments, print, command="export", default_recipe="export")
    if result is not None:
        print(f"{result['checkpoint']} -> {result['model']} ({result['parameters']:,} parameters)")


if __name__ == "__main__":
    with exit_with_sentence(sys.argv):
        main(sys.argv[1:])
