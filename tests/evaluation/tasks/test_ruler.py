"""Synthetic tasks: what each example must hold, at any length, in any process."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from evaluation.ruler import TASKS, make_examples, make_qa_examples, needs_essay
from evaluation.tasks import get_task

ROOT = Path(__file__).parents[3]
ESSAY = " ".join(f"Sentence {number} speaks of nothing at all." for number in range(400))


def make(task, tokenizer, num_tokens=4000, **options):
    essay = ESSAY if needs_essay(task) else None
    options = {"num_examples": 2} | options
    return make_examples(task, num_tokens=num_tokens, tokenizer=tokenizer, essay=essay, **options)


@pytest.mark.parametrize("task", TASKS)
def test_every_example_is_whole_and_fills_its_length(task, tokenizer):
    for index, record in enumerate(make(task, tokenizer, num_tokens=8000)):
        whole = record["instruction"] + record["context"] + record["query"]
        assert record["input"] + record["answer_prefix"] == whole
        assert record["query"].endswith(record["answer_prefix"]) and record["index"] == index
        tokens = len(tokenizer(whole, add_special_tokens=False)["input_ids"])
        assert tokens + record["max_new_tokens"] == record["length"] <= 8000
        assert record["length"] >= (0.6 if task == "fwe" else 0.85) * 8000
        assert all(answer in record["context"] for answer in record["outputs"])
        example = get_task(f"ruler/{task}").example(record, index)
        assert get_task(f"ruler/{task}").prompt(example) == whole
        assert get_task(f"ruler/{task}").score(" ".join(record["outputs"]), example)["score"] == 1.0
        assert get_task(f"ruler/{task}").score("nothing", example)["score"] == 0.0


@pytest.mark.parametrize("task", ["niah_multiquery", "cwe", "kv_retrieval"])
def test_an_example_depends_on_seed_and_index_alone(task, tokenizer):
    first, second = make(task, tokenizer)
    assert make(task, tokenizer, num_examples=3)[:2] == [first, second]
    assert first["context"] != second["context"]
    assert make(task, tokenizer, seed=43)[0]["context"] != first["context"]


def by_words(text, add_special_tokens):
    return {"input_ids": text.split()}


def test_every_process_makes_the_same():
    code = (
        "import json; from evaluation.ruler import make_examples\n"
        "def by_words(text, add_special_tokens): return {'input_ids': text.split()}\n"
        "made = [make_examples(t, num_examples=1, num_tokens=900, tokenizer=by_words)"
        " for t in ('niah_multikey_2', 'cwe', 'fwe')]; print(json.dumps(made))"
    )
    environment = {"PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    ours = [make(task, by_words, num_examples=1, num_tokens=900) for task in ("niah_multikey_2", "cwe", "fwe")]
    assert json.loads(run.stdout) == ours, run.stderr


def test_needles_are_distinct_and_asked_in_the_singular_where_one_is(tokenizer):
    record = make("niah_multikey_3", tokenizer)[0]
    facts = re.findall(r"magic uuids for (\S+) is: (\S+)\.", record["context"])
    assert len(facts) > 10 and len({key for key, _ in facts}) == len(facts) == len({value for _, value in facts})
    asked = re.search(r"magic uuid for (\S+) mentioned", record["query"])[1]
    assert dict(facts)[asked] == record["outputs"][0]
    assert record["instruction"].startswith("A special magic uuid is hidden")
    many = make("niah_multivalue", tokenizer)[0]
    assert many["instruction"].startswith("Some special magic numbers are hidden") and len(many["outputs"]) == 4
    queries = make("niah_multiquery", tokenizer)[0]
    assert queries["query"].count(", and ") == 2 and len(set(queries["outputs"])) == 4


def test_needles_lie_at_all_depths(tokenizer):
    records = make("passkey", tokenizer, num_examples=40, num_tokens=1500)
    depths = [record["context"].index(record["outputs"][0]) / len(record["context"]) for record in records]
    assert min(depths) < 0.2 and max(depths) > 0.8 and 0.35 < sum(depths) / len(depths) < 0.65


def test_variables_are_defined_before_they_are_used(tokenizer):
    record = make("vt", tokenizer)[0]
    chain = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", record["context"])
    assert [name for name, _ in chain] == record["outputs"] and len(chain) == 5
    assert [source for _, source in chain[1:]] == record["outputs"][:-1]
    assert chain[0][1] in record["query"]


@pytest.mark.parametrize(("num_tokens", "common", "other"), [(4000, 6, 1), (9000, 30, 3)])
def test_common_words_stand_out(tokenizer, num_tokens, common, other):
    record = make("cwe", tokenizer, num_tokens=num_tokens, num_examples=1)[0]
    words = re.findall(r"(\d+)\. (\S+)", record["context"])
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    counts = Counter(word for _, word in words)
    assert {counts.pop(word) for word in record["outputs"]} == {common} and set(counts.values()) == {other}
    assert record["instruction"].count("Below is a numbered list") == 2
    assert not any(a in b for a in record["outputs"] for b in {*counts, *record["outputs"]} if a != b)


def test_coded_words_follow_their_ranks(tokenizer):
    record = make("fwe", tokenizer, num_examples=1)[0]
    counts = Counter(record["context"].split()).most_common(5)
    assert counts[0][0] == "..." and [word for word, _ in counts[1:4]] == record["outputs"]
    assert counts[3][1] > counts[4][1] and counts[1][1] == pytest.approx(counts[0][1] / 4, abs=1)


def test_questions_over_passages(tokenizer):
    records = [
        {"question": f"What is number {n}?", "answers": [f"thing {n}x"], "passages": [f"Number {n} is thing {n}x."]}
        for n in range(60)
    ]
    made = make_qa_examples(records, num_examples=3, num_tokens=2000, tokenizer=tokenizer)
    assert made[2]["outputs"] == ["thing 2x"] and "Number 2 is thing 2x." in made[2]["context"]
    assert made[2]["context"].startswith("Document 1:\n") and 1700 < made[2]["length"] <= 2000
    with pytest.raises(ValueError, match="need as many records"):
        make_qa_examples(records, num_examples=61, num_tokens=2000, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("niah_singel_1", {}, "did you mean 'niah_single_1'"),
        ("niah_single_2", {}, "pass essay"),
        ("vt", {"num_tokens": 100}, "100 tokens are too few"),
        ("vt", {"num_examples": 0}, "num_examples must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(task, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        make_examples(task, **{"num_examples": 1, "num_tokens": 4000, "tokenizer": tokenizer} | options)


def test_published_files_are_cut_at_the_template(tokenizer):
    for task in ("niah_multivalue", "niah_single_1", "vt", "cwe", "fwe"):
        record = make(task, tokenizer, num_examples=1)[0]
        kept = {"index": 0, "outputs": record["outputs"], "length": record["length"]}
        apart = kept | {"input": record["input"], "answer_prefix": record["answer_prefix"]}
        joined = kept | {"input": record["input"] + record["answer_prefix"]}
        for published in (apart, joined):
            example = get_task(f"ruler/{task}").example(published)
            assert (example.instruction, example.passages, example.query) == (
                record["instruction"],
                (record["context"],),
                record["query"],
            )
    with pytest.raises(ValueError, match="does not follow"):
        get_task("ruler/vt").example({"input": "something else", "outputs": ["a"]})


def test_a_record_without_an_answer_is_refused():
    record = {"instruction": "", "context": "A b.", "query": "c", "input": "", "outputs": []}
    with pytest.raises(ValueError, match="record 3 of ruler/passkey has empty outputs"):
        get_task("ruler/passkey").example(record, 3)
