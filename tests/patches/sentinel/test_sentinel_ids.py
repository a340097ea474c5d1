import pytest
import torch
from sentinel_cases import TWO
from transformers import LlamaConfig, LlamaForCausalLM

from patches.sentinel import Sentinels, add_sentinels, suppress


def small_llama(vocab_size: int = 70, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **sizes)).eval()


def test_spare_rows_are_used_and_nothing_else_changes():
    model = small_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sentinels = add_sentinels(model, 66, slots=3)
    assert sentinels == Sentinels(66, (67, 68, 69))
    assert (sentinels.slots, sentinels.ids, model.config.vocab_size) == (3, (66, 67, 68, 69), 70)
    for name, value in model.state_dict().items():
        rows = slice(0, 66) if "embed" in name else slice(None)
        assert value[rows].equal(before[name][rows])
    rows, real = model.get_input_embeddings().weight[66:], before["model.embed_tokens.weight"][:66]
    assert not rows.equal(before["model.embed_tokens.weight"][66:])
    distance = (rows - real.mean(0)) / real.std(0)
    assert 0.05 < distance.std() < 0.2
    assert torch.unique(rows, dim=0).shape[0] == 4


@pytest.mark.parametrize("tied", [False, True])
def test_missing_rows_are_added_to_the_next_multiple(tied):
    model = small_llama(tied=tied)
    before = model.get_input_embeddings().weight.clone()
    head = model.get_output_embeddings().weight.clone()
    state = torch.get_rng_state()
    sentinels = add_sentinels(model, 70, slots=1, pad_to_multiple_of=32, seed=4)
    assert state.equal(torch.get_rng_state())
    assert sentinels == Sentinels(70, (71,))
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 96
    assert model.get_input_embeddings().weight[:70].equal(before)
    assert model.get_output_embeddings().weight[:70].equal(head)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model(torch.tensor([[1, 70, 71]])).logits.shape[-1] == 96


def test_the_same_seed_gives_the_same_rows():
    first, second, third = small_llama(), small_llama(), small_llama()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        add_sentinels(model, 60, seed=seed)
    rows = [model.get_input_embeddings().weight[60:62] for model in (first, second, third)]
    assert rows[0].equal(rows[1]) and not rows[0].equal(rows[2])
    for number, model in enumerate((first, second)):
        torch.manual_seed(number)
        add_sentinels(model, 70, seed=3)
    assert all(value.equal(second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(
    ("num_token_ids", "options", "message"),
    [
        (71, {}, "len\\(tokenizer\\)"),
        (0, {}, "len\\(tokenizer\\)"),
        (60, {"slots": 0}, "at least 1"),
        (60, {"pad_to_multiple_of": 0}, "at least 1"),
        (60, {"init": "zeros"}, "unknown init"),
    ],
)
def test_impossible_requests_are_refused(num_token_ids, options, message):
    with pytest.raises(ValueError, match=message):
        add_sentinels(small_llama(), num_token_ids, **options)


def test_suppressed_columns_are_minus_infinity_in_a_copy():
    logits = torch.randn(2, 3, 110, requires_grad=True)
    out = suppress(logits, TWO)
    assert out[..., [100, 101, 102]].eq(-torch.inf).all()
    assert logits.isfinite().all()
    others = [column for column in range(110) if column not in TWO.ids]
    assert out[..., others].equal(logits[..., others])
    out.logsumexp(-1).sum().backward()
    assert logits.grad[..., [100, 101, 102]].eq(0).all() and logits.grad[..., others].gt(0).all()


def test_sentinels_are_saved_beside_a_model(tmp_path):
    TWO.save(tmp_path)
    assert Sentinels.load(tmp_path) == TWO
    with pytest.raises(FileNotFoundError, match=r"sentinels\.json"):
        Sentinels.load(tmp_path / "nothing")
