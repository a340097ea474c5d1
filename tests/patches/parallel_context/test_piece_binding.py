"""The model is left exactly as found; what cannot be served is refused with a sentence."""

import copy

import pytest
import torch
from piece_models import SIZES, Largest, pieces_of, text, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import models  # noqa: F401  registers the suite's models
from patches.parallel_context import APE, Calibration, ParallelContext, SelectiveAttention

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def snapshot(model):
    """Everything about a model that a patch could leave changed."""
    modules = {
        name: (
            type(module),
            module.training,
            sorted(module.__dict__),
            [list(getattr(module, hooks)) for hooks in HOOKS],
            module.forward.__qualname__,
        )
        for name, module in model.named_modules()
    }
    parameters = {
        name: (p.data_ptr(), p.requires_grad, p._version, None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    return {
        "modules": modules,
        "parameters": parameters,
        "config": copy.deepcopy(model.config.__dict__),
        "functions": (sorted(ALL_ATTENTION_FUNCTIONS), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)),
        "masks": (sorted(ALL_MASK_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)),
        "rng": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "default": torch.get_default_dtype(),
    }


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def use(pc, state=None):
    state = pc.encode(pieces_of((5, 9)), prefix=text(2)) if state is None else state
    pc.score(state, text(4, 1), meters=["entropy"])
    return pc.generate(state, text(4, 1), max_new_tokens=3).token_ids


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_model_is_left_as_found(family, implementation):
    model = copy.deepcopy(tiny_model(family))
    model.set_attn_implementation(implementation)
    model.train()
    model.model.layers[1].eval()  # a mixed state
    model.model.layers[0].mlp.requires_grad_(False)
    model(torch.tensor([text(5)])).logits.sum().backward()
    before = snapshot(model)
    with ParallelContext().bind(model) as pc:
        assert equal(before, snapshot(model))
        use(pc)
        assert equal(before, snapshot(model))
    assert equal(before, snapshot(model))


def test_the_model_is_left_as_found_after_exceptions():
    model = copy.deepcopy(tiny_model())
    model.train()
    failing = model.model.layers[2].mlp

    def fail(*_):
        raise ArithmeticError("no")

    handle = failing.register_forward_hook(fail)
    before = snapshot(model)
    with ParallelContext().bind(model) as pc, pytest.raises(ArithmeticError):
        pc.encode(pieces_of((5, 9)))
    assert equal(before, snapshot(model))
    handle.remove()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), ParallelContext().bind(model) as pc:
        state = pc.encode(pieces_of((5, 9)))
        failing.register_forward_hook(fail).remove()
        _ = 1 / 0
    assert equal(before, snapshot(model))
    with pytest.raises(RuntimeError, match="no longer bound"):
        pc.score(state, text(3))
    for call in (lambda: pc.encode([[1]]), lambda: pc.generate(state, [1], max_new_tokens=1), pc.prefix_ids):
        with pytest.raises(RuntimeError, match="no longer bound"):
            call()


def test_the_model_itself_is_plain_while_bound():
    model, tokens = tiny_model("gemma2"), torch.tensor([text(12)])
    expected = model(tokens).logits
    with ParallelContext(selection=SelectiveAttention(1)).bind(model) as pc:
        assert torch.equal(model(tokens).logits, expected)
        use(pc)
        assert torch.equal(model(tokens).logits, expected)


def test_calibration_beyond_the_model_is_told():
    patch = ParallelContext(calibration=Calibration(layers=(3, 8)))
    with pytest.warns(UserWarning, match="begins at layer 3"), patch.bind(tiny_model()):
        pass


def test_bound_side_by_side():
    first, second = tiny_model(), tiny_model("gemma3")
    with ParallelContext().bind(first) as pc:
        expected = use(pc)
    with ParallelContext(ape=APE()).bind(second) as pc:
        other = use(pc)
    with ParallelContext().bind(first) as a, ParallelContext(ape=APE()).bind(second) as b:
        with ParallelContext(selection=SelectiveAttention(1)).bind(first) as c:
            use(c)
        assert (use(a), use(b), use(a)) == (expected, other, expected)


