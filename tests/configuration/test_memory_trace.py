"""What a traced step holds against what the allocator hands out in a real one, within 15 %."""

import functools

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import allocations
from configuration import memory_step
from configuration.compose import compose
from configuration.memory_step import blank_module, trace_module
from configuration.memory_trace import LiveBytes, place_weights, trace_step, without_data
from kernels.context_parallel import SequenceGroup
from losses.cross_entropy import next_token_nll
from models.block_recurrent import BlockRecurrentConfig
from models.drt import DRTConfig
from models.landmark import LandmarkConfig
from models.rpt import RPTConfig
from models.sliding_window_lm import SlidingWindowLMConfig
from tests.processes import run_in_processes

IDS = {"vocab_size": 515, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 2}
SIZES = IDS | {"hidden_size": 96, "intermediate_size": 232, "num_attention_heads": 4}
CHUNKS = {"num_lower_layers": 1, "num_encoder_layers": 1, "chunk_size": 21, "chunk_top_k": 3, "window_size": 65}
MODELS = {
    "drt": DRTConfig(**SIZES, **CHUNKS, layers_per_group=[1, 2], landmark_token_id=514, num_key_value_heads=2),
    "window": SlidingWindowLMConfig(**SIZES, num_hidden_layers=3, window_size=65),
    "llama": LlamaConfig(**SIZES, num_hidden_layers=3, num_key_value_heads=2),
    "block": BlockRecurrentConfig(**SIZES, num_hidden_layers=2, recurrent_layers=[1], block_width=64),
    "landmark": LandmarkConfig(**SIZES, num_hidden_layers=3, chunk_size=21, landmark_token_id=514),
    "rpt": RPTConfig(**SIZES, **CHUNKS, num_upper_layers=2, retriever="bm25"),
}
ROWS, LENGTH = 2, 331


def built(name, checkpointing=False):
    model = AutoModelForCausalLM.from_config(MODELS[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=torch.tensor(7)).loss


def traced(name, low, checkpointing=False):
    with torch.device("meta"):
        model = built(name, checkpointing)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    with without_data(like_gpu=False):
        place_weights(model)
        return trace_step(model, lambda: loss_of(model, ids), low=low)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_every_model(name, low):
    model, ids = built(name), torch.randint(3, 500, (ROWS, LENGTH))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = loss_of(model, ids)
        loss.backward()

    step()
    model.zero_grad()
    assert traced(name, low).most_together == pytest.approx(allocations(step)[0], rel=0.15)


@pytest.mark.parametrize("name", ["drt", "llama"])
def test_a_step_that_recomputes_its_layers(name):
    model, ids = built(name, checkpointing=True), torch.randint(3, 500, (ROWS, LENGTH))
    found = traced(name, False, checkpointing=True)
    assert found.most_together == pytest.approx(allocations(lambda: loss_of(model, ids).backward())[0], rel=0.15)
    assert found.kept < 0.4 * traced(name, False).kept


@pytest.mark.parametrize("name", ["drt", "window", "llama"])
def test_what_is_kept_are_the_saved_tensors(name):
    model, ids = built(name), torch.randint(3, 500, (ROWS, LENGTH))
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, ids)
    assert traced(name, False).kept == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.05)


def test_live_bytes_count_storages_while_they_live():
    weight = torch.nn.Parameter(torch.ones(10))
    weight.register_post_accumulate_grad_hook((live := LiveBytes()).keep_apart)
    with live:
        product = weight * 2
        view = product.view(2, 5)
        assert live.others == live.most == 40
        total = view.sum()
        del view, product
        assert live.others == total.nbytes  # a sum keeps no input
        total.backward()
    # The sum, its gradient, and that of the weight; never the product too.
    assert live.gradients == weight.grad.nbytes and live.most_together == 4 + 4 + 40


RECIPES = {
    "token_weighting": ["recipe=pg19_dense", "prepare.corpus=none"],
    "lora": ["recipe=pg19_dense_lora", "prepare.corpus=none"],
    "sentinel": ["recipe=wikitext2_sentinel_lora", "data.path=none", "data.context_length=131"],
    "scattered": ["recipe=wikitext2_scattered_lora", "data.path=none", "data.context_length=131"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_other_losses(name):
    config = compose([*RECIPES[name], "scale=tiny"], command="train")
    found = trace_module(blank_module(config), config)
    module = memory_step.build(config["module"], "module")
    module.configure_model()
    length = config["data"].get("context_length") or config["module"]["context_length"]
    step = memory_step._loss_of(module, memory_step._blank_batch(module, config["data"], length))
    step().backward()
    module.zero_grad()
    assert found.most_together == pytest.approx(allocations(lambda: step().backward())[0], rel=0.15)


@pytest.mark.parametrize(("recipe", "length"), [("quickstart", 400), ("pg19_block_recurrent", 256)])
def test_long_sequences_are_continued_in_a_line(recipe, length, monkeypatch):
    arguments = [f"recipe={recipe}", "scale=tiny", "data.path=none", f"data.context_length={length}"]
    config = compose(arguments, command="train")
    monkeypatch.setattr(memory_step, "LONGEST_WALK", 100)
    whole = trace_module(blank_module(config), config)
    monkeypatch.setattr(memory_step, "LONGEST", 270)
    monkeypatch.setattr(memory_step, "LONGEST_WALK", 4)
    found = trace_module(blank_module(config), config)
    assert found.kept == pytest.approx(whole.kept, rel=0.03)
    assert found.most_together == pytest.approx(whole.most_together, rel=0.03) and found != whole


def peak_of_a_part(folder, name, length):
    """Write what a process allocates in a step of its part."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, ids = built(name), torch.randint(3, 500, (ROWS, length))
    group = SequenceGroup([0, 1], dist.get_rank(), dist.group.WORLD)
    part = group.part(length, model.sequence_cut)
    own = ids[:, part.start : part.stop]

    def step():
        logits = model(input_ids=own, part=part, retrieval_generator=torch.arange(ROWS)).logits
        next_token_nll(logits, own, next_token=None)[0].sum().backward()

    step()
    model.zero_grad()
    (folder / f"{dist.get_rank()}").write_text(str(allocations(step)[0]))


def test_a_part_of_a_sequence(tmp_path):
    length = 663
    assert run_in_processes(2, functools.partial(peak_of_a_part, tmp_path, "drt", length)) == [0, 0]
    config = compose(["recipe=quickstart", "scale=tiny", "data.path=none"], command="train")
    config["data"] |= {"batch_size": ROWS, "context_length": length}
    config["module"]["model"] = config["model"] = {
        "_target_": "transformers.AutoModelForCausalLM.from_config",
        "_partial_": True,
        "config": MODELS["drt"],
    }
    found = trace_module(blank_module(config), config, context_parallel_size=2)
    assert found.most_together == pytest.approx(int((tmp_path / "1").read_text()), rel=0.15)
