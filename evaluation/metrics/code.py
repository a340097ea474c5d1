"""Lines of code: how alike two of them are.

Notable: the fuzzy-match package that the benchmark names changes its values when an accelerator is installed, so the
ratio is that of ``difflib`` throughout.
"""

from difflib import SequenceMatcher

_NOT_CODE = ("`", "#", "//")


def edit_similarity(one: str, two: str) -> float:
    """Return ``2 M / T`` rounded to a percent: M characters in matching blocks, T characters in all."""
    if one == two:
        return 1.0
    if not one or not two:
        return 0.0
    return round(100 * SequenceMatcher(None, one, two).ratio()) / 100


def code_similarity(prediction: str, answer: str) -> float:
    """Return the edit similarity of the first predicted line without a backquote, ``#`` or ``//``."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in _NOT_CODE)), "")
    return edit_similarity(code, answer)
