"""A causal model passes; models that leak, however little, are caught."""

from types import SimpleNamespace

import pytest
import torch

from callbacks.causality_monitor import CausalityError, CausalityMonitor, find_leak
from kernels.gca import retrieve_chunks
from models.drt import DRTConfig, DRTForCausalLM, modeling_drt


def test_training_is_unchanged(assert_changes_nothing):
    assert_changes_nothing(CausalityMonitor())


def leaky(lab, amount, reach):
    """A model whose embeddings also hold ``amount`` of the token ``reach`` places later."""

    class Leaky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = lab["tiny_llama"]()
            self.config = self.inner.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, use_cache=None):
            embedded = self.get_input_embeddings()(input_ids)
            later = torch.nn.functional.pad(embedded, (0, 0, 0, reach))[:, reach:]
            return self.inner(inputs_embeds=embedded + amount * later, use_cache=False)

    return Leaky()


@pytest.mark.parametrize(("amount", "reach"), [(1.0, 1), (1e-12, 1), (0.5, 3)])
def test_leaks_stop_the_run_with_position_and_value(fit, lab, amount, reach):
    with pytest.raises(CausalityError, match=rf"at position \d+ of a window of 16 tokens depend on {reach} later"):
        fit(CausalityMonitor(), module=lab["Module"](leaky(lab, amount, reach)))


def test_all_ranks_stop_when_one_of_them_saw_a_leak(fit, monkeypatch):
    strategy = "lightning.pytorch.strategies.SingleDeviceStrategy"
    monkeypatch.setattr(f"{strategy}.reduce", lambda self, tensor, *_, **__: tensor + 1)
    with pytest.raises(CausalityError, match="another rank saw a logit that depends on a later token"):
        fit(CausalityMonitor())


def test_the_position_named_is_the_first_that_leaks(lab):
    window = torch.arange(16)[None]
    sentence = find_leak(leaky(lab, 1.0, 2), window, [0, 0])
    position = int(sentence.split("at position ")[1].split(" ")[0])
    assert f"the first at position {position + 1} " in sentence
    assert find_leak(lab["tiny_llama"](), window, [0, 0]) == ""


def test_positions_vary_with_the_step(lab):
    window = torch.arange(16)[None]
    model = leaky(lab, 1.0, 1)
    assert len({find_leak(model, window, [0, step]).split(" of a window")[0] for step in range(10)}) > 2
    assert find_leak(model, window, [0, 3]) == find_leak(model, window, [0, 3])


def test_gradients_and_modes_are_restored(lab):
    model = lab["tiny_llama"]().train()
    model.model.layers[0].eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    assert find_leak(model, torch.arange(16)[None], [0, 0]) == ""
    assert model.training
    assert not model.model.layers[0].training
    assert bool((model.lm_head.weight.grad == 1).all())
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    assert not model.get_input_embeddings()._forward_hooks


def test_a_model_that_hides_its_embedding_is_not_called_causal(lab):
    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = lab["tiny_llama"](), torch.nn.Embedding(31, 16)

        def get_input_embeddings(self):
            return self.other

        def forward(self, input_ids, use_cache=None):
            return self.inner(input_ids, use_cache=False)

    with pytest.raises(ValueError, match="nothing to monitor"):
        find_leak(Hidden(), torch.arange(16)[None], [0, 0])


def test_a_compiled_model_is_monitored_without_compiling_again(lab):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(31, 8)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, use_cache=None):
            return SimpleNamespace(logits=self.embedding(input_ids).cumsum(1) @ self.embedding.weight.T)

    model, window = Small(), torch.arange(16)[None]
    graphs = []
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.inference_mode():
        model(input_ids=window, use_cache=False)
        assert len(graphs) == 1
        assert [find_leak(model, window, [0, step]) for step in range(2)] == ["", ""]
    assert len(graphs) == 1, "the monitor made the model compile again"


@pytest.fixture
def drt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_encoder_layers": 1}
    retrieval = {"num_lower_layers": 1, "layers_per_group": [1, 1], "chunk_size": 4, "chunk_top_k": 2}
    ids = {"landmark_token_id": 30, "pad_token_id": 29, "bos_token_id": 28, "eos_token_id": 28}
    config = DRTConfig(vocab_size=31, window_size=6, initializer_range=0.2, **sizes, **retrieval, **ids)
    return DRTForCausalLM(config).eval()


def test_retrieval_is_causal(drt):
    window = torch.arange(28)[None]
    assert [find_leak(drt, window, [0, step]) for step in range(12)] == [""] * 12


def test_a_retrieval_that_sees_later_chunks_is_caught(drt, monkeypatch):
    def all_visible(queries, landmarks, top_k, **options):
        everything = torch.ones(1, queries.shape[1], landmarks.shape[1], dtype=torch.bool)
        return retrieve_chunks(queries, landmarks, top_k, **(options | {"visible": everything}))

    monkeypatch.setattr(modeling_drt, "retrieve_chunks", all_visible)
    window = torch.arange(28)[None]
    assert any("causality is broken" in find_leak(drt, window, [0, step]) for step in range(12))


def test_every_nth_validation_and_state(fit, monkeypatch):
    checked = []
    monkeypatch.setattr("callbacks.causality_monitor.find_leak", lambda model, window, seed: checked.append(seed) or "")
    callback = CausalityMonitor(every_n_validations=2, seed=9)
    fit(callback, val_check_interval=2)
    assert checked == [[9, 2], [9, 6], [9, 10]]
    other = CausalityMonitor()
    other.load_state_dict(callback.state_dict())
    assert other.state_dict() == {"validations": 5}


def test_the_check_runs_in_the_precision_of_training(fit, lab):
    dtypes = []

    class Watching(CausalityMonitor):
        def on_validation_epoch_end(self, trainer, pl_module):
            hook = pl_module.model.lm_head.register_forward_hook(lambda *args: dtypes.append(args[-1].dtype))
            super().on_validation_epoch_end(trainer, pl_module)
            hook.remove()

    fit(Watching(), precision="bf16-mixed", max_steps=5)
    assert dtypes == [torch.bfloat16]


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match="at least"):
        CausalityMonitor(max_tokens=1)
