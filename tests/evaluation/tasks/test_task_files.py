"""Tasks from files in the published formats: prompts, answers, scores, and what is wrong with a file."""

import hashlib
import json
from pathlib import Path

import pytest

from evaluation.tasks import get_task, task_names
from evaluation.templates import load_templates

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tasks"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_templates_are_the_published_ones_byte_for_byte():
    parts = {family: load_templates(family) for family in ("longbench", "infinitebench")}
    ours = {"helmet_parallel": load_templates("helmet"), "ruler": load_templates("ruler")}
    for family, both in parts.items():
        ours |= {family: both["sets"], f"{family}_parallelcomp": both["parallelcomp"]}
    known = json.loads((FIXTURES / "template_hashes.json").read_text())
    for name, texts in ours.items():
        assert hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest() == known[name], name


@pytest.mark.parametrize(("family", "count"), [("longbench", 21), ("infinitebench", 12), ("helmet", 13)])
def test_every_set_has_a_task(family, count):
    names = task_names(family)
    assert len(names) == count and all(get_task(name).max_new_tokens > 0 for name in names)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="did you mean 'longbench/hotpotqa'"):
        get_task("longbench/hotpotq")
    with pytest.raises(ValueError, match="families longbench, "):
        get_task("hotpotqa")


LONGBENCH = {"input": "Q {x}?", "context": "C {y} {{z}}", "answers": ["a", "b c"], "all_classes": None, "_id": "7"}


def test_longbench_prompt_keeps_braces_of_the_data(tmp_path):
    task = get_task("longbench/qmsum")
    (example,) = task.read(write(tmp_path / "qmsum.jsonl", LONGBENCH))
    template = load_templates("longbench")["sets"]["qmsum"]["template"]
    assert task.prompt(example) == template.replace("{context}", "C {y} {{z}}").replace("{input}", "Q {x}?")
    assert example.id == "7" and example.passages == ("C {y} {{z}}",)
    assert task.read(str(tmp_path))[0] == example


def test_longbench_scores():
    def score(name, prediction, **record):
        task = get_task(f"longbench/{name}")
        return task.score(prediction, task.example(LONGBENCH | record))["score"]

    assert score("hotpotqa", "b c") == 1.0
    assert score("triviaqa", "\nb c\nand more") == 1.0 and score("hotpotqa", "b c\nand more") < 1
    assert score("trec", "X y\nZ", answers=["X y"], all_classes=["X", "X y", "Z"]) == 1.0
    assert score("passage_count", "5 or 6", answers=["5"]) == 0.5
    assert score("lcc", "x = 1\ny", answers=["x = 1"]) == 1.0
    assert get_task("longbench/samsum").stop == "\n" and get_task("longbench/qasper").stop is None
    assert not get_task("longbench/trec").chat_template and get_task("longbench/qasper").chat_template


def test_parallelcomp_deviates_where_the_paper_does():
    record = LONGBENCH | {"input": "I", "all_classes": ["I"]}
    theirs, ours = get_task("longbench_parallelcomp/trec"), get_task("longbench/trec")
    assert theirs.prompt(theirs.example(record)).endswith("\nNow, answer the following questionsI")
    assert ours.prompt(ours.example(record)).endswith("\nI")
    same = get_task("longbench_parallelcomp/qasper")
    assert same.prompt(same.example(record)) == get_task("longbench/qasper").prompt(same.example(record))
    assert get_task("infinitebench_parallelcomp/kv_retrieval").max_new_tokens == 100


INFINITE = {"id": 3, "context": "CTX", "input": "IN", "answer": ["yes"], "options": ["no", "yes", "x", "y"]}


def test_infinitebench_prompts_and_answers():
    choice = get_task("infinitebench/longbook_choice_eng")
    example = choice.example(INFINITE)
    assert example.answers == ("yes", "B") and "\nB. yes\nC. x" in choice.prompt(example)
    assert choice.score("B", example) == {"score": 1.0}
    find = get_task("infinitebench/math_find")
    asked = "What is it? The Second largest number of the list is"
    example = find.example(INFINITE | {"input": asked, "answer": 4})
    assert find.prompt(example).startswith("What is the second largest number in the following list?\n\nCTX")
    assert find.score("4", example)["score"] == 1.0
    run = get_task("infinitebench/code_run")
    example = run.example(INFINITE | {"input": "Please give me the value of func_12(-3).", "answer": 5})
    assert "function called func_12 in" in run.prompt(example) and "value of func_12(-3)." in run.prompt(example)
    calc = get_task("infinitebench/math_calc")
    assert calc.score("[1, 2, 4]", calc.example(INFINITE | {"answer": [1, 2, 3]}))["score"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("longbook_choice_eng", {"answer": "other"}, "none of its options"),
        ("code_debug", {"options": ["a"]}, "must have 4 options"),
        ("math_find", {"input": "find it"}, "asks for no number"),
        ("code_run", {"input": "run it"}, "calls no function"),
    ],
)
def test_infinitebench_refuses_records_it_cannot_ask(name, change, message):
    with pytest.raises(ValueError, match=message):
        get_task(f"infinitebench/{name}").example(INFINITE | change)


def test_broken_files_are_told_by_line(tmp_path):
    task, path = get_task("longbench/qasper"), tmp_path / "qasper.jsonl"
    whole = json.dumps(LONGBENCH) + "\n"
    path.write_text(whole + "\n" + whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"qasper.jsonl, line 3 is no JSON .* damaged or cut off"):
        task.read(str(path))
    write(path, LONGBENCH, {"input": "", "context": ""})
    with pytest.raises(ValueError, match="line 2 lacks answers; it has input, context"):
        task.read(str(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is no JSON object, got list"):
        task.read(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no record"):
        task.read(str(path))
    with pytest.raises(FileNotFoundError, match=r"vt.jsonl does not exist: pass data.path"):
        get_task("ruler/vt").read(str(tmp_path))


def test_what_a_prompt_needs_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="record 0 must name its classes"):
        get_task("longbench/trec").example(LONGBENCH)
    with pytest.raises(ValueError, match="the prompt needs title; the record has text"):
        get_task("helmet/rag_nq").example({"question": "?", "answers": ["a"], "ctxs": [{"text": "t"}]})
    with pytest.raises(ValueError, match="line 1 lacks s_pop"):
        get_task("helmet/rag_popqa").read(write(tmp_path / "a", {"question": "?", "answers": [], "ctxs": []}))


def test_folders_of_the_published_generator(tmp_path):
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nNOISE\nQuestion: Find "
    )
    text += "all variables that are assigned the value 7 in the text above."
    (tmp_path / "vt").mkdir()
    write(
        tmp_path / "vt" / "validation.jsonl", {"index": 5, "input": text, "outputs": ["A"], "answer_prefix": " It is"}
    )
    (example,) = get_task("ruler/vt").read(str(tmp_path))
    assert example.passages == ("NOISE",) and example.query.endswith("above. It is") and example.id == "5"


def test_files_of_the_hub(tmp_path, monkeypatch):
    import zipfile

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(LONGBENCH))

    def download(repository, name, repo_type):
        assert (repository, repo_type) == ("THUDM/LongBench", "dataset")
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert get_task("longbench/qasper").read("hub:THUDM/LongBench")[0].id == "7"
    with pytest.raises(FileNotFoundError, match=r"holds no hotpotqa.jsonl"):
        get_task("longbench/hotpotqa").read("hub:THUDM/LongBench")
