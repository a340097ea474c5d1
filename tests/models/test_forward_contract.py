"""Arguments of forward, training mode, precision, saving and loading."""

import copy

import pytest
import torch
from model_cases import (
    SMALL_MODELS,
    block_recurrent_config,
    drt_config,
    landmark_config,
    rpt_config,
    small_drt,
    token_ids,
    window_config,
)
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from models.drt import DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMForCausalLM


@pytest.fixture(params=SMALL_MODELS)
def model(request):
    return SMALL_MODELS[request.param]()


@pytest.mark.parametrize(
    "config",
    [
        drt_config(layers_per_group=[2, 1]),
        window_config(num_hidden_layers=3),
        landmark_config(chunk_top_k=2, rope_theta=500.0),
        block_recurrent_config(recurrent_layers=[1, 3]),
        rpt_config(retriever="random", retriever_seed=3),
    ],
)
def test_auto_round_trip_is_bit_identical(config, tmp_path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in model.named_parameters())
    ids = token_ids(2, 33)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(DRTForCausalLM, drt_config(hidden_size=64)), (SlidingWindowLMForCausalLM, window_config(hidden_size=64))],
)
def test_initialisation(model_class, config):
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(model_class(copy.deepcopy(config)))
    parameters = dict(models[1].named_parameters())
    for name, value in models[0].named_parameters():
        assert torch.equal(value, parameters[name])
        if value.dim() == 1:
            assert (value == 1).all()
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
    assert (models[0].model.embed_tokens.weight[61] == 0).all()


def test_loss_counts_labels_masks_and_items(model):
    ids = token_ids(2, 21)
    labels = ids.clone()
    labels[0, 4:9] = -100
    logits = model(ids, use_cache=False).logits
    counted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss = model(ids, labels=labels).loss
    torch.testing.assert_close(loss, counted, atol=1e-5, rtol=0)
    for divisor in (7, torch.tensor(7)):
        summed = model(ids, labels=labels, num_items_in_batch=divisor).loss
        torch.testing.assert_close(summed * 7, counted * (labels[:, 1:] != -100).sum(), atol=1e-4, rtol=1e-5)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    masked = labels.clone()
    masked[0, 15:] = -100
    torch.testing.assert_close(
        model(ids, labels=labels, attention_mask=mask).loss, model(ids, labels=masked).loss, atol=1e-5, rtol=0
    )


def test_logits_to_keep(model):
    ids = token_ids(2, 21)
    full = model(ids, labels=ids)
    for keep in (1, 4):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, full.logits[:, -keep:], atol=1e-4, rtol=0)
    kept = model(ids, labels=ids, logits_to_keep=torch.tensor([3, 20]))
    assert torch.equal(kept.logits, full.logits[:, [3, 20]])
    assert torch.equal(kept.loss, full.loss)


