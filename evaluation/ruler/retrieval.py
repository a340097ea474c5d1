"""Pass key, number string and key-value retrieval, generated in the manner of InfiniteBench's sets."""

import itertools
import json

from evaluation.ruler.draft import Draft, Growing, draft_rng
from evaluation.ruler.needles import place
from evaluation.ruler.words import distinct
from evaluation.templates import cut, fill, load_templates

PASSKEY_DIGITS, STRING_DIGITS = 5, 10


def hidden_number_draft(name: str, seed: int, index: int) -> Draft:
    """Return an example of ``passkey`` or ``number_string``: one sentence in noise."""
    rng = draft_rng(name, seed, index)
    if name == "passkey":
        number = str(rng.randrange(10 ** (PASSKEY_DIGITS - 1), 10**PASSKEY_DIGITS))
        needle = f"The pass key is {number}. Remember it. {number} is the pass key."
        asked = "What is the pass key?"
    else:
        # Repeated digits are what makes the string hard to copy.
        number = "".join(digit * 3 for digit in _unequal_neighbours(rng.choices("0123456789", k=STRING_DIGITS)))
        needle = f"The sequence of digits is {number}. Remember it. {number} is the sequence of digits."
        asked = "What is the sequence of digits?"
    texts = load_templates("infinitebench")["sets"][name]
    before, after = cut(texts["template"])
    start = after.rindex("\n\nThe ")
    question, prefix = after[:start], after[start:]
    depths, lines = [rng.random()], Growing(itertools.repeat(load_templates("ruler")["noise"]))
    return Draft(
        before,
        lambda size: "\n".join(place(lines.first(size), [needle], depths)),
        fill(question, {"input": asked}),
        prefix,
        [number],
        len(number) + 3,
    )


def _unequal_neighbours(digits: list[str]) -> list[str]:
    """Return digits, each moved on by one where it equals the one before it."""
    result: list[str] = []
    for digit in digits:
        result.append(str((int(digit) + 1) % 10) if result and digit == result[-1] else digit)
    return result


def key_value_draft(name: str, seed: int, index: int) -> Draft:
    """Return an example of ``kv_retrieval``: one entry of a JSON object of random identifiers."""
    rng = draft_rng(name, seed, index)
    source = distinct("uuids", rng)
    key, value, depth = next(source), next(source), rng.random()
    pairs = Growing(f"{json.dumps(left)}: {json.dumps(next(source))}" for left in source)
    before, after = cut(load_templates("infinitebench")["sets"][name]["template"])
    prefix = "The value associated with the specified key is: "

    def context(size: int) -> str:
        entries = place(pairs.first(size - 1), [f"{json.dumps(key)}: {json.dumps(value)}"], [depth])
        return "JSON data:\n{" + ", ".join(entries) + "}"

    question = fill(after, {"input": f'Key: "{key}"\n'})
    return Draft(before, context, question, prefix, [value], 50)
