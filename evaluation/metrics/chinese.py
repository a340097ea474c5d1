"""Chinese answers: words cut by jieba where the benchmark cuts words, characters where it counts characters."""

import string
from collections.abc import Callable
from typing import Any

from evaluation.metrics.choices import paragraph_share
from evaluation.metrics.rouge_l import rouge_l
from evaluation.metrics.text import overlap_f1

# The punctuation that the benchmarks remove, by ranges of code points.
_RANGES = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_MARKS = string.punctuation + "".join(chr(code) for first, last in _RANGES for code in range(first, last + 1))
_NO_PUNCTUATION = str.maketrans("", "", _MARKS)
PARAGRAPH = "\u6bb5\u843d"


def normalize_chinese(text: str) -> str:
    """Return the text in lower case, without punctuation and white space."""
    return "".join(text.lower().translate(_NO_PUNCTUATION).split())


def character_f1(prediction: str, answer: str) -> float:
    """Return the F1 of the normalised characters."""
    return overlap_f1(normalize_chinese(prediction), normalize_chinese(answer))


def token_f1_zh(prediction: str, answer: str) -> float:
    """Return the F1 of the normalised words, cut by jieba.

    Raises:
        ValueError: jieba is not installed.
    """
    cut = _cutter()
    mine, right = ([word for part in cut(text) if (word := normalize_chinese(part))] for text in (prediction, answer))
    return overlap_f1(mine, right)


def rouge_l_zh(prediction: str, answer: str) -> float:
    """Return ROUGE-L over the words that jieba cuts.

    Raises:
        ValueError: jieba is not installed.
    """
    cut = _cutter()
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)))


def retrieval_zh(prediction: str, answer: str) -> float:
    """Return which share of the predicted numbers is that of the paragraph in the answer."""
    return paragraph_share(prediction, answer, PARAGRAPH)


def _cutter() -> Callable[[str], Any]:
    try:
        import jieba
    except ImportError:
        raise ValueError(
            "Chinese words are cut by jieba, which is not installed: pip install jieba, or leave the Chinese sets out"
        ) from None
    jieba.setLogLevel("WARNING")
    return lambda text: jieba.cut(text, cut_all=False)
