"""The stem of an English word: Porter's algorithm (1980) with the later amendments that ROUGE's reference uses.

Notable: a word is a chain of consonants and vowels, [C](VC)^m[V]; what a rule asks is mostly about the measure m of
what would be left.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

IRREGULAR = {
    **{"skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "howe": "howe"},
    **{"innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing"},
    **{"cannings": "canning", "canning": "canning"},
    **{"proceed": "proceed", "exceed": "exceed", "succeed": "succeed"},
}
STEP_2 = (
    *(("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble")),
    *(("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate")),
    *(("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al")),
    *(("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful")),
)
STEP_3 = (
    *(("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")),
)
STEP_4 = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "sion", "tion", "ou", "ism"),
    *("ate", "iti", "ous", "ive", "ize"),
)


def stem(word: str) -> str:
    """Return the stem of a lower-case word."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _double_suffix, _step_3, _step_4, _final_e, _final_ll):
        word = step(word)
    return word


def _is_consonant(word: str, place: int) -> bool:
    letter = word[place]
    if letter == "y":
        return place == 0 or not _is_consonant(word, place - 1)
    return letter not in "aeiou"


def _measure(word: str) -> int:
    """Return m, how often a consonant follows a vowel."""
    kinds = [_is_consonant(word, place) for place in range(len(word))]
    return sum(not before and after for before, after in pairwise(kinds))


def _has_vowel(word: str) -> bool:
    return not all(_is_consonant(word, place) for place in range(len(word)))


def _ends_double(word: str) -> bool:
    return len(word) >= 2 and word[-1] == word[-2] and _is_consonant(word, len(word) - 1)


def _ends_cvc(word: str) -> bool:
    """Whether a short syllable ends the word: consonant, vowel, consonant other than w, x, y; or vowel, consonant."""
    if len(word) == 2:
        return not _is_consonant(word, 0) and _is_consonant(word, 1)
    kinds = [_is_consonant(word, place) for place in range(max(0, len(word) - 3), len(word))]
    return kinds == [True, False, True] and word[-1] not in "wxy"


def _replace(word: str, rules: tuple[tuple[str, str], ...], allowed: Callable[[str], bool]) -> str:
    """Apply the first rule whose suffix the word has; where its stem is not allowed, no other is tried."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            left = word[: len(word) - len(suffix)]
            return left + replacement if allowed(left) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    return _replace(word, (("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")), lambda left: True)


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        left = word[: len(word) - len(suffix)]
        if word.endswith(suffix) and _has_vowel(left):
            return _mend(left)
    return word


def _mend(word: str) -> str:
    """Give back what the rules for -ed and -ing took too much of."""
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if _ends_double(word):
        return word if word[-1] in "lsz" else word[:-1]
    return word + "e" if _measure(word) == 1 and _ends_cvc(word) else word


def _final_y(word: str) -> str:
    left = word[:-1]
    return left + "i" if word.endswith("y") and len(left) > 1 and _is_consonant(left, len(left) - 1) else word


def _double_suffix(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _double_suffix(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, STEP_2, lambda left: _measure(left) > 0)


def _step_3(word: str) -> str:
    return _replace(word, STEP_3, lambda left: _measure(left) > 0)


def _step_4(word: str) -> str:
    for suffix in STEP_4:
        if word.endswith(suffix):
            # -ion goes only behind s and t, which stay.
            left = word[:-3] if suffix in ("sion", "tion") else word[: len(word) - len(suffix)]
            return left if _measure(left) > 1 else word
    return word


def _final_e(word: str) -> str:
    if not word.endswith("e"):
        return word
    left = word[:-1]
    return left if _measure(left) > 1 or (_measure(left) == 1 and not _ends_cvc(left)) else word


def _final_ll(word: str) -> str:
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
