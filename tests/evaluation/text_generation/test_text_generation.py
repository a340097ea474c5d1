"""Continuing a prompt: what comes back, and one sentence for whatever cannot be continued."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.text_generation.task import TextGeneration
from preprocess.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte model of at most 32 positions; it has two ends of text and no padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = LlamaConfig(
        vocab_size=259, max_position_embeddings=32, bos_token_id=None, eos_token_id=[257, 256], **sizes
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def generation(folder, **options):
    return TextGeneration(str(folder), **({"prompt": "a cat", "max_new_tokens": 4, "device": "cpu"} | options))


def test_greedy_and_seeded_samples_repeat(folder, tmp_path):
    greedy = generation(folder).run(tmp_path)["samples"]
    assert [len(greedy), greedy[0]["prompt"], greedy[0]["num_prompt_tokens"]] == [1, "a cat", 5]
    assert greedy[0]["num_tokens"] <= 4
    stored = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert stored == greedy
    draws = [
        [
            sample["continuation"]
            for sample in generation(folder, temperature=5.0, num_samples=3, seed=seed).run()["samples"]
        ]
        for seed in (0, 0, 7)
    ]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) > 1


def test_a_prompt_may_come_from_a_file(folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("caf\u00e9", encoding="utf-8")
    assert generation(folder, prompt=None, prompt_file=str(tmp_path / "prompt.txt")).prompt == "caf\u00e9"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": None}, "pass one of prompt"),
        ({"prompt_file": "x"}, "pass one of prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"max_new_tokens": 0}, "must be at least 1, got 0 and 1"),
        ({"num_samples": 0}, "must be at least 1, got 4 and 0"),
        ({"temperature": -0.1}, "temperature must be 0 .* or above, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 .* or above, got nan"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": 0.5}, "need sampling"),
        ({"seed": -1}, "seed must lie between 0"),
        ({"seed": 2**63}, "seed must lie between 0"),
        ({"num_samples": 2}, "need sampling"),
    ],
)
def test_bad_options_are_one_sentence(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generation(folder, **options)


def test_prompts_beyond_the_limit_of_the_model_are_refused(folder):
    assert generation(folder, prompt="x" * 28).run()["samples"][0]["num_prompt_tokens"] == 28
    with pytest.raises(ValueError, match="29 tokens and 4 are to be added, but the model takes 32 in all"):
        generation(folder, prompt="x" * 29).run()


def test_a_prompt_without_a_token_is_refused(folder, tmp_path):
    normalizing = json.loads((folder / "tokenizer.json").read_text())
    normalizing["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(normalizing))
    with pytest.raises(ValueError, match="the prompt has no token"):
        generation(tmp_path, prompt="   ").run()


def test_missing_and_unreadable_files_are_one_sentence(folder, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        generation(folder, prompt=None, prompt_file=str(tmp_path / "latin.txt"))
    with pytest.raises(FileNotFoundError, match="prompt_file=nowhere does not exist"):
        generation(folder, prompt=None, prompt_file="nowhere")
    with pytest.raises(FileNotFoundError, match="is no model folder"):
        generation(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="has no tokenizer"):
        generation(tmp_path).run()