def test_train_mode_and_autocast_do_not_enter():
    model = copy.deepcopy(tiny_model())
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with ParallelContext().bind(model) as pc:
        expected = pc.score(pc.encode(pieces_of((5, 9))), text(4)).nll
        model.train()
        assert torch.equal(pc.score(pc.encode(pieces_of((5, 9))), text(4)).nll, expected)
        assert not expected.requires_grad
    single = tiny_model("llama", torch.float32)
    with ParallelContext(selection=SelectiveAttention(1)).bind(single) as pc:
        exact = pc.score(pc.encode(pieces_of((5, 9))), text(4), meters=["entropy"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            state = pc.encode(pieces_of((5, 9)))
            found = pc.score(state, text(4), meters=["entropy"])
    assert state.keys[0].dtype == state.values[0].dtype == torch.bfloat16
    assert found.meters["entropy"].dtype == torch.float32
    assert (found.nll - exact.nll).abs().max() < 0.5


def test_adapters_work():
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(tiny_model("llama", torch.float32))
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, options).eval()
    pieces, query = pieces_of((5,)), text(4, 1)
    before = snapshot(adapted)
    with ParallelContext(prefix=None).bind(adapted) as pc:
        found = pc.score(pc.encode(pieces), query, return_logits=True).logits[0]
    assert equal(before, snapshot(adapted))
    expected = adapted(torch.tensor([pieces[0] + query])).logits[0, 5:]
    assert (found - expected).abs().max() < 1e-4
    with adapted.disable_adapter(), ParallelContext(prefix=None).bind(adapted) as pc:
        plain = pc.score(pc.encode(pieces), query, return_logits=True).logits[0]
    assert (found - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options",
    [{}, {"selection": SelectiveAttention(top_k=2, aggregate=("head", "query"))}, {"implementation": "eager"}],
)
@pytest.mark.parametrize("tokens", [16, 130])
def test_no_tensor_grows_with_the_square(options, tokens):
    model, length = tiny_model("llama", torch.float32), 4096
    with ParallelContext(degree=32, **options).bind(model) as pc, Largest() as watch:
        state = pc.encode(pc.options.split(text(length)))
        pc.score(state, text(tokens, 1), meters=["entropy", "mass"])
        pc.generate(state, text(tokens, 1), max_new_tokens=2)
    assert watch.elements < length * length / 8


def test_windows_do_not_need_the_square_either():
    model, length = tiny_model("gemma3", torch.float32), 4096
    with ParallelContext(degree=2).bind(model) as pc, Largest() as watch:
        state = pc.encode(pc.options.split(text(length)))
        pc.score(state, text(20, 1))
    assert watch.elements < length * length / 8


class Tokenizer:
    """Letters to ids, with or without a BOS."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, words, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(letter) % 50 for letter in words]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(map(str, ids))


def prefix_of(tokenizer=None, **options):
    with ParallelContext(**options).bind(tiny_model(), tokenizer) as pc:
        return pc.prefix_ids()


def test_prefixes():
    newline = 3 + 10 % 50
    assert prefix_of() == [1]  # the BOS of the configuration
    assert prefix_of(Tokenizer(7)) == [7]
    assert prefix_of(Tokenizer(7), prefix_repeat=3) == [7, 7, 7]
    assert prefix_of(prefix=None) == []
    assert prefix_of(Tokenizer(7), prefix="p2") == [7, newline, newline]
    assert prefix_of(Tokenizer(7), prefix="p2", prefix_bos=False, prefix_repeat=2) == [newline] * 4
    assert prefix_of(Tokenizer(), prefix="ab") == [3 + 97 % 50, 3 + 98 % 50]
    assert len(prefix_of(Tokenizer(7), prefix="p1")) == 78 and len(prefix_of(Tokenizer(7), prefix="p1_task")) == 71
    with pytest.warns(UserWarning, match="blank line"):
        assert prefix_of(Tokenizer()) == [newline, newline]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        prefix_of(prefix="p1")


def test_generated_text_and_ends():
    model = tiny_model()
    with ParallelContext().bind(model, Tokenizer(1)) as pc:
        state = pc.encode(pieces_of((5, 9)))
        free = pc.generate(state, text(4), max_new_tokens=6, eos_token_id=None)
        end = free.token_ids[0][2]
        stopped = pc.generate(state, text(4), max_new_tokens=6, eos_token_id=end)
        first = free.token_ids[0].index(end)
        assert stopped.token_ids == [free.token_ids[0][: first + 1]]
        assert stopped.text == [" ".join(map(str, stopped.token_ids[0]))]
        later = pc.generate(state, text(4), max_new_tokens=6, min_new_tokens=5, eos_token_id=[end])
        assert end not in later.token_ids[0][:5] and len(later.token_ids[0]) >= 5
        model.generation_config.eos_token_id, before = end, model.generation_config.eos_token_id
        try:
            assert pc.generate(state, text(4), max_new_tokens=6).token_ids == stopped.token_ids
        finally:
            model.generation_config.eos_token_id = before


def test_sampling_has_a_generator_of_its_own():
    with ParallelContext().bind(tiny_model()) as pc:
        state = pc.encode([pieces_of((5, 9)), pieces_of((7,), 3)])
        queries = [text(4, 1), text(3, 2)]

        def sample(**options):
            return pc.generate(state, queries, max_new_tokens=8, eos_token_id=None, do_sample=True, **options).token_ids

        random = torch.get_rng_state()
        assert sample(seed=1) == sample(seed=1) != sample(seed=2)
        assert torch.equal(random, torch.get_rng_state())
        greedy = pc.generate(state, queries, max_new_tokens=8, eos_token_id=None).token_ids
        assert sample(top_k=1) == sample(top_p=1e-6) == sample(temperature=1e-4) == greedy != sample(seed=1)
        for options in ({"top_p": 0.0}, {"top_k": 0}, {"temperature": 0.0}):
            with pytest.raises(ValueError, match=r"top_p|top_k|temperature"):
                sample(**options)
        for options in ({"temperature": 0.5}, {"seed": 3}):
            with pytest.raises(ValueError, match="do_sample=True"):
                pc.generate(state, queries, max_new_tokens=2, **options)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "rope", "longest"), [("llama", {"factor": 2.0}, 32), ("phi3", LONG | {"factor": 4.0}, 128)]
)
def test_growing_rotary_angles_are_refused(family, rope, longest):
    rope = rope | {"rope_type": "longrope" if family == "phi3" else "dynamic", "rope_theta": 10000.0}
    sizes = {"max_position_embeddings": longest, "original_max_position_embeddings": 32, "rope_parameters": rope}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | sizes))).eval()
    piece, query = text(15), text(16, 1)
    with ParallelContext(prefix=None).bind(model) as pc:
        found = pc.score(pc.encode([piece]), query, return_logits=True).logits[0]
    assert (found - model(torch.tensor([piece + query])).logits[0, 15:]).abs().max() < 1e-4
    with ParallelContext(position_mode="ML").bind(model) as pc:
        state = pc.encode(pieces_of((15, 15, 15)))
        pc.score(state, text(16))
        angles = model.model.rotary_emb.inv_freq.clone()
        ragged = pc.encode([pieces_of((27,)), pieces_of((3,), 2)])
        pc.score(ragged, [text(2), text(20)])  # padding stands at no greater position than tokens
        assert torch.equal(model.model.rotary_emb.inv_freq, angles)
        with pytest.raises(ValueError, match="below 32, got 32"):
            pc.score(state, text(17))
        with pytest.raises(ValueError, match="below 32, got 39"):
            pc.encode(pieces_of((39,)))


@pytest.mark.parametrize("family", ["drt", "sliding_window_lm", "gpt2"])
def test_other_models_are_refused(family):
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{family}.*llama"), ParallelContext().bind(model):
        pass
    with pytest.raises(ValueError, match="Hugging Face causal language model"), ParallelContext().bind(torch.nn.ReLU()):
        pass
    with pytest.raises(ValueError, match="no language-model head"), ParallelContext().bind(tiny_model().model):
        pass