def test_hidden_states_are_of_text_positions(model):
    ids = token_ids(2, 23)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(state.shape == (2, 23, 32) for state in output.hidden_states)
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_unsupported_arguments_are_refused(model):
    ids = token_ids(2, 9)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.ones(2, 9, 32))
    with pytest.raises(ValueError, match="position_ids"):
        model(ids, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="input_ids must be"):
        model(ids[0])
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="document_ids must have the shape"):
        model(ids, document_ids=ids[:, 1:])
    with pytest.raises(ValueError, match="has a hole"):
        model(ids, attention_mask=torch.tensor([[1] * 9, [1, 1, 0, 1, 1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 8))


def test_retrieval_output():
    model = small_drt()
    ids = token_ids(2, 33)
    retrieval = model(ids, output_retrieval=True).retrieval
    assert len(retrieval) == 2
    for indices, weights in retrieval:
        assert indices.shape == weights.shape == (2, 6, 3)
        assert (indices.dtype, weights.dtype) == (torch.int32, torch.float32)
        assert (indices[:, 0] == -1).all()
        assert (indices < torch.arange(6)[:, None]).all()
        torch.testing.assert_close(weights[:, 1:].sum(-1), torch.ones(2, 5))
    assert model(ids[:, :4], output_retrieval=True).retrieval[1][0].shape == (2, 0, 3)
    assert model(ids).retrieval is None
    with pytest.raises(ValueError, match="output_retrieval"):
        model(ids, document_ids=ids, output_retrieval=True)


def test_noise_in_training_mode_only():
    model = small_drt()
    ids = token_ids(2, 60)

    def loss(seed=None, **options):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return model(ids, labels=ids, retrieval_generator=generator, **options).loss.detach()

    quiet = loss(1)
    assert loss(2) == quiet
    model.train()
    assert loss(1) == loss(1)
    assert len({loss(seed).item() for seed in range(4)}) > 1
    torch.manual_seed(0)
    first = loss()
    torch.manual_seed(0)
    assert loss() == first
    model.config.retrieval_noise = None
    torch.testing.assert_close(loss(3), quiet)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(model, reentrant):
    ids = token_ids(2, 43)
    model.train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(4)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    loss, expected = gradients()
    # Renamed in later versions of transformers.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    again, got = gradients()
    torch.testing.assert_close(again, loss)
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-4, rtol=1e-4)
    assert model(ids, use_cache=True).past_key_values is None


def test_checkpointing_draws_the_noise_once(monkeypatch):
    import models.drt.modeling_drt as modeling

    calls = []
    retrieve = modeling.retrieve_chunks
    monkeypatch.setattr(modeling, "retrieve_chunks", lambda *a, **k: calls.append(1) or retrieve(*a, **k))
    model = small_drt().train()
    for part in model.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = True
            part._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False
            )
    ids = token_ids(1, 30)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


def test_autocast_keeps_scores_norms_and_loss_in_float32():
    model = small_drt().train()
    model.config.retrieval_noise = None
    ids = token_ids(2, 60)
    exact = model(ids, labels=ids, output_retrieval=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, output_retrieval=True)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == torch.bfloat16
    assert all(weights.dtype == torch.float32 for _, weights in output.retrieval)
    assert abs(output.loss - exact.loss) < 0.1
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_autocast_decoding(model):
    ids = token_ids(1, 30)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(ids[:, :17]).past_key_values
        pieces = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(17, 30)]
        expected = model(ids, use_cache=False).logits[:, 17:]
    error = (torch.cat(pieces, 1) - expected).float().norm() / expected.float().norm()
    assert error < 0.1


def test_a_useful_chunk_gains_weight():
    # With a window of one position only the planted chunk tells the target, so training must learn to retrieve it.
    torch.manual_seed(0)
    model = DRTForCausalLM(drt_config(chunk_top_k=6, window_size=1, layers_per_group=[1], initializer_range=0.15))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch():
        ids = torch.randint(40, (32, 40), generator=generator)
        ids[:, 5:10] = ids[:, 37:38] = torch.randint(40, 44, (32, 1), generator=generator)
        return ids

    def weight():
        with torch.no_grad():
            indices, weights = model.eval()(batch(), use_cache=False, output_retrieval=True).retrieval[0]
        return (weights[:, 6] * (indices[:, 6] == 1)).sum(-1).mean().item()

    before = weight()
    assert before < 0.25
    for _ in range(40):
        ids = batch()
        labels = torch.full_like(ids, -100)
        labels[:, 37] = ids[:, 37]
        model.train()
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    assert weight() > before + 0.5


def test_arguments_without_effect_are_refused():
    from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

    config = SlidingWindowLMConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model, tokens = SlidingWindowLMForCausalLM(config).eval(), torch.arange(2, 8)[None]
    for name in ("output_retrieval", "labells"):
        with pytest.raises(ValueError, match=f"{name}: no such argument"):
            model(tokens, **{name: True})
    assert model(tokens, output_retrieval=False, return_dict=True).logits.shape == (1, 6, 11)
