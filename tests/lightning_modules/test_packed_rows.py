"""Packed documents: kept apart in every model, and every target of a step counts the same."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from weighted_step import Gradients

from lightning_modules.batch_targets import labels_inside_documents, num_targets
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.optimization import Optimization
from lightning_modules.packed_rows import document_inputs, restarting_positions
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

# Lengths of the documents of each row of 24 tokens.
DOCUMENTS = ([24], [3, 9, 12], [1, 1, 20, 2], [11, 13])


def llama():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def sliding_window():
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return SlidingWindowLMForCausalLM(SlidingWindowLMConfig(**sizes, **ids, num_attention_heads=4, window_size=8))


def rows():
    ids = torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(0))
    numbers = [torch.repeat_interleave(torch.arange(len(d)), torch.tensor(d)) for d in DOCUMENTS]
    return {"input_ids": ids, "labels": ids.clone(), "document_ids": torch.stack(numbers)}


def obvious_loss(model, batch):
    """Every document by itself, one after the other; the sum over all targets divided by their number."""
    total, count = 0.0, 0
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        for number in documents.unique():
            own = ids[documents == number][None]
            if own.shape[1] > 1:
                logits = model(input_ids=own, use_cache=False).logits[0, :-1].double()
                total = total + torch.nn.functional.cross_entropy(logits, own[0, 1:], reduction="sum")
                count += own.shape[1] - 1
    return total / count


def test_positions_begin_anew_in_every_document():
    documents = torch.tensor([[4, 4, 4, 7, 8, 8], [0, 0, 0, 0, 0, 0]])
    assert restarting_positions(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]]


def test_labels_end_where_documents_begin():
    batch = rows()
    labels = labels_inside_documents(batch)
    assert int((labels[:, 1:] != -100).sum()) == int(num_targets(batch)) == 4 * 24 - sum(map(len, DOCUMENTS))
    assert labels_inside_documents({"labels": batch["labels"]}) is batch["labels"]


def fit(build, accumulate):
    batch, gradients = rows(), Gradients()
    per_batch = 4 // accumulate
    batches = [
        {name: value[i : i + per_batch] for name, value in batch.items()} | {"num_step_targets": num_targets(batch)}
        for i in range(0, 4, per_batch)
    ]
    optimization = Optimization(schedule="constant")
    module = CausalLMModule(build, optimization=optimization)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=accumulate,
        callbacks=[gradients],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return gradients.found


@pytest.mark.parametrize("build", [llama, sliding_window])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_gradient_of_packed_documents_is_that_of_the_documents_alone(build, accumulate):
    found = fit(build, accumulate)
    torch.manual_seed(0)
    model = build()
    obvious_loss(model, rows()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=2e-4, atol=1e-6)


def test_models_that_cannot_keep_documents_apart_are_refused():
    batch = rows()
    assert document_inputs(sliding_window(), batch).keys() == {"document_ids"}
    assert document_inputs(llama(), batch).keys() == {"position_ids"}
    with pytest.raises(ValueError, match=r"in padded rows: use data\.documents=stream"):
        document_inputs(llama(), batch | {"attention_mask": torch.ones(4, 24)})
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4))
    assert document_inputs(neox, batch).keys() == {"position_ids"}
    with pytest.raises(ValueError, match="Linear cannot keep packed documents apart"):
        document_inputs(torch.nn.Linear(1, 1), batch)
