"""Word counts: the ten most common words of a list, and the most frequent words of a coded text."""

import math
import random
import string

from evaluation.ruler.draft import Draft, Growing, draft_rng
from evaluation.ruler.words import list_words
from evaluation.templates import cut, load_templates

SHORT = 4096
"""Below so many tokens common words are repeated less."""
LEAST_CODED = 74
"""With fewer coded words ranks 4 and 5 may occur equally often."""


def common_words_draft(name: str, seed: int, index: int, num_tokens: int) -> Draft:
    """Return a numbered list in which ten words stand out, behind one worked example."""
    templates = load_templates("ruler")
    texts, task = templates["templates"]["cwe"], templates["tasks"]["cwe"]
    repeats = task["below_4096" if num_tokens < SHORT else "otherwise"]
    num_common, (num_words, shot_common, shot_uncommon) = task["num_common"], repeats["shot"]
    rng = draft_rng(name, seed, index)
    source = list_words(rng)
    shot = [next(source) for _ in range(num_words)]
    common: list[str] = []
    while len(common) < num_common:
        word = next(source)
        # An answer must not be found inside another word.
        common += [] if any(word in answer or answer in word for answer in common) else [word]
    others = Growing(word for word in source if not any(answer in word for answer in common))
    before, after = cut(texts["template"])
    key = f"{name}/{seed}/{index}"
    shot_list = _numbered(
        shot[:num_common], shot_common, shot[num_common:], shot_uncommon, f"{name}/{seed}/{index}/shot"
    )
    solved = " ".join(f"{number}. {word}" for number, word in enumerate(shot[:num_common], 1))
    example = f"{before}{shot_list}{after}{texts['answer_prefix']} {solved}\n"

    def context(size: int) -> str:
        return _numbered(common, repeats["common"], others.first(size), repeats["uncommon"], f"{key}/{size}")

    return Draft(
        example + before,
        context,
        after,
        texts["answer_prefix"],
        common,
        texts["max_new_tokens"],
        guess=num_tokens // 20,
    )


def _numbered(common: list[str], repeats: int, others: list[str], other_repeats: int, seed: str) -> str:
    words = common * repeats + others * other_repeats
    random.Random(seed).shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words_draft(name: str, seed: int, index: int, num_tokens: int) -> Draft:
    """Return coded words whose frequency falls with their rank; rank 1 is dots, ranks 2 to 4 the answers.

    Of n words rank k has int(n k^-alpha / zeta(alpha)), with alpha = 2 and zeta(2) = pi^2 / 6.
    """
    templates = load_templates("ruler")
    texts, task = templates["templates"]["fwe"], templates["tasks"]["fwe"]
    rng = draft_rng(name, seed, index)
    vocabulary = ["..."]
    while len(vocabulary) < max(num_tokens // 50, 10):
        word = "".join(rng.choices(string.ascii_lowercase, k=task["word_length"]))
        vocabulary += [word] if word not in vocabulary else []
    zeta = math.pi**2 / 6

    def context(size: int) -> str:
        words: list[str] = []
        for rank, word in enumerate(vocabulary, 1):
            words += [word] * int(size * rank ** -task["alpha"] / zeta)
        random.Random(f"{name}/{seed}/{index}/{size}").shuffle(words)
        return " ".join(words)

    before, after = cut(texts["template"])
    return Draft(
        before,
        context,
        after,
        texts["answer_prefix"],
        vocabulary[1:4],
        texts["max_new_tokens"],
        least=LEAST_CODED,
        guess=num_tokens // 4,
    )
