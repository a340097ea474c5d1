"""Train a recipe: ``python train.py recipe=NAME [key=value ...]``; ``--help`` lists the recipes."""

import sys

from configuration.errors import exit_with_sentence


def main(arguments: list[str]) -> None:
    """Compose, check, build, run."""
    from configuration.compose import compose
    from configuration.help import help_text, wants_help

    if wants_help(arguments):
        print(help_text("train"))
        return
    config = compose(arguments, command="train")
    # Later imports are slow; a mistyped recipe should not wait for them.
    from configuration.check import check

    missing = check(config)
    from configuration.training import dry_run, run

    if config["dry_run"]:
        print(dry_run(config, missing))
    else:
        run(config, print)


if __name__ == "__main__":
    with exit_with_sentence(sys.argv):
        main(sys.argv[1:])
