"""Model folders are written whole, and nothing else is ever overwritten."""

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from configuration.export import save_model_folder

CONFIG = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG))


def test_a_model_folder_is_replaced_and_leaves_nothing_behind(model, tmp_path):
    folder, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    save_model_folder(model, folder, tokenizer=None)
    save_model_folder(model, folder, tokenizer=tokenizer)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokenizer"]


def test_anything_else_is_refused_and_kept(model, tmp_path):
    thesis = tmp_path / "work" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years")
    with pytest.raises(FileExistsError, match="is no model folder"):
        save_model_folder(model, thesis.parent, tokenizer=None)
    with pytest.raises(FileExistsError, match="is no model folder"):
        save_model_folder(model, thesis, tokenizer=None)
    assert thesis.read_text() == "years"
