"""Predicted memory of a step against what a step holds, counted tensor by tensor, within 15 %."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configuration.memory import decoder_activations, step_memory
from configuration.training import memory_lines

DEEPSPEED = "callbacks.sharded_strategies.ShardedDeepSpeed"


def llama(**sizes):
    shape = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**shape | sizes, num_attention_heads=4, num_key_value_heads=2))


def kept_bytes(model, *, batch, length, low):
    """Storages that autograd keeps of a step, without weights, and the logits with their gradient."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    shapes = {tuple(s) for p in model.parameters() for s in (p.shape, p.shape[::-1])}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        # Autocast's copies of weights are not activations.
        if storage._cdata not in weights and tuple(tensor.shape) not in shapes:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.randint(500, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=low):
        logits = model(input_ids=ids, labels=ids, use_cache=False).logits
    return sum(storage.nbytes() for storage in kept.values()) + logits.nbytes + logits.numel() * 4


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_decoder(low, checkpointing):
    model = llama().train()
    found = kept_bytes(model, batch=2, length=48, low=low)
    precision = "bf16-mixed" if low else "32-true"
    predicted = decoder_activations(model.config, tokens=96, precision=precision, checkpointing=False)
    assert predicted == pytest.approx(found, rel=0.15)
    if checkpointing:
        less = decoder_activations(model.config, tokens=96, precision=precision, checkpointing=True)
        one_layer = predicted - decoder_activations(
            llama(num_hidden_layers=2).config, tokens=96, precision=precision, checkpointing=False
        )
        assert less == predicted - 3 * one_layer + one_layer + 96 * 3 * 64 * 4


def recipe(strategy="auto", precision="32-true", plugins=()):
    trainer = {"strategy": strategy, "precision": precision, "plugins": list(plugins)}
    return {"trainer": trainer, "data": {"batch_size": 2, "context_length": 48}, "module": {}}


def test_states_are_those_of_a_real_step():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(500, (2, 48))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    found = step_memory(model, recipe(), processes=1)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    assert found.moments == moments
    assert found.device == found.weights + found.gradients + found.moments + found.activations


def test_strategies_share_the_states():
    model = llama()
    size = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    zero_2, zero_3, offload = (
        step_memory(
            model,
            recipe({"_target_": DEEPSPEED, **options}, None, [{"precision": "bf16-mixed"}]),
            processes=4,
        )
        for options in ({"stage": 2}, {"stage": 3}, {"stage": 3, "offload_optimizer": True})
    )
    assert (zero_2.weights, zero_2.gradients, zero_2.moments) == (2 * size, 2 * size // 4, 12 * size // 4)
    assert zero_3.weights == 2 * size // 4 + 2 * layer and zero_3.host == 0
    assert offload.host == offload.moments == zero_3.moments and offload.device == zero_3.device - zero_3.moments
    fsdp = step_memory(model, recipe({"_target_": "callbacks.sharded_strategies.FullyShardedData"}), processes=4)
    assert (fsdp.weights, fsdp.gradients, fsdp.moments) == (size + 4 * layer, size, 2 * size)
    assert set(memory_lines(offload)) == {"memory a device", "memory of the host"}


def test_shapes_that_are_not_known_are_said_to_be():
    found = step_memory(torch.nn.Linear(4, 4), recipe(), processes=1)
    assert found.activations is None and "activations not known" in memory_lines(found)["memory a device"]
