"""What is known to be wrong before anything heavy happens, each problem once and by the option that causes it."""

import pytest

from configuration.check import check
from configuration.compose import compose
from configuration.errors import ConfigError
from configuration.run_folder import write_start


@pytest.fixture
def problems(tiny_corpus, tmp_path):
    """The problems of a tiny training recipe with some options."""

    def find(*options, output=tmp_path / "run", recipe="quickstart"):
        common = [f"recipe={recipe}", "scale=tiny", f"data.path={tiny_corpus}", f"output={output}"]
        with pytest.raises(ConfigError) as error:
            check(compose([*common, *options], command="train"))
        return error.value.problems

    return find


def test_a_copied_value_is_reported_once_at_its_source(problems):
    assert problems("trainer.max_steps=abc", "vocabulary.size=x", "seed=y") == [
        "seed must be int, got 'y'",
        "vocabulary.size must be int, got 'x'",
        "trainer.max_steps must be int, got 'abc'",
    ]
    assert problems("data.seed=y") == ["data.seed must be int, got 'y'"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("module.optimization.betas=[0.9]", "module.optimization.betas must be tuple[float, float], got [0.9]"),
        ("module.optimization.betas=[0.9,1.5]", "module.optimization: betas must be two numbers in [0, 1)"),
        ("callbacks.checkpoint.every_n_train_steps=-1", "callbacks.checkpoint: every_n_train_steps and keep_last"),
        ("callbacks.throughput.window=0", "callbacks.throughput: window and every_n_steps must be at least 1"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be above 0, or null"),
        ("trainer.val_check_interval=3", "trainer.val_check_interval is not used: set eval_every_n_steps=N"),
        ("trainer.default_root_dir=x", "trainer.default_root_dir is not used: set output=FOLDER"),
        ("output=", "output is empty: pass output=FOLDER"),
        ("resume=nowhere", "resume=nowhere: nowhere is no run folder and no checkpoint file"),
    ],
)
def test_one_sentence_for_each(problems, option, words):
    (problem,) = problems(option)
    assert problem.startswith(words)


def test_sequences_are_shared_where_one_text_fills_them(problems):
    shared = ["trainer=context_parallel", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2"]
    (problem,) = problems(*shared, "data.documents=packed")
    assert problem.startswith("trainer=context_parallel splits rows of one text: pass data.documents=stream")
    (problem,) = problems(*shared, recipe="niah_gca")
    assert problem.startswith("trainer=context_parallel splits rows of one text, not those of datamodules.needles.")


def test_an_output_that_is_a_file_or_of_another_command_is_refused(problems, tmp_path):
    (tmp_path / "file").write_text("")
    assert problems(output=tmp_path / "file") == [f"output={tmp_path / 'file'} is a file: pass a folder"]
    write_start(tmp_path / "run", {"recipe": "perplexity", "command": "eval"})
    assert problems() == [f"output={tmp_path / 'run'} holds the results of eval.py: pass another output="]


def test_without_a_gpu_both_small_scales_are_offered(problems, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (problem,) = problems("trainer.accelerator=gpu")
    assert "scale=laptop" in problem and "scale=tiny" in problem


@pytest.mark.parametrize(("content", "words"), [(None, "is a folder"), (b"caf\xe9", "is no UTF-8 text (byte 3)")])
def test_a_prompt_file_is_a_text_file(tmp_path, content, words):
    path = tmp_path / "prompt"
    path.mkdir() if content is None else path.write_bytes(content)
    config = compose([f"prompt_file={path}", "model.path=x"], command="generate", default_recipe="generate")
    with pytest.raises(ConfigError) as error:
        check(config)
    assert error.value.problems[0].startswith(f"prompt_file={path} {words}")
