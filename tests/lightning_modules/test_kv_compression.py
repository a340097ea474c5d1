"""KV compression training: losses against loops, what trains, what is saved."""

import math
from itertools import pairwise

import pytest
import torch
from compression_cases import (
    SENTINELS,
    SPANS,
    batch,
    make,
    obvious_loss,
    plain_batch,
    randomise_adapters,
    rows,
    tiny_model,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_modules.kv_compression import KVCompressionLM
from patches.compressed_rows import Compression
from patches.rules import dense_mask, sentinel
from patches.sentinel import PLAIN, Sentinels, SpanLayout, suppress

BASELINES = {
    "dense": lambda query, key, keep: True,
    "local": lambda query, key, keep: key >= math.floor(query * 0.6),
    "scattered": lambda query, key, keep: bool(keep[key]) or key == query,
    "streaming": lambda query, key, keep: key < 2 or query - key < 5,
}


def sentinel_targets(layout):
    found = []
    for row, kinds in enumerate(layout.kind.tolist()):
        columns = [column for column, kind in enumerate(kinds) if kind == PLAIN]
        found += [(row, a, int(layout.input_ids[row, b])) for a, b in pairwise(columns)]
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_loss_at_the_start_is_that_of_the_base_model_under_the_rule(family):
    base = tiny_model(family=family)
    layout = SpanLayout.from_spans(rows(), SPANS, SENTINELS)
    mask = dense_mask(sentinel(layout), *layout.kind.shape)
    targets = sentinel_targets(layout)
    wanted = obvious_loss(base.eval(), mask, layout.input_ids, layout.position_ids, targets)
    loss_sum, count, metrics = make(tiny_model(family=family)).loss(batch())
    assert count == len(targets) == 19 + 16
    assert loss_sum.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["nll_sum"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_mixture_is_the_method_at_the_ratio_of_the_batch():
    mixture = [Compression("local", 0.3), Compression("local", 0.6)]
    module = make(method="local", compression_ratio=0.9, mixture=mixture)
    for number, part in enumerate(mixture):
        wanted = make(method="local", compression_ratio=part.compression_ratio).loss(plain_batch())[0]
        assert torch.equal(module.loss(plain_batch(ratio_index=torch.tensor(number)))[0], wanted)
    assert torch.equal(
        module.loss(plain_batch())[0], make(method="local", compression_ratio=0.9).loss(plain_batch())[0]
    )


def test_zero_rows_stay_zero_where_they_are_not_trained():
    module = make(tiny_model, row_init="zero", train_rows=False)
    module.configure_model()
    rows_of = module.model.get_input_embeddings().weight[list(SENTINELS.ids)]
    assert not bool(rows_of.any())
    assert not rows_of.requires_grad
    late = SpanLayout.from_spans(rows(), [[(2, 9, 12)], [(0, 4, 9), (4, 8, 15)]], SENTINELS, forget=500)
    given = {"input_ids": late.input_ids, "kind": late.kind, "span": late.span, "forget": late.forget}
    kept = module.loss({name: given[name] for name in ("input_ids", "kind", "span")})[0]
    assert module.loss(given)[0] != kept


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_baselines_equal_loops(method, padding):
    keep = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) < 0.4
    options = {"num_sinks": 2, "window_size": 5} if method == "streaming" else {}
    given = plain_batch(**({"keep": keep} if method == "scattered" else {}))
    if padding == "left":
        given = {name: torch.stack([value[0], value[1].roll(3)]) for name, value in given.items()}
    module = make(method=method, compression_ratio=0.6, **options)
    loss_sum, count, _ = module.loss(given)
    wanted = 0.0
    for number, ids in enumerate(rows()):
        size = len(ids)
        kept = keep[number, :size]
        mask = torch.tensor([[k <= q and BASELINES[method](q, k, kept) for k in range(size)] for q in range(size)])
        targets = [(0, t, int(ids[t + 1])) for t in range(size - 1)]
        wanted += obvious_loss(tiny_model().eval(), mask[None, None], ids[None], torch.arange(size)[None], targets)
    assert count == 35
    assert loss_sum.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_masked_and_recurrent_training_stay_together():
    losses = []
    for options in ({}, {"training_mode": "recurrent", "chunk_size": 7}):
        module = make(learning_rate=1e-2, **options)
        optimizer, found = module.configure_optimizers(), []
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 1e-2
            loss_sum, count, _ = module.loss(batch(seed=step % 2))
            optimizer.zero_grad()
            (loss_sum / count).backward()
            optimizer.step()
            found.append((loss_sum / count).item())
        losses.append((found, {n: p.detach() for n, p in module.model.named_parameters() if p.requires_grad}))
    (masked, one), (recurrent, two) = losses
    assert masked == pytest.approx(recurrent, abs=2e-4)
    assert masked[4] < masked[0] - 0.1
    assert all((one[name] - two[name]).norm() <= 2e-4 * one[name].norm().clamp(min=1) for name in one)


@pytest.mark.parametrize("tied", [False, True])
def test_only_adapters_and_the_sentinel_rows_train(tied):
    module = make(tiny_model(tied=tied))
    names = {name for name, p in module.model.named_parameters() if p.requires_grad}
    rows_trained = [name for name in names if "lora_" not in name]
    assert sum(module.model.get_parameter(name).numel() for name in rows_trained) == 3 * 32
    assert len(names) - len(rows_trained) == 2 * 4 * 2
    assert all("lora_" in n for n, p in make(method="local").model.named_parameters() if p.requires_grad)
    optimizer = module.configure_optimizers()
    taught = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert taught == sum(module.model.get_parameter(name).numel() for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_merging_changes_the_adapted_weights_and_three_rows(tied, tmp_path):
    module = make(tiny_model(tied=tied))
    randomise_adapters(module)
    with torch.no_grad():
        wanted = module.eval().logits(*two(batch()))
    module.model_to_export().save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = KVCompressionLM(merged, sentinels=Sentinels.load(tmp_path), lora=None).eval()
    with torch.no_grad():
        found = again.logits(*two(batch()))
    assert torch.allclose(suppress(found, SENTINELS), suppress(wanted, SENTINELS), atol=1e-4)
    base = tiny_model(tied=tied).state_dict()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, base[name])}
    projections = {name for name in base if ".self_attn." in name}
    embedding = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    assert changed == projections | embedding
    differs = (merged.model.embed_tokens.weight != base["model.embed_tokens.weight"]).any(1)
    assert differs.nonzero().flatten().tolist() == list(SENTINELS.ids)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def two(given):
    return SpanLayout(given["input_ids"], given["kind"], given["span"]), given


