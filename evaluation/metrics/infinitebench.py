"""InfiniteBench's scorers, one rule for each of its sets."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from evaluation.metrics.chinese import character_f1
from evaluation.metrics.rouge_l import rouge_l
from evaluation.metrics.text import best, token_f1

LETTERS = "ABCD"
_CHOICE_PHRASES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_PHRASES = ("answer is:", "is:", "answer:", "correct option is:")
_QUOTES = "\n\"'.,?!{}"


def infinitebench(task: str, prediction: str, label: Any) -> float:
    """Score a prediction by the rule of a set.

    Args:
        task: name of the set.
        prediction: generated text.
        label: the answer or the list of answers; of a choice, its text and its letter.

    Raises:
        ValueError: there is no such set.
    """
    if task not in _RULES:
        raise ValueError(f"InfiniteBench has no set {task!r}; sets: {', '.join(_RULES)}")
    return float(_RULES[task](prediction, label))


def _one(label: Any) -> Any:
    return label[0] if isinstance(label, list | tuple) else label


def _spaced(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return " ".join(text.split())


def _first_number(prediction: str, label: Any) -> bool:
    found = re.search(r"[0-9]+", prediction)
    return found is not None and found[0] == str(_one(label))


def _key_value(prediction: str, label: Any) -> bool:
    return str(_one(label)) in _spaced(prediction, _QUOTES + ":").split()


def _code_run(prediction: str, label: Any) -> bool:
    """Compare the last word, which must be a whole number."""
    words = _spaced(prediction, "\n.`'\":").split()
    try:
        return bool(words) and int(words[-1]) == int(_one(label))
    except ValueError:
        return False


def _behind(text: str, phrases: Sequence[str]) -> str | None:
    """Return what follows the first phrase that the text holds, the character after it left out; None without one."""
    for phrase in phrases:
        if phrase in text:
            return text[text.index(phrase) + len(phrase) + 1 :]
    return None


def _code_debug(prediction: str, label: Sequence[str]) -> bool:
    """Accept the letter in front, or letter or name of the function behind a phrase such as "is:"."""
    prediction, (name, letter) = prediction.strip(), label
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return True
    rest = _behind(_spaced(prediction, ("\n", "`", "'", '"', "-", "*", "Option", "option")), _DEBUG_PHRASES)
    return rest is not None and rest.startswith((letter, name))


def _choice(prediction: str, label: Sequence[str]) -> bool:
    """Accept the letter in front, the whole answer, either behind "answer is", else the first lone letter."""
    prediction = prediction.strip()
    if not prediction:
        return False
    if prediction[0] in LETTERS:
        return prediction[0] in label
    if prediction in label:
        return True
    plain = _spaced(prediction, _QUOTES)
    rest = _behind(plain, _CHOICE_PHRASES)
    if rest is not None:
        return rest.startswith(tuple(label))
    lone = next((word for word in plain.split() if word in LETTERS), None)
    return lone is not None and lone in label


def _math_find(prediction: str, label: Any) -> bool:
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return found is not None and float(found[0]) == float(_one(label))


def _math_calc(prediction: str, label: Any) -> float:
    """Return the share of the values that are right before the first wrong one."""
    wanted = label[0] if isinstance(label[0], list) else label
    values = [int(number) for number in re.findall(r"[0-9]+", prediction)]
    right = 0
    while right < min(len(wanted), len(values)) and values[right] == int(wanted[right]):
        right += 1
    return right / len(wanted)


def _dialogue(prediction: str, label: Any) -> bool:
    return str(_one(label)).upper() in _spaced(prediction, _QUOTES + ":").upper().split()


_RULES: dict[str, Callable[[str, Any], float]] = {
    "passkey": _first_number,
    "number_string": _first_number,
    "kv_retrieval": _key_value,
    "longbook_sum_eng": lambda prediction, label: best(rouge_l, prediction, label),
    "longbook_choice_eng": _choice,
    "longbook_qa_eng": lambda prediction, label: best(token_f1, prediction, label),
    "longbook_qa_chn": lambda prediction, label: best(character_f1, prediction, label),
    "longdialogue_qa_eng": _dialogue,
    "math_find": _math_find,
    "math_calc": _math_calc,
    "code_run": _code_run,
    "code_debug": _code_debug,
}
