"""Metrics against stored values and hand cases."""

import json
import sys
import types
from pathlib import Path

import pytest

from evaluation import metrics

CASES = json.loads((Path(__file__).parents[2] / "fixtures" / "tasks" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["metric"])
def test_stored_values(case):
    value = getattr(metrics, case["metric"])(*case["args"], **case["kwargs"])
    if isinstance(case["value"], float):
        assert value == pytest.approx(case["value"], abs=1e-6)
    else:
        assert value == case["value"]


def test_classification_looks_at_every_class():
    assert metrics.classification("ABC", "ABC", ["A", "AB", "B", "ABC"]) == 1.0
    assert metrics.classification("AB", "ABC", ["A", "AB", "B", "ABC"]) == 0.0


def test_best_flattens_answers():
    assert metrics.best(metrics.exact_match, "b", ["a", ["b", "c"]]) == 1.0
    assert metrics.best(metrics.exact_match, "b", "b") == 1.0
    assert metrics.best(metrics.exact_match, "b", []) == 0.0


def test_parse_answer():
    assert metrics.parse_answer("ANSWER: it\nmore") == "it"
    assert metrics.parse_answer("  first\nsecond", "label:") == "first"
    assert metrics.parse_answer("label: 3", "label:") == "3"
    assert metrics.parse_answer("") is None


def test_rouge_counts_distinct_words_of_all_pairs_of_sentences():
    # Union of the common words: {a, b, c}; 4 distinct words there, 3 here.
    expected = 2 * 1.0 * 0.75 / (1.75 + 1e-8)
    assert metrics.rouge_l("a b. c", "c d. a b") == pytest.approx(expected)
    assert metrics.rouge_l("b a", "a b") == pytest.approx(0.5, abs=1e-7)


def test_code_similarity_takes_the_first_line_of_code():
    assert metrics.code_similarity("\n# note\n`x`\nreturn 1\nreturn 2", "return 1") == 1.0
    assert metrics.code_similarity("# only a note", "return 1") == 0.0


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("B. f", 1), ("B: f", 1), ("B", 0), ("The correct option is: f", 1), ("answer is: A", 0), ("Option B", 0)],
)
def test_debugging_options(prediction, score):
    assert metrics.infinitebench("code_debug", prediction, ["f", "B"]) == score


@pytest.mark.parametrize(
    ("task", "prediction", "label", "score"),
    [
        ("longbook_choice_eng", "I think C", ["x", "C"], 1),
        ("longbook_choice_eng", "D", ["x", "C"], 0),
        ("longbook_choice_eng", "", ["x", "C"], 0),
        ("math_find", "about 7 or 8", [7], 1),
        ("math_calc", "[1, 2, 9]", [[1, 2, 3, 4]], 0.5),
        ("code_run", "it returns -3", [-3], 1),
        ("code_run", "three", 3, 0),
        ("longdialogue_qa_eng", 'it is "John".', ["JOHN"], 1),
        ("kv_retrieval", "{'k': 'ab'}", "ab", 1),
    ],
)
def test_infinitebench_rules(task, prediction, label, score):
    assert metrics.infinitebench(task, prediction, label) == score


def test_infinitebench_knows_its_sets():
    with pytest.raises(ValueError, match="no set 'other'"):
        metrics.infinitebench("other", "", "")


def test_chinese_words(monkeypatch):
    fake = types.ModuleType("jieba")
    fake.cut = lambda text, cut_all: list(text)
    fake.setLogLevel = lambda level: None
    monkeypatch.setitem(sys.modules, "jieba", fake)
    assert metrics.token_f1_zh("\u5317\u4eac\u3002", "\u5317\u4eac") == 1.0
    assert metrics.rouge_l_zh("\u5317\u4eac", "\u5317\u4eac\u5e02") == pytest.approx(0.8)
    assert metrics.retrieval_zh("\u6bb5\u843d3 4", "\u6bb5\u843d3") == 0.5


def test_chinese_without_the_word_cutter_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match="pip install jieba"):
        metrics.token_f1_zh("a", "a")


def test_retrieval_wants_a_paragraph():
    with pytest.raises(ValueError, match="must name a paragraph"):
        metrics.retrieval("3", "three")
