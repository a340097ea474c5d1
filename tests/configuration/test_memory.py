"""Memory of a step by strategy, and the dry run of every recipe under every trainer."""

import pytest
import torch
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from configuration.compose import compose, group_choices, recipe_names
from configuration.memory import StepMemory, step_memory
from configuration.memory_step import blank_module
from configuration.sizes import describe, memory_lines, work_lines

DEEPSPEED = "callbacks.sharded_strategies.ShardedDeepSpeed"
SHAPE = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {
    "_target_": "transformers.AutoModelForCausalLM.from_config",
    "_partial_": True,
    "config": LlamaConfig(**SHAPE, **HEADS),
}
MODULE = {
    "_target_": "lightning_modules.causal_lm.CausalLMModule",
    "model": LLAMA,
    "max_steps": 1,
    "optimization": {"_target_": "lightning_modules.optimization.Optimization"},
}


def llama():
    return LlamaForCausalLM(LLAMA["config"])


def recipe(strategy="auto", precision="32-true", **trainer):
    trainer = {"accelerator": "cpu", "strategy": strategy, "precision": precision, **trainer}
    return {"trainer": trainer, "data": {"batch_size": 2, "context_length": 48}, "module": MODULE, "model": LLAMA}


def memory(config, processes=1):
    return step_memory(blank_module(config), config, processes=processes)


def test_states_are_those_of_a_real_step():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(500, (2, 48))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    found = memory(recipe())
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert found.moments == sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert found.copies == found.update == found.host == 0


def test_the_fullest_moment():
    found = memory(recipe())
    assert found.device == found.weights + found.moments + found.together
    assert found.activations <= found.together < found.activations + found.gradients
    accumulated = memory(recipe(accumulate_grad_batches=2))
    assert accumulated.together == found.activations + found.gradients
    update = StepMemory(weights=1, gradients=10, moments=20, together=15, update=10)
    assert update.device == 1 + 20 + 20  # after the backward pass more is needed than in it


def test_buckets_of_several_processes_and_roots_on_a_gpu():
    alone, two = memory(recipe()), memory(recipe(), processes=2)
    assert two.copies == two.gradients and two.device == alone.device + alone.gradients
    views = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "gradient_as_bucket_view": True}
    assert memory(recipe(views), processes=2).copies == 0
    assert memory(recipe({"_target_": views["_target_"]})).copies == alone.gradients
    assert memory(recipe(precision="bf16-mixed", accelerator="gpu")).update == alone.gradients
    assert memory(recipe(precision="bf16-true")).weights == alone.weights // 2


def test_strategies_share_the_states():
    size = sum(p.numel() for p in llama().parameters())
    layer = sum(p.numel() for p in llama().model.layers[0].parameters())
    zero_2, zero_3, offload = (
        memory(recipe({"_target_": DEEPSPEED, **options}, None, plugins=[{"precision": "bf16-mixed"}]), processes=4)
        for options in ({"stage": 2}, {"stage": 3}, {"stage": 3, "offload_optimizer": True})
    )
    assert (zero_2.weights, zero_2.gradients, zero_2.moments) == (2 * size, 2 * size // 4, 12 * size // 4)
    assert zero_3.weights == 2 * size // 4 and zero_3.copies == 2 * layer and zero_3.host == 0
    assert offload.host == offload.moments == zero_3.moments and offload.device == zero_3.device - zero_3.moments
    fsdp = memory(recipe({"_target_": "callbacks.sharded_strategies.FullyShardedData"}), processes=4)
    outside = size - 3 * layer
    assert (fsdp.weights, fsdp.gradients, fsdp.moments) == (size, size, 2 * size)
    assert fsdp.copies == 2 * 4 * (outside + 2 * layer)
    assert set(memory_lines(offload)) == {"memory a device", "memory of the host"}


def test_what_cannot_be_counted_is_said(monkeypatch, caplog):
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids, **_: input_ids.sum().item())
    found = memory(recipe())
    assert found.activations is None and "activations not known" in memory_lines(found)["memory a device"]
    assert "not counted" in caplog.text and found.device == found.weights + found.gradients + found.moments


def test_the_least_time_of_a_step(monkeypatch):
    assert set(work_lines(llama(), 10, length=5, devices=1)) == {"work per step"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    text = work_lines(llama(), 312 * 10**6, length=5, devices=2)["time of a step"]
    seconds = 6 * sum(p.numel() for p in llama().parameters()) / 1e6 / 2
    assert f"at least {seconds:.3g} s" in text and "2 x NVIDIA A100" in text


@pytest.fixture
def hub(monkeypatch):
    """Configurations of the models that recipes load by name or from a run."""
    llama = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    neox = {"vocab_size": 50432, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32}
    drt = compose(["recipe=pg19_gca"], command="train")["model"]["config"]
    from configuration.targets import build

    def configuration(path, **_):
        if path.startswith("runs/"):
            return build(drt)
        if "Llama" in path:
            return LlamaConfig(**llama, num_attention_heads=32, num_key_value_heads=8)
        return GPTNeoXConfig(**neox, num_attention_heads=32)

    monkeypatch.setattr(AutoConfig, "from_pretrained", configuration)


def dry(name, *arguments):
    config = compose([f"recipe={name}", *arguments], command="train")
    return dict(line.split("  ", 1) for line in describe(config).splitlines())


# One of each kind in every run of the tests; their siblings with -m slow.
KINDS = ["pg19_gca", "pg19_landmark", "pg19_rpt_bm25", "pg19_sparse", "wikitext2_sentinel_lora", "xsum_gca"]


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in recipe_names("train")]
)
def test_every_recipe_tells_its_memory(name, hub):
    places = ["data.path=none"] if "wikitext2" in name else []
    assert "activations 0." in dry(name, "scale=tiny", *places)["memory a device"]


@pytest.mark.parametrize("trainer", group_choices()["trainer"])
def test_every_trainer_tells_its_memory(trainer):
    assert (
        "activations 0."
        in dry("quickstart", "scale=tiny", f"trainer={trainer}", "trainer.devices=2")["memory a device"]
    )


@pytest.mark.parametrize(
    ("name", "parameters", "trained"),
    [
        ("pg19_dense_lora", 8_043_892_736, 13_631_488),
        ("xsum_gca", 145_980_672, 145_980_672),
    ],
)
def test_models_that_are_loaded(name, parameters, trained, hub):
    places = ["data.path=none"] if "wikitext2" in name else []
    lines = dry(name, *places)
    assert f"{parameters:,}, trainable {trained:,}" in lines["parameters"]
    assert "not known" not in lines["memory a device"]
