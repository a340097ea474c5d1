"""Continue a prompt: ``python generate.py model.path=runs/NAME/model prompt='def main'``."""

import sys

from configuration.errors import exit_with_sentence


def main(arguments: list[str]) -> None:
    """Compose, check, build, run."""
    from configuration.task import run_task

    result = run_task(arguments, print, command="generate", default_recipe="generate")
    for sample in result["samples"] if result else ():
        print(sample["prompt"] + sample["continuation"])
        rate = sample["num_tokens"] / sample["seconds"]
        context = f"{sample['num_context_tokens']} + " if "num_context_tokens" in sample else ""
        pieces = f" behind {sample['num_pieces']} pieces" if "num_pieces" in sample else ""
        counts = f"{context}{sample['num_prompt_tokens']} + {sample['num_tokens']} tokens{pieces}"
        print(f"[{counts}, {rate:.1f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    with exit_with_sentence(sys.argv):
        main(sys.argv[1:])
