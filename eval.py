"""Evaluate a model: ``python eval.py recipe=perplexity model.path=FOLDER data.path=FOLDER``."""

import sys

from configuration.errors import user_errors_exit_2


def main(arguments: list[str]) -> None:
    """Compose, check, build, run."""
    from configuration.task import run_task

    result = run_task(arguments, print, command="eval")
    if result is not None:
        print(result["table"])


if __name__ == "__main__":
    with user_errors_exit_2(sys.argv):
        main(sys.argv[1:])
