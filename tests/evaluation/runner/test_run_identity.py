"""What tells models and tokenizers apart in the settings of a run."""

import pytest
import torch
from byte_llama import tiny_llama
from tokenizers.normalizers import Lowercase
from torch import nn

from evaluation.runner import AnswerOptions, TaskRun
from evaluation.runner.identity import model_entries, model_fingerprint, tokenizer_entries
from evaluation.tasks import get_task
from preprocess.tokenizers import byte_tokenizer


def module(weight):
    found = nn.Module()
    found.weight = nn.Parameter(weight)
    return found


@pytest.mark.parametrize("size", [0, 1, 2, 16, 40])
def test_first_and_last_values_count(size):
    weight = torch.arange(float(size))
    found = {model_fingerprint(module(weight))}
    for place in {0, size - 1} if size else ():
        changed = weight.clone()
        changed[place] += 0.5
        found.add(model_fingerprint(module(changed)))
    assert len(found) == 1 + min(size, 2)


def test_embeddings_of_large_models_have_a_last_place():
    # 32,000 x 4,096: float32 has no 131,071,999.
    assert model_fingerprint(module(torch.zeros(1).expand(32000 * 4096))).startswith("sha256:")


def test_one_changed_weight_anywhere_counts():
    weight = torch.arange(1000.0)
    changed = weight.clone()
    changed[5] += 0.5  # none of the values that are looked at
    assert model_fingerprint(module(weight)) != model_fingerprint(module(changed))
    assert model_fingerprint(module(weight.bfloat16())) != model_fingerprint(module(weight))


def test_what_changes_answers_is_part_of_the_identity():
    model = tiny_llama()
    first = model_entries(model)
    assert first["device"] == "cpu" and first["versions"]["torch"] == torch.__version__
    model.config.rms_norm_eps = 1e-3
    assert {key for key, value in model_entries(model).items() if first[key] != value} == {"model_config"}
    model.config._name_or_path, model.config.rms_norm_eps = "another/place", 1e-6
    assert model_entries(model) == first
    model.generation_config.repetition_penalty = 1.5
    assert {key for key, value in model_entries(model).items() if first[key] != value} == {"generation_config"}


def test_templates_and_rules_of_tokenizers_are_part_of_the_identity():
    tokenizer = byte_tokenizer()
    first = tokenizer_entries(tokenizer, chat=False)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_entries(tokenizer, chat=False) == first and first["chat_template"] is None
    tokenizer.chat_template = "{{ messages }}"
    asked = tokenizer_entries(tokenizer, chat=True)
    tokenizer.chat_template = "{{ messages[0] }}"
    assert asked["tokenizer"] == first["tokenizer"]
    assert tokenizer_entries(tokenizer, chat=True)["chat_template"] != asked["chat_template"]
    assert asked["chat_template"] is not None
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert tokenizer_entries(tokenizer, chat=False)["tokenizer"] != first["tokenizer"]


def test_batches_count_where_padding_can_change_answers(tokenizer):
    task = get_task("ruler/passkey")
    examples = [task.example({"instruction": "a", "context": "b", "query": "c", "outputs": ["d"]})]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        run = TaskRun(task, None, tiny_llama().to(dtype), tokenizer, examples, answers=AnswerOptions(batch_size=3))
        found[dtype] = run.protocol()["batch_size"]
    assert found == {torch.float32: None, torch.bfloat16: 3}
