"""Case T7: what scoring adds to a training step of a small Llama on a CPU."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import check, cpu_seconds
from benchmarks.registry import Row, case
from lightning_modules.token_weighting import TokenWeightedLM
from losses.base_scoring import pack_scores, score_base_nll

LENGTH, BASE_LENGTH, BASE_STRIDE, VOCABULARY = 4096, 1024, 768, 4096


def _module(weighting: str, scorer: str = "self") -> TokenWeightedLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    sizes = {"base_length": BASE_LENGTH, "base_stride": BASE_STRIDE, "position_edges": (0, LENGTH)}
    return TokenWeightedLM(LlamaForCausalLM(config), weighting, scorer=scorer, **sizes)  # type: ignore[arg-type]


def _batch(module: TokenWeightedLM, length: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
    scores = score_base_nll(
        module.model, ids, base_length=BASE_LENGTH, base_stride=BASE_STRIDE, first_window=module.scorer == "frozen"
    )
    return {
        "input_ids": ids,
        "valid": torch.ones(1, length - 1, dtype=torch.bool),
        "sequence_index": torch.zeros(1, dtype=torch.int64),
        "base_nll_bits": pack_scores(scores),
    }


def _step(module: TokenWeightedLM, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    module.model.zero_grad()
    loss, num_targets, _ = module.loss(batch)
    (loss / num_targets).backward()
    return {name: parameter.grad for name, parameter in module.model.named_parameters()}


def _dense_step(module: TokenWeightedLM, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same step from float64 logits and one forward pass for every window."""
    model, ids = _module("dense").model.double(), batch["input_ids"]
    nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")[None]
    base = score_base_nll(model, ids, base_length=BASE_LENGTH, base_stride=BASE_STRIDE, windows_per_forward=1)
    weights = module.weighting.weights(nll.detach(), base, batch["valid"])
    (weights * nll).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@case("T7", group="token_weighting")
def scored_steps() -> Iterator[Row]:
    plain, scored, frozen = _module("ce"), _module("dense"), _module("dense", "frozen")
    short = _batch(scored, 2048)
    check(_step(scored, short), _dense_step(scored, short), 1e-4)
    batch = _batch(frozen, LENGTH)
    best = cpu_seconds({name: partial(_step, m, batch) for name, m in (("p", plain), ("s", scored), ("f", frozen))})
    shape = f"{LENGTH} tokens, windows of {BASE_LENGTH} every {BASE_STRIDE}, width 256, 4 layers"
    peer = "plain cross entropy"
    yield Row(shape, "self-scored step, CPU s", best["s"], peer, best["p"], 1.35, "lower")
    yield Row(shape, "step with stored scores, CPU s", best["f"], peer, best["p"], 1.02, "lower")