def test_an_adapter_holds_no_full_embedding_and_fits_a_base_with_other_spare_rows(tmp_path):
    module = make()
    randomise_adapters(module)
    module.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for n, t in saved.items() if "lora_" not in n) == 3 * 32
    assert max(t.numel() for t in saved.values()) < 100 * 32
    other = tiny_model()
    with torch.no_grad():
        other.model.embed_tokens.weight[100:] = 3.0
    again = KVCompressionLM(tiny_model(), sentinels=Sentinels.load(tmp_path), lora=None).eval()
    again.model = PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        wanted, found = (m.eval().loss(batch())[0] for m in (module, again))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_distillation_compares_with_the_dense_base(trained):
    module = make(distillation_weight=0.5, distillation_temperature=2.0)
    if trained:
        randomise_adapters(module)
    loss_sum, _, metrics = module.loss(batch())
    wanted, base = 0.0, tiny_model().eval()
    logits = module.logits(*two(batch()))
    layout = two(batch())[0]
    kept = [i for i in range(128) if i not in SENTINELS.ids]
    for number, ids in enumerate(rows()):
        teacher = (base(ids[None]).logits[0, :-1, kept] / 2).log_softmax(-1)
        columns = [c for c, kind in enumerate(layout.kind[number].tolist()) if kind == PLAIN][:-1]
        student = (logits[number, columns][:, kept] / 2).log_softmax(-1)
        wanted += 4 * (teacher.exp() * (teacher - student)).sum()
    assert (loss_sum - metrics["nll_sum"]).item() == pytest.approx(0.5 * wanted.item(), rel=1e-4)
    assert wanted > 1
    loss_sum.backward()
    assert all(p.grad is not None for p in module.model.parameters() if p.requires_grad)


def test_documents_do_not_see_each_other_and_their_first_token_is_no_target():
    module = make(method="dense")
    ids = rows()[0][None]
    documents = (torch.arange(20) >= 8).long()[None]
    loss_sum, count, _ = module.loss({"input_ids": ids, "document_ids": documents})
    apart = [module.loss({"input_ids": part}) for part in (ids[:, :8], ids[:, 8:])]
    assert count == 18
    # Rotary positions are relative: the second document starts at 8 in one row and at 0 alone.
    assert loss_sum.item() == pytest.approx(sum(part[0].item() for part in apart), rel=1e-4)
    layout = SpanLayout.from_spans(ids, [[(2, 6), (10, 15)]], SENTINELS)
    columns = {"input_ids": layout.input_ids, "kind": layout.kind, "span": layout.span}
    border = int(layout.plain_index[0, 8])
    inside = columns | {"document_ids": (torch.arange(layout.kind.shape[1]) >= border).long()[None]}
    parts = [(ids[:, :8], [[(2, 6)]]), (ids[:, 8:], [[(2, 7)]])]
    alone = [SpanLayout.from_spans(part, spans, SENTINELS) for part, spans in parts]
    module = make()
    wanted = [module.loss({"input_ids": a.input_ids, "kind": a.kind, "span": a.span}) for a in alone]
    found = module.loss(inside)
    assert found[1] == 18
    assert found[0].item() == pytest.approx(sum(part[0].item() for part in wanted), rel=1e-4)


def test_published_labels_may_ask_for_a_sentinel():
    module = make(published_labels=True, exclude_sentinel_logits=False)
    _, count, _ = module.loss(batch())
    layout = two(batch())[0]
    assert count == (layout.published_labels != -100).sum()
    assert set(layout.published_labels.unique().tolist()) & set(SENTINELS.ids)


def test_validation_scores_original_tokens():
    module = make().eval()
    with torch.no_grad():
        scores = module.validation_step(batch(), 0)
        loss_sum, count, _ = module.loss(batch())
    assert scores["nll"].shape == scores["counted"].shape == (2, 20)
    assert scores["counted"].sum() == count and not scores["counted"][1, 16:].any()
    assert scores["nll"].sum().item() == pytest.approx(loss_sum.item(), rel=1e-5)
    with torch.no_grad():
        repeated = module.validation_step(batch() | {"scored": torch.tensor(False)}, 0)
    assert not repeated["counted"].any() and not repeated["nll"].any()


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for option in (False, True):
        module = make(gradient_checkpointing=option)
        randomise_adapters(module)
        module.loss(batch())[0].backward()
        gradients.append([p.grad for p in module.model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
