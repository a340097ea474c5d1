"""LongPPL and position buckets of a validation equal a loop over its sequences."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from callbacks.long_perplexity import LongPerplexity
from lightning_modules.token_weighting import TokenWeightedLM


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    with torch.no_grad():  # sharp enough for some tokens to differ by nats
        model.lm_head.weight.mul_(60)
    return model


def make_batches():
    ids = torch.randint(13, (3, 40), generator=torch.Generator().manual_seed(4))
    valid = torch.arange(1, 40) < torch.tensor([40, 31, 9])[:, None]
    rows = {"input_ids": ids, "valid": valid}
    return [{name: value[part] for name, value in rows.items()} for part in ([0, 1], [2])]


def nll_of(model, tokens):
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def by_loop(model, evaluator):
    """Key tokens from single windows of 8 + 4 tokens; losses of the model over them, and in buckets."""
    key_losses, buckets = [], {(0, 16): [], (16, 40): []}
    for batch in make_batches():
        for ids, valid in zip(batch["input_ids"], batch["valid"], strict=True):
            full, long = nll_of(model, ids), nll_of(evaluator, ids)
            for start in range(4, 40, 4):
                end = min(start + 12, 40)
                short = nll_of(evaluator, ids[start:end])
                for position in range(start + 8, end):
                    t = position - 1
                    gained = short[position - start - 1] - long[t] > 0.01 and long[t] < 30
                    if valid[t] and gained and end - start > 8:
                        key_losses.append(full[t])
            for (a, b), values in buckets.items():
                values += [full[t] for t in range(39) if valid[t] and a <= t + 1 < b]
    return key_losses, {k: torch.stack(v).mean().item() for k, v in buckets.items()}


@pytest.mark.parametrize("own", [True, False])
def test_validation_equals_a_loop(own, tmp_path):
    evaluator = tiny_llama(1)
    evaluator.save_pretrained(tmp_path)
    options = {"alpha": 0.01, "beta": -30.0, "position_edges": (0, 16, 40), "evaluator": None if own else str(tmp_path)}
    callback = LongPerplexity(context_length=8, stride=4, **options)
    module = TokenWeightedLM(tiny_llama(), "ce", base_length=8, base_stride=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False)
    logged = trainer.validate(module, DataLoader(make_batches(), batch_size=None), verbose=False)[0]
    losses, buckets = by_loop(module.model, module.model if own else evaluator)
    assert len(losses) > 5
    assert callback.last_result["long_perplexity"]["num_key_tokens"] == len(losses)
    assert logged["val/long_ppl"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-4)
    assert logged["val/key_token_share"] == pytest.approx(len(losses) / (39 + 30 + 8))
    assert logged["val/ce_0_16"] == pytest.approx(buckets[0, 16], rel=1e-5)
    assert logged["val/ce_16_40"] == pytest.approx(buckets[16, 40], rel=1e-5)


def test_no_key_token_gives_no_value():
    callback = LongPerplexity(context_length=8, stride=4, alpha=1e9)
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False)
    module = TokenWeightedLM(tiny_llama(), "ce", base_length=8, base_stride=4)
    logged = trainer.validate(module, DataLoader(make_batches(), batch_size=None), verbose=False)[0]
    assert "val/long_ppl" not in logged and logged["val/key_token_share"] == 0


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="stride"):
        LongPerplexity(stride=0)
