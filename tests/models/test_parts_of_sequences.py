"""A sequence shared by processes: logits, retrieval and every gradient are those of one process that has all of it."""

import pytest
import torch
import torch.distributed as dist

from kernels.context_parallel import Cut, SequenceGroup, SequencePart
from losses.cross_entropy import next_token_nll
from models.drt import DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMForCausalLM
from tests.models.model_cases import TEXT_IDS, drt_config, window_config
from tests.processes import run_in_processes

# Processes, tokens, rows of a batch; chunks hold 5: uneven parts, tails without a chunk, single chunks.
SHAPES = [(2, 40, 1), (2, 23, 2), (3, 57, 2), (4, 85, 1)]


def drt(**changes):
    return DRTForCausalLM(drt_config(**{"window_size": 6} | changes)), {"retrieval_generator": True}


MODELS = {
    "drt": drt,
    "drt off by one, no noise": lambda: drt(softmax_off_by_one=True, retrieval_noise=None, layers_per_group=[2]),
    "drt whose window is itself": lambda: drt(window_size=1),
    "sliding window": lambda: (SlidingWindowLMForCausalLM(window_config(window_size=10)), {}),
}


def gradients(model, logits, labels, next_token):
    """Gradients of the summed loss."""
    model.zero_grad()
    next_token_nll(logits, labels, next_token=next_token)[0].sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare(make, group, length, batch, checkpointing):
    torch.manual_seed(0)
    model, options = make()
    model.double().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, next_token = torch.randint(TEXT_IDS, (batch, length)), torch.randint(TEXT_IDS, (batch,))
    if options:
        options = {"retrieval_generator": torch.arange(batch) + 7, "output_retrieval": True}
    whole = model(input_ids=ids, use_cache=False, **options)
    true = gradients(model, whole.logits, ids, next_token)

    part = group.part(length, model.sequence_cut)
    own = slice(part.start, part.stop)
    found = model(input_ids=ids[:, own], part=part, **options)
    torch.testing.assert_close(found.logits, whole.logits[:, own], rtol=0, atol=1e-12)
    for (indices, weights), (all_indices, all_weights) in zip(
        found.get("retrieval") or (), whole.get("retrieval") or (), strict=True
    ):
        first = part.start // model.sequence_cut.unit
        assert torch.equal(indices, all_indices[:, first : first + indices.shape[1]])
        torch.testing.assert_close(weights, all_weights[:, first : first + indices.shape[1]], rtol=0, atol=1e-12)
    following = next_token if part.stop == length else ids[:, part.stop]
    for name, gradient in gradients(model, found.logits, ids[:, own], following).items():
        dist.all_reduce(gradient, group=group.process_group)
        assert (gradient - true[name]).norm() <= 1e-11 * true[name].norm() + 1e-15, name


def all_of_it():
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for size, length, batch in SHAPES:
        for name, make in MODELS.items():
            if dist.get_rank() < size:
                group = SequenceGroup(list(range(size)), dist.get_rank(), groups[size])
                compare(make, group, length, batch, checkpointing=name == "drt" and size == 3)
    dist.barrier()


def test_parts_are_the_whole():
    assert run_in_processes(4, all_of_it) == [0] * 4


@pytest.mark.parametrize(
    ("model", "cut"),
    [
        (DRTForCausalLM(drt_config(chunk_size=5, window_size=13)), Cut(5, 10)),
        (DRTForCausalLM(drt_config(chunk_size=5, window_size=14)), Cut(5, 15)),
        (SlidingWindowLMForCausalLM(window_config(window_size=9)), Cut(1, 8)),
    ],
)
def test_parts_hold_what_a_window_reaches(model, cut):
    assert model.sequence_cut == cut


@pytest.mark.parametrize("make", [drt, lambda: (SlidingWindowLMForCausalLM(window_config()), {})])
def test_what_needs_the_whole_sequence_is_refused(make):
    model, _ = make()
    part = SequencePart((0, 10, 20), SequenceGroup([0, 1], 0, None))
    ids = torch.zeros(1, 10, dtype=torch.long)
    for name in ("labels", "document_ids", "attention_mask"):
        with pytest.raises(ValueError, match=f"part cannot be combined with {name}"):
            model(input_ids=ids, part=part, **{name: torch.ones_like(ids)})
    with pytest.raises(ValueError, match="part has tokens 0 to 10 of a sequence"):
        model(input_ids=ids[:, :5], part=part)


def test_noise_without_seeds_is_refused():
    part = SequencePart((0, 10, 20), SequenceGroup([0, 1], 0, None))
    with pytest.raises(ValueError, match="the noise of a part follows from seeds of its rows"):
        drt()[0].train()(input_ids=torch.zeros(1, 10, dtype=torch.long), part=part)
