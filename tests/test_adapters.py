"""Runs with adapters: checkpoints without the frozen weights, bit-identical resumes, adapter folders and exports."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configuration.check import check
from configuration.compose import compose
from configuration.export import CheckpointExport
from configuration.training import run

STEPS = 4
KV = ["recipe=wikitext2_sentinel_lora", "callbacks.compression_perplexity.num_blocks=2"]
WEIGHTED = ["recipe=pg19_longce", "module.lora={r: 4, lora_alpha: 8}"]


def train(arguments, corpus, output, *more):
    place = f"data.path={corpus}" if arguments is KV else f"prepare.corpus={corpus}"
    options = [f"trainer.max_steps={STEPS}", "trainer.enable_progress_bar=false", "eval_every_n_steps=null"]
    options += ["callbacks.checkpoint.every_n_train_steps=2", "callbacks.checkpoint.keep_last=null", *more]
    config = compose([*arguments, "scale=tiny", place, f"output={output}", *options], command="train")
    check(config)
    run(config)
    return output


def checkpoint(folder, step):
    return torch.load(folder / "checkpoints" / f"step_{step}.ckpt", weights_only=True)


@pytest.mark.parametrize("arguments", [KV, WEIGHTED], ids=["kv_compression", "token_weighting"])
def test_a_run_with_adapters(arguments, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = train(arguments, tiny_corpus, tmp_path / "whole")
    stored = checkpoint(whole, STEPS)
    names = set(stored["state_dict"])
    assert names and all("lora_" in name or "trainable_tokens" in name for name in names)
    moments = stored["optimizer_states"][0]["state"]
    # A tied row has two names.
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in stored["state_dict"].values()}
    assert len(moments) == len(distinct)

    half = whole / "checkpoints" / "step_2.ckpt"
    resumed = train(arguments, tiny_corpus, tmp_path / "resumed", f"resume={half}", "export_model=false")
    again = checkpoint(resumed, STEPS)
    assert again["state_dict"].keys() == names
    for name, tensor in stored["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name
        assert not torch.equal(tensor, checkpoint(whole, 2)["state_dict"][name]), name
    for number, state in moments.items():
        other = again["optimizer_states"][0]["state"][number]
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(other[key])) for key in state)

    exported = CheckpointExport(str(whole), output=str(tmp_path / "export")).run(None)["model"]
    one, two = (load_file(f"{folder}/model.safetensors") for folder in (exported, whole / "model"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not any("lora" in name for name in one)
    adapter = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert sum(map(torch.numel, adapter.values())) == sum(distinct.values())
    assert json.loads((whole / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.arange(3, 40)[None]
    assert model(ids).logits.isfinite().all()
    has_rows = arguments is KV
    assert (tmp_path / "export" / "sentinels.json").is_file() == has_rows

    # The weights under the adapters come from the run's seed: with another seed they are others.
    with pytest.raises(ValueError, match="other frozen weights"):
        train(arguments, tiny_corpus, tmp_path / "other", f"resume={half}", "module.seed=7", "export_model=false")
    half_precision = CheckpointExport(str(half), output=str(tmp_path / "bf16"), dtype="bfloat16").run(None)
    assert load_file(f"{half_precision['model']}/model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_adapters_on_weights_drawn_in_low_precision_are_exported(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder = train(KV, tiny_corpus, tmp_path / "run", "trainer.precision=bf16-true", "trainer.max_steps=2")
    exported = CheckpointExport(str(run_folder), output=str(tmp_path / "export"), dtype="bfloat16").run(None)["model"]
    one, two = (load_file(f"{folder}/model.safetensors") for folder in (exported, run_folder / "model"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # adapters are added before what is exported is rounded, and after in the run
        torch.testing.assert_close(tensor, two[name], rtol=2**-7, atol=1e-3)
