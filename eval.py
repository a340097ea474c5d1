"""Evaluate a model: ``python eval.py recipe=perplexity model.path=FOLDER data.path=FOLDER``."""

import sys

from configuration.errors import exit_with_sentence


def main(arguments: list[str]) -> None:
    """Compose, check, build, run."""
    from configuration.task import run_task

    result = run_task(arguments, print, command="eval")
    if result is not None:
        print(result["table"])


if __name__ == "__main__":
    with exit_with_sentence(sys.argv):
        main(sys.argv[1:])
