"""HELMET's sets: passages, choice of examples, demonstrations, scores."""

import json

import numpy as np
import pytest

from evaluation.tasks import get_task
from evaluation.tasks.demonstrations import demonstrated

RAG = {
    "id": "1",
    "question": "Who {x}?",
    "answers": ["Jane Austen", "Austen"],
    "ctxs": [{"title": "T", "text": "one"}, {"title": "U", "text": "two {y}"}],
    "s_pop": 100,
}


def test_documents_are_passages_and_the_instruction_is_the_query():
    task = get_task("helmet/rag_nq")
    example = task.example(RAG)
    assert example.instruction == "" and example.passages[1] == "Document (Title: U): two {y}\n\n"
    assert example.query.startswith("Use the given documents") and example.query.endswith("Who {x}?\nAnswer:")
    assert task.score(" It was Jane Austen", example)["score"] == 1.0
    scores = task.score(" Jane Austen\nQuestion: next", example)
    assert scores["exact_match"] == 1.0 and set(scores) == {"score", "exact_match", "substring_match", "token_f1"}


def test_popular_subjects_are_left_out():
    task = get_task("helmet/rag_popqa")
    assert task.example(RAG | {"s_pop": 999}) is not None and task.example(RAG | {"s_pop": 1000}) is None


def test_examples_are_shuffled_then_cut(tmp_path):
    file = tmp_path / "kilt" / "nq-dev-multikilt_1000_k20_dep6.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(RAG | {"id": str(number)}) + "\n" for number in range(120)))
    task = get_task("helmet/rag_nq")
    order = list(range(120))
    np.random.RandomState(42).shuffle(order)
    assert [example.id for example in task.read(str(tmp_path), length=4096)] == [str(n) for n in order[:100]]
    assert len(task.read(str(file), limit=3)) == 3
    with pytest.raises(ValueError, match="lengths 4096, 8192, 16384, got 5"):
        task.read(str(tmp_path), length=5)


def test_entries_of_an_object_are_passages():
    task = get_task("helmet/json_kv")
    record = {"context": 'JSON data:\n{"k1": "v1",\n "k2": "v2"}', "question": "k2", "answer": "v2"}
    example = task.example(record)
    assert example.passages == ('    "k1": "v1",\n', '    "k2": "v2",\n') and example.query.startswith("}\n\nExtract")
    assert task.score(" v2", example)["score"] == 1.0
    with pytest.raises(ValueError, match="record 4 is no JSON object"):
        task.example(record | {"context": "JSON data:\n{"}, 4)


def test_sentences_hold_needles():
    task = get_task("helmet/ruler_niah_mk_2")
    example = task.example({"context": "A b. . The magic is 12.", "query": "key", "outputs": ["12"]})
    assert example.passages == ("A b.", " The magic is 12.")
    assert "number for key mentioned" in example.query and task.score("12", example)["score"] == 1.0


def test_demonstrations_follow_one_generator():
    train = [{"text": f"t{n}", "label": n % 3} for n in range(7)]
    test = [{"text": f"q{n}", "label": n % 3} for n in range(4)]
    draw = np.random.RandomState(42)
    rounds = [[], []]
    for label in range(3):
        items = [item for item in train if item["label"] == label]
        order = list(range(len(items)))
        draw.shuffle(order)
        for number in range(2):
            rounds[number].append(items[order[number]])
    for made, item in zip(demonstrated(train, test, 5, 3, 42), test, strict=True):
        for group in rounds:
            draw.shuffle(group)
        labels = list(range(3))
        draw.shuffle(labels)
        shown = (rounds[0] + rounds[1])[:5]
        assert made["demonstrations"] == [{"text": i["text"], "label": labels[i["label"]]} for i in shown]
        assert made["label"] == labels[item["label"]]


def test_demonstrations_from_files(tmp_path):
    for part, count in (("train", 9), ("test", 130)):
        lines = [json.dumps({"text": f"{part} {n}", "label": n % 6}) + "\n" for n in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    task = get_task("helmet/icl_trec_coarse")
    examples = task.read(str(tmp_path), length=4096)
    assert len(examples) == 100 and len(examples[0].passages) == 200
    assert (
        examples[0].query.startswith("Use the provided mapping from the text to label")
        and "{label}" in examples[0].query
    )
    assert task.score(f" {examples[0].answers[0]}\nmore", examples[0])["score"] == 1.0
    assert task.score(" 77", examples[0])["score"] == 0.0
