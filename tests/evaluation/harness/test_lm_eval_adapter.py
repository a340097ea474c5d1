"""The adapter of lm-eval: log-likelihoods and texts against plain forwards, with a stand-in for the package."""

import sys
import types
from types import SimpleNamespace

import pytest
import torch
from byte_llama import tiny_llama

from evaluation.harness.adapter import Harness, lm_eval_model
from evaluation.harness.task import LmEvalTask
from patches.parallel_context import ParallelContext


def ask(*arguments):
    return SimpleNamespace(args=arguments)


def direct(model, tokenizer, context, continuation):
    ids, target = (tokenizer(text)["input_ids"] for text in (context, continuation))
    with torch.inference_mode():
        logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    chosen = torch.tensor(target)
    return float(logits.gather(1, chosen[:, None]).sum()), bool((logits.argmax(-1) == chosen).all())


@pytest.mark.parametrize("patch", [None, ParallelContext(degree=1, prefix=None)], ids=("plain", "full"))
def test_loglikelihoods(model, tokenizer, patch):
    harness = Harness(model, tokenizer, patch, batch_size=2, query_tokens=5)
    asked = [("the cat sat on", " the mat"), ("a", "b"), ("the dog ", "ran")]
    found = harness.loglikelihood([ask(*pair) for pair in asked])
    for (value, greedy), (context, continuation) in zip(found, [*asked[:2], ("the dog", " ran")], strict=True):
        expected = direct(model, tokenizer, context, continuation)
        assert value == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]


@pytest.mark.parametrize("patch", [None, ParallelContext(degree=1, prefix=None)], ids=("plain", "full"))
def test_rolling_scores_every_token_once(model, tokenizer, patch):
    text = "some words that are longer than a window"
    harness = Harness(model, tokenizer, patch, query_tokens=7, max_length=16)
    (found,) = harness.loglikelihood_rolling([ask(text)])
    expected = 0.0
    for start in range(0, len(text), 15):
        ids = [tokenizer.eos_token_id, *tokenizer(text[start : start + 15])["input_ids"]]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected += float(logits.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert found == pytest.approx(expected, rel=1e-4)


def test_generation_is_cut(model, tokenizer):
    harness = Harness(model, tokenizer)
    (text,) = harness.generate_until([ask("the cat", {"max_gen_toks": 8})])
    assert text
    (cut,) = harness.generate_until([ask("the cat", {"max_gen_toks": 8, "until": [text[2:4]]})])
    assert cut == text[: text.index(text[2:4])]
    with pytest.raises(ValueError, match="do_sample=false"):
        harness.generate_until([ask("the cat", {"do_sample": True})])


def test_pieces_of_a_patch_are_all_but_the_query(model, tokenizer):
    harness = Harness(model, tokenizer, ParallelContext(degree=3, prefix=None), query_tokens=4)
    prompt = harness._prompt(list(range(19)), 2)
    assert [len(piece) for piece in prompt.pieces] == [5, 5, 5] and prompt.query == [15, 16, 17, 18]
    assert harness._prompt([1, 2], 2).pieces == []
    assert harness.loglikelihood([ask("the cat sat on the", " mat")])[0][0] < 0
    with pytest.raises(ValueError, match="at least 1"):
        Harness(model, tokenizer, query_tokens=0)


@pytest.fixture
def package(monkeypatch):
    """A stand-in that asks one question of every kind."""
    names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")
    modules = {name: types.ModuleType(name) for name in names}
    modules["lm_eval.api.model"].LM = type("LM", (), {})
    modules["lm_eval.api"].model = modules["lm_eval.api.model"]
    modules["lm_eval"].api = modules["lm_eval.api"]
    modules["lm_eval.tasks"].TaskManager = lambda **options: SimpleNamespace(all_tasks=["mine"])

    def simple_evaluate(*, model, tasks, **options):
        assert isinstance(model, modules["lm_eval.api.model"].LM) and options["limit"] == 3
        (value, _), (rolled,) = model.loglikelihood([ask("a", "b")])[0], model.loglikelihood_rolling([ask("abc")])
        assert model.generate_until([ask("abc", {"max_gen_toks": 2})])
        return {"results": {tasks[0]: {"alias": "x", "acc,none": value, "acc_stderr,none": 1.0, "ppl,none": rolled}}}

    modules["lm_eval"].simple_evaluate = simple_evaluate
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_the_task_writes_what_the_package_finds(package, tokenizer, tmp_path):
    result = LmEvalTask(tiny_llama, ["mine"], limit=3, tokenizer=tokenizer, device="cpu").run(tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0}
    scaled = LmEvalTask(tiny_llama, ["mine"], limit=3, tokenizer=tokenizer, device="cpu", rope=yarn).run(tmp_path)
    assert scaled["protocol"]["rope"] == yarn and scaled["results"] != result["results"]
    assert [row["metric"] for row in result["results"]] == ["acc", "ppl"] and (tmp_path / "metrics.json").is_file()
    with pytest.raises(ValueError, match="no task other"):
        LmEvalTask(tiny_llama, ["other"], tokenizer=tokenizer, device="cpu").run(tmp_path)
    with pytest.raises(ValueError, match="tasks is empty"):
        LmEvalTask(tiny_llama, [])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        LmEvalTask(tiny_llama, ["mine"], include_path=str(tmp_path / "no"))


def test_without_the_package_there_is_one_sentence(monkeypatch, model, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        LmEvalTask(tiny_llama, ["mine"])
    with pytest.raises(ValueError, match="pip install lm-eval"):
        lm_eval_model(Harness(model, tokenizer))
