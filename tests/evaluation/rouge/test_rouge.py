"""ROUGE against stored values, another library and computations by hand."""

import json
import random
import sys
from pathlib import Path

import pytest
from torchmetrics.functional.text.rouge import rouge_score

from evaluation.rouge import pair_scores, rouge
from evaluation.rouge.score import _stem

CASES = json.loads((Path(__file__).parents[2] / "fixtures" / "summarization" / "rouge.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prediction"][:12])
def test_stored_values(case):
    pair = [case["prediction"]], [case["reference"]]
    assert rouge(*pair) == pytest.approx(case["word"], abs=1e-6)
    assert rouge(*pair, stemmer=True) == pytest.approx(case["word_stemmed"], abs=1e-6)
    tokens = [case["bpe_prediction"]], [case["bpe_reference"]]
    assert rouge(*tokens, variant="published_bpe") == pytest.approx(case["published_bpe"], abs=1e-6)


def test_equals_torchmetrics_on_random_texts():
    draw = random.Random(0)
    words = ["A", "the", "cat's", "dogs", "3.5", "ran.", "far-off", "\n", "No", "yes"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 25))) for _ in range(60)]
    ours = rouge(texts[:30], texts[30:])
    theirs = rouge_score(texts[:30], texts[30:], rouge_keys=("rouge1", "rouge2", "rougeL"))
    assert ours == pytest.approx({name: float(theirs[f"{name}_fmeasure"]) for name in ours}, abs=1e-6)
    assert len(set(ours.values())) == 3


def test_texts_without_words_score_nothing():
    for variant in ("word", "published_bpe"):
        assert rouge(["", "..."], ["a b", "c"], variant=variant) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_published_scores_by_hand():
    # Sets: {a b c} and {a b d}; bigrams {ab bc ca} and {ab bd}; one subsequence "a b" of each two sentences.
    scores = pair_scores("a b c . a b", "a b . d", variant="published_bpe")
    assert scores["rouge1"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2), abs=1e-6)
    assert scores["rougeL"] == pytest.approx(2 / 3, abs=1e-6)
    # Of two subsequences of length one, the word found by stepping back in the prediction counts.
    assert pair_scores("x y", "y x", variant="published_bpe")["rougeL"] == pytest.approx(0.5, abs=1e-6)


def test_what_cannot_be_is_explained():
    with pytest.raises(ValueError, match="one reference"):
        rouge(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="variant is word or published_bpe"):
        rouge(["a"], ["a"], variant="letters")
    with pytest.raises(ValueError, match="no effect"):
        rouge(["a"], ["a"], variant="published_bpe", stemmer=True)


def test_stems_without_nltk(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)
    _stem.cache_clear()
    with pytest.raises(ValueError, match="pip install nltk"):
        rouge(["running"], ["runs"], stemmer=True)
    _stem.cache_clear()
