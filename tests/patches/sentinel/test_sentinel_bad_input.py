"""What users get wrong: contexts of another model, and text that looks like sentinels."""

import pytest
import torch
from sentinel_cases import ONE, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from datamodules.sentinel_blocks import SentinelCollator
from patches.sentinel import PLAIN, CompressedContext, SentinelGenerator, SpanLayout, SpanSampler, compress
from preprocess.tokenizers import load_tokenizer


def test_a_context_of_another_model_is_refused(tmp_path):
    context = compress(tiny_model("llama"), torch.arange(3, 33)[None], ONE)
    context.save(tmp_path / "context")
    loaded = CompressedContext.load(tmp_path / "context")
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 4, "head_dim": 8}
    deeper = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=3, num_key_value_heads=2))
    with pytest.raises(ValueError, match="cache is of another model: it holds 2 layers of 2 heads, the model has 3"):
        loaded.extend(deeper, torch.tensor([[5]]))
    narrower = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=1))
    with pytest.raises(ValueError, match="the model has 2 of 1; continue it with the model that read"):
        generator = SentinelGenerator(ONE, context=loaded)
        narrower.generate(torch.tensor([[5]]), custom_generate=generator, max_new_tokens=2, pad_token_id=0)


def test_text_with_marks_is_text():
    tokenizer = load_tokenizer("bytes")
    ids = torch.tensor(tokenizer("a <CL> b <CR> c, <CL><CR>", add_special_tokens=False).input_ids)
    assert tokenizer.decode(ids) == "a <CL> b <CR> c, <CL><CR>"
    layout = SpanLayout.from_ids(ids[None], ONE.__class__(259, (260,)))
    assert (layout.kind == PLAIN).all()
    sentinels = ONE.__class__(259, (260,))
    batch = SentinelCollator(sentinels, SpanSampler(0.5))([{"input_ids": ids, "index": 0}])
    plain = batch["input_ids"][0][batch["kind"][0] == PLAIN]
    assert plain.equal(ids) and not torch.isin(plain, torch.tensor(sentinels.ids)).any()
