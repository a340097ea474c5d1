"""Rows, tiny models and an obvious loss, shared by the tests of KV compression training."""

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from lightning_modules.kv_compression import KVCompressionLM
from patches.sentinel import Sentinels, SpanLayout

SENTINELS = Sentinels(100, (101, 102))
SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
# Of two rows; the second has a span at its end and two adjacent ones.
SPANS = [[(2, 9), (14, 18)], [(0, 4), (4, 8), (12, 17)]]
LORA = {"r": 4, "lora_alpha": 8}


def tiny_model(*, family="llama", tied=False, seed=0, vocab_size=128):
    torch.manual_seed(seed)
    shape = SIZES | {"num_attention_heads": 4, "initializer_range": 0.2, "vocab_size": vocab_size}
    shape |= {"tie_word_embeddings": tied, "pad_token_id": 0}
    config = LlamaConfig(**shape, num_key_value_heads=2) if family == "llama" else GPTNeoXConfig(**shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def rows(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (size,), generator=draw) for size in (20, 17)]


def batch(seed=1):
    layout = SpanLayout.from_spans(rows(seed), SPANS, SENTINELS)
    return {"input_ids": layout.input_ids, "kind": layout.kind, "span": layout.span}


def plain_batch(**more):
    ids = torch.nn.utils.rnn.pad_sequence(rows(), batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(20) < torch.tensor([[20], [17]])).long()} | more


def make(model=None, **options):
    return KVCompressionLM(model or tiny_model(), **{"sentinels": SENTINELS, "lora": LORA} | options)


def randomise_adapters(module, scale=0.1):
    """Give the second factors of the adapters values, so that the adapters do something."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=draw))


def obvious_loss(model, mask, ids, positions, targets):
    """Sum of -log p in loops; targets are (row, query column, token), the sentinels cannot be predicted."""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.clone()
    logits[..., list(SENTINELS.ids)] = float("-inf")
    return -sum(logits[row, column].log_softmax(-1)[token] for row, column, token in targets)
