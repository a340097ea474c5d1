"""Ranks with other numbers of calls meet in each of them: simulated, and in two processes that wait for each other."""

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.equal_calls import EqualCalls
from tests.processes import run_in_processes

DECODER, HEAD, NOTHING = 0, 1, 2


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, attention_dropout=0.5, **sizes))


class Sharded(pl.strategies.SingleDeviceStrategy):
    """A rank of two; the other one has calls of its own."""

    zero_stage_3 = True

    def __init__(self, others):
        super().__init__("cpu")
        self.others = others

    def reduce(self, tensor, *_, reduce_op="mean", **__):
        assert reduce_op == "max"
        turn = min(-int(tensor), *self.others[:1], NOTHING)
        if self.others and self.others[0] == turn:
            self.others.pop(0)
        return torch.tensor(-float(turn))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], "dh"),
        ([DECODER, HEAD], "dh"),
        ([DECODER, HEAD, DECODER, DECODER, HEAD], "dhddh"),
        ([DECODER, DECODER, HEAD], "ddh"),
        ([HEAD], "dh"),
    ],
)
def test_a_rank_takes_part_in_the_calls_of_the_other(others, expected):
    model, calls = tiny_llama().train(), []
    model.model.register_forward_hook(lambda *_: calls.append("d"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("h"))
    torch.manual_seed(1)
    reference = model(torch.tensor([[1, 2]])).logits
    drawn, strategy = torch.get_rng_state(), Sharded(list(others))
    calls.clear()
    torch.manual_seed(1)
    with EqualCalls(strategy, model) as equal:
        logits = model(torch.tensor([[1, 2]])).logits
        equal.meet()
        equal.meet()
    assert "".join(calls) == expected and not strategy.others
    assert torch.equal(logits, reference) and torch.equal(torch.get_rng_state(), drawn) and model.training
    assert not model.model._forward_pre_hooks and not model.lm_head._forward_pre_hooks


def test_where_a_rank_has_all_weights_nothing_is_done():
    model = tiny_llama()
    for strategy in (None, pl.strategies.SingleDeviceStrategy("cpu")):
        with EqualCalls(strategy, model) as equal:
            assert not model.model._forward_pre_hooks
            equal.meet()


def call_unequally():
    """Both parts wait for the other process, as gathered weights do; the ranks have 3 and 0 calls."""
    torch.distributed.init_process_group("gloo")
    model, strategy, group = tiny_llama(), Sharded([]), torch.distributed.new_group()

    def gather(*_):
        torch.distributed.barrier(group)

    def reduce(tensor, *_, **__):
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    model.model.register_forward_pre_hook(gather)
    model.lm_head.register_forward_pre_hook(gather)
    strategy.reduce = reduce
    with EqualCalls(strategy, model) as equal:
        for _ in range(3 if torch.distributed.get_rank() == 0 else 0):
            model(torch.tensor([[1, 2]]))
        equal.meet()


def test_two_processes_do_not_wait_for_ever():
    assert run_in_processes(2, call_unequally, timeout=30) == [0, 0]
