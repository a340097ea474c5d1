"""Generated samples: reproducible, written down, without side effects."""

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from callbacks.sample_text import SampleText


@pytest.fixture
def tokenizer(tmp_path):
    vocabulary = {"<end>": 0} | {f"w{i}": i for i in range(1, 31)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def sampler(tokenizer, **options):
    return SampleText(["w1 w2 w3", ""], tokenizer=tokenizer, **({"max_new_tokens": 5} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_is_unchanged(assert_changes_nothing, tokenizer, temperature):
    assert_changes_nothing(sampler(tokenizer, temperature=temperature))


def test_greedy_text_is_the_likeliest_continuation(fit, lab, tokenizer, tmp_path):
    module = lab["Module"](lab["tiny_llama"]())
    with torch.no_grad():
        module.model.lm_head.weight *= 30  # clear decisions
    fit(sampler(tokenizer, max_new_tokens=3), module=module, max_steps=5, val_check_interval=5)
    ids = [1, 2, 3]
    module.eval()
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(module.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    text = (tmp_path / "samples" / "step_00000005.txt").read_text()
    first, second = text.split("-" * 80)
    assert first.startswith("prompt: w1 w2 w3\n")
    assert first.split("\n\n")[1].split() == [f"w{i}" for i in ids[3:] if i]
    assert second.strip().startswith("prompt:")


def test_draws_depend_on_the_seed_only(fit, tokenizer, tmp_path):
    texts = []
    for seed in (1, 1, 2):
        fit(sampler(tokenizer, temperature=1.5, seed=seed, max_new_tokens=20), max_steps=5)
        texts.append((tmp_path / "samples" / "step_00000005.txt").read_text())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_every_nth_validation_and_tensorboard(fit, tokenizer, tmp_path):
    callback = sampler(tokenizer, every_n_validations=2)
    callback.output = str(tmp_path / "run")
    fit(callback, val_check_interval=2, logger=TensorBoardLogger(tmp_path, "board"))
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == [
        f"step_{n:08d}.txt" for n in (2, 6, 10)
    ]
    events = EventAccumulator(str(next((tmp_path / "board").iterdir()))).Reload()
    assert "samples/0/text_summary" in events.Tags()["tensors"]
    other = sampler(tokenizer)
    other.load_state_dict(callback.state_dict())
    assert other.state_dict() == {"validations": 5}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "at least 1"),
        ({"prompts": ["a"], "every_n_validations": 0}, "at least 1"),
        ({"prompts": ["a"], "temperature": -1.0}, "temperature must be"),
        ({"prompts": ["a"], "temperature": float("nan")}, "temperature must be"),
    ],
)
def test_bad_options_are_explained(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleText(**options)


def test_a_missing_tokenizer_is_reported_before_training(fit, tmp_path):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        fit(SampleText(["a"]))
    with pytest.raises(FileNotFoundError, match="no tokenizer folder"):
        fit(SampleText(["a"], tokenizer=str(tmp_path / "none")))


def test_a_tokenizer_without_an_end_of_text_is_refused(fit, tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-text token"):
        fit(SampleText(["a"], tokenizer=str(tmp_path)))
