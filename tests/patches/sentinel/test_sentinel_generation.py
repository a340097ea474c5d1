import random

import pytest
import torch
from dense_folds import DenseFolds
from safetensors.torch import load_file
from sentinel_cases import FIXTURES, ONE, TWO, stored, tiny_model
from transformers import AutoModelForCausalLM, LogitsProcessor

from patches.sentinel import PLAIN, SLOT, SentinelGenerator, Sentinels, compress

THREE = Sentinels(100, (101, 102, 103))
TEXT = [column for column in range(128) if not 100 <= column < 104]
OPTIONS = {"pad_token_id": 0, "eos_token_id": 127, "do_sample": False}


class Forced(LogitsProcessor):
    """Forces tokens and records the scores it receives."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens).reshape(len(tokens), -1)
        self.seen = []

    def __call__(self, input_ids, scores):
        wanted = self.tokens[len(self.seen)].expand(scores.shape[0])
        self.seen.append(scores.clone())
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


def generate(model, prompt, forced, generator, **options):
    """Run with forced tokens; returns the sequences and the scores ``[B, steps, V]`` before they are forced."""
    processor = Forced(forced)
    options = {**OPTIONS, "max_new_tokens": len(forced), **options}
    out = model.generate(torch.tensor(prompt), custom_generate=generator, logits_processor=[processor], **options)
    return out, torch.stack(processor.seen, 1)


@torch.no_grad()
@pytest.mark.parametrize("forget", [300, 700, 999])
@pytest.mark.parametrize(("sentinels", "prefill_chunk"), [(ONE, None), (TWO, 7), (THREE, None)])
def test_forgetting_is_that_of_a_dense_forward_without_the_oldest_slots(sentinels, prefill_chunk, forget):
    draw, model = random.Random(6), tiny_model("llama")
    prompt, forced = ([draw.randrange(3, 100) for _ in range(size)] for size in (60, 60))
    options = {"budget": 32, "span_length": 6, "num_sinks": 2, "recent_tokens": 3, "forget": forget}
    generator = SentinelGenerator(sentinels, **options, prefill_chunk=prefill_chunk)
    _, scores = generate(model, [prompt], forced, generator)
    dense, lasts, size = DenseFolds(sentinels, **options), [], prefill_chunk or len(prompt)
    steps = [prompt[start : start + size] for start in range(0, len(prompt), size)]
    for number, tokens in enumerate([*steps, *([token] for token in forced[:-1])]):
        dense.feed(tokens)
        if number >= len(steps) - 1:
            lasts.append(max(column for column, kind in enumerate(dense.kinds) if kind == PLAIN))
    counts = (generator.num_folds, generator.num_dropped, generator.num_forgotten)
    assert counts == (dense.folds, dense.dropped, dense.forgotten) and dense.forgotten > 0
    wanted = dense.logits(model, lasts, None)[:, TEXT]
    assert ((scores[0][:, TEXT] - wanted).abs() / wanted.abs().clamp(min=1)).max() < 2e-5
    cache = generator.final_context.cache
    assert sorted(cache.position_ids[0].tolist()) == sorted(dense.positions[column] for column in dense.live)


@pytest.mark.parametrize("options", [{"forget": 1000, "budget": 64}, {"forget": -1, "budget": 64}, {"forget": 500}])
def test_forgetting_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="forget is thousandths of the folded spans, from 0 to 999"):
        SentinelGenerator(ONE, **options)


def test_a_ratio_with_forgetting_keeps_newer_tokens_for_older_slots():
    model, prompt = tiny_model("llama"), [[5 + place % 90 for place in range(300)]]
    plain = []
    for forget in (0, 800):
        options = {"compression_ratio": 0.7, "span_length": 6, "recent_tokens": 3, "forget": forget}
        generator = SentinelGenerator(ONE, **options)
        generate(model, prompt, [7] * 5, generator)
        cache = generator.final_context.cache
        plain.append(int((cache.kind == PLAIN).sum()))
        assert int(cache.num_kept) <= 0.3 * 305 + 6 and generator.num_dropped == 0
        closed = int(cache.span.max())
        assert int((cache.kind == SLOT).sum()) == closed - closed * forget // 1000
    assert plain[1] > 1.5 * plain[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "sentinels", "prefill_chunk", "window", "recent_tokens"),
    [
        ("llama", ONE, None, None, 4),
        ("llama", TWO, 7, None, 0),
        ("llama", THREE, None, None, 4),
        ("gpt_neox", TWO, None, None, 4),
        ("opt", ONE, 5, None, 6),
        ("gemma3", THREE, 11, 9, 4),
        ("mistral", ONE, None, 13, 1),
    ],
)
def test_scores_are_those_of_a_dense_forward_with_the_same_folds(
    architecture, sentinels, prefill_chunk, window, recent_tokens
):
    draw = random.Random(5)
    prompt, forced = ([draw.randrange(3, 100) for _ in range(size)] for size in (30, 90))
    options = {"budget": 24, "span_length": 6, "num_sinks": 2, "recent_tokens": recent_tokens}
    model = tiny_model(architecture, window=window)
    generator = SentinelGenerator(sentinels, **options, prefill_chunk=prefill_chunk)
    _, scores = generate(model, [prompt], forced, generator)
    dense, lasts, history = DenseFolds(sentinels, **options), [], []
    size = prefill_chunk or len(prompt)
    steps = [prompt[start : start + size] for start in range(0, len(prompt), size)]
    for number, tokens in enumerate([*steps, *([token] for token in forced[:-1])]):
        dense.feed(tokens)
        if number >= len(steps) - 1:
            lasts.append(max(column for column, kind in enumerate(dense.kinds) if kind == PLAIN))
            history.append(len(dense.live))
    assert generator.history == history and max(history) <= 24
    assert (generator.num_folds, generator.num_dropped) == (dense.folds, dense.dropped)
    assert dense.dropped > 0 and dense.folds > 10
    wanted = dense.logits(model, lasts, window)[:, TEXT]
    assert ((scores[0][:, TEXT] - wanted).abs() / wanted.abs().clamp(min=1)).max() < 2e-5
    assert scores[0][:, list(sentinels.ids)].eq(-torch.inf).all()
    context = generator.final_context
    assert sorted(context.cache.position_ids[0].tolist()) == sorted(dense.positions[column] for column in dense.live)
    assert context.next_position.tolist() == [30 + 89] and context.num_kept.tolist() == [len(dense.live)]


@torch.no_grad()
def test_stored_generation():
    case = stored("numeric")["generation"]
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny_llama").eval()
    names = ("budget", "span_length", "num_sinks", "recent_tokens", "prefill_chunk")
    generator = SentinelGenerator(ONE, **{name: case[name] for name in names})
    out, scores = generate(model, [case["prompt"]], case["forced_tokens"], generator)
    assert out.tolist() == [case["prompt"] + case["forced_tokens"]]
    assert generator.history == case["history"]
    assert generator.num_dropped == case["num_dropped_entries"]
    wanted = load_file(FIXTURES / "logits.safetensors")["generation.logits"]
    assert (scores[0] - wanted)[:, TEXT].abs().max() < 2e-5


@torch.no_grad()
def test_the_peak_is_bounded(monkeypatch):
    model, sizes = tiny_model("llama"), []
    forward = type(model).forward

    def recorded(self, **options):
        sizes.append((options["past_key_values"].num_physical, options["input_ids"]))
        return forward(self, **options)

    monkeypatch.setattr(type(model), "forward", recorded)
    draw = random.Random(1)
    prompt = [draw.randrange(3, 100) for _ in range(200)]
    generator = SentinelGenerator(TWO, budget=20, span_length=8, num_sinks=1, recent_tokens=4, prefill_chunk=50)
    generate(model, [prompt], prompt[:30], generator)
    fed = 0
    for entries, ids in sizes:
        folding = ids[0, 0] == TWO.open_id
        fed = fed if folding else ids.shape[1]
        assert entries <= 20 + fed + 3 * bool(folding)
    assert max(entries for entries, _ in sizes) > 60 and generator.num_folds > 20


@torch.no_grad()
def test_ragged_prompts_are_each_as_alone():
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 100) for _ in range(size)] for size in (33, 8, 21)]
    forced = [[draw.randrange(3, 100) for _ in range(3)] for _ in range(25)]
    options = {"budget": 18, "span_length": 5, "num_sinks": 2, "recent_tokens": 3}
    model = tiny_model("llama")
    for left, chunk in ((True, None), (False, None), (True, 9)):
        rows, masks = [], []
        for prompt in prompts:
            padding = [0] * (33 - len(prompt))
            rows.append(padding + prompt if left else prompt + padding)
            masks.append([int(token > 0) for token in rows[-1]])
        generator = SentinelGenerator(ONE, **options, prefill_chunk=chunk)
        _, scores = generate(model, rows, forced, generator, attention_mask=torch.tensor(masks))
        counts = []
        for row, prompt in enumerate(prompts):
            # In chunks, a row on its own would be cut elsewhere.
            cut = [
                prompt[max(0, start - 33 + len(prompt)) : max(0, start - 33 + len(prompt) + (chunk or 33))]
                for start in range(0, 33, chunk or 33)
            ]
            own = [token[row] for token in forced]
            dense, lasts = DenseFolds(ONE, **options), []
            for number, tokens in enumerate([*cut, *([token] for token in own[:-1])]):
                dense.feed(tokens)
                if number >= len(cut) - 1:
                    lasts.append(max(column for column, kind in enumerate(dense.kinds) if kind == PLAIN))
            wanted = dense.logits(model, lasts, None)[:, TEXT]
            model.set_attn_implementation("sdpa")
            assert (scores[row][:, TEXT] - wanted).abs().max() < 2e-5
            counts.append((dense.folds, len(dense.live)))
        assert generator.num_folds == sum(folds for folds, _ in counts)
        assert generator.final_context.num_kept.tolist() == [live for _, live in counts]


@torch.no_grad()
def test_without_a_budget_it_is_plain_generation():
    for architecture in ("llama", "opt", "gemma3"):
        model = tiny_model(architecture, window=6)
        prompt = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(2))
        options = {**OPTIONS, "max_new_tokens": 12, "output_scores": True, "return_dict_in_generate": True}
        plain = model.generate(prompt, suppress_tokens=[100, 101], **options)
        ours = model.generate(prompt, custom_generate=SentinelGenerator(ONE), output_logits=True, **options)
        assert ours.sequences.equal(plain.sequences)
        for one, other, raw in zip(ours.scores, plain.scores, ours.logits, strict=True):
            assert (one[:, TEXT] - other[:, TEXT]).abs().max() < 1e-5 and raw[:, [100, 101]].eq(-torch.inf).all()
        assert ours.past_key_values.num_seen == 9 + 11 and plain.logits is None


@torch.no_grad()
def test_sampling_draws_as_transformers_does():
    model = tiny_model("llama")
    prompt = torch.tensor([[5, 6, 7, 8]]).expand(3, -1)
    options = {**OPTIONS, "do_sample": True, "top_p": 0.8, "temperature": 1.3, "top_k": 0, "max_new_tokens": 8}
    torch.manual_seed(4)
    plain = model.generate(prompt, suppress_tokens=[100, 101], **options)
    torch.manual_seed(4)
    assert model.generate(prompt, custom_generate=SentinelGenerator(ONE), **options).equal(plain)


class Fixed(LogitsProcessor):
    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        out[:, 10:14] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        return out


@torch.no_grad()
def test_the_nucleus_holds_the_token_that_crosses_p():
    model = tiny_model("llama")
    options = {**OPTIONS, "do_sample": True, "top_p": 0.9, "top_k": 0, "max_new_tokens": 4}
    options |= {"output_scores": True, "return_dict_in_generate": True, "logits_processor": [Fixed()]}
    out = model.generate(torch.full((60, 2), 5), custom_generate=SentinelGenerator(ONE), **options)
    assert all(scores.isfinite()[0].nonzero().flatten().tolist() == [10, 11, 12] for scores in out.scores)
    assert set(out.sequences[:, 2:].flatten().tolist()) == {10, 11, 12}


@torch.no_grad()
def test_rows_that_ended_are_padded_and_stay_as_they_are():
    model = tiny_model("llama")
    forced = [[9, 9], [127, 10], [5, 11], [6, 12], [7, 13], [8, 14], [8, 15], [8, 16], [8, 17], [8, 18]]
    generator = SentinelGenerator(ONE, budget=10, span_length=4, num_sinks=1, recent_tokens=2)
    out, scores = generate(model, [[3, 4, 5, 6], [7, 8, 9, 10]], forced, generator)
    assert out[0].tolist() == [3, 4, 5, 6, 9, 127, *[0] * 8]
    assert out[1, 4:].tolist() == [row[1] for row in forced]
    assert generator.final_context.next_position.tolist() == [5, 13]
    assert generator.final_context.next_logits[0].equal(scores[0, 1])
    assert generator.final_context.next_logits[1].equal(scores[1, -1])
    assert generator.final_context.num_kept[0] == 5 and generator.num_folds > 0 and max(generator.history) <= 10
    out, _ = generate(model, [[3, 4, 5, 6], [7, 8, 9, 10]], [[127, 127], [1, 1]], SentinelGenerator(ONE))
    assert out.shape == (2, 5)


@torch.no_grad()
def test_drops_are_reported(caplog):
    prompt = [list(range(3, 43))]
    generator = SentinelGenerator(ONE, budget=8, span_length=4, num_sinks=1, recent_tokens=2)
    generate(tiny_model("llama"), prompt, [5, 6], generator)
    assert generator.num_dropped > 0 and f"{generator.num_dropped} cache entries were dropped" in caplog.text
    caplog.clear()
    generate(tiny_model("llama"), prompt, [5, 6], SentinelGenerator(ONE, budget=38))
    assert not caplog.text


@torch.no_grad()
def test_generation_continues_a_context():
    model, draw = tiny_model("llama"), random.Random(2)
    ids = torch.tensor([[draw.randrange(3, 100) for _ in range(30)] for _ in range(2)])
    spans = [[(2, 9), (12, 20)], [(5, 11)]]
    context = compress(model, ids, ONE, spans=spans)
    question, forced = [[5, 6, 7], [8, 9, 10]], [[draw.randrange(3, 100)] * 2 for _ in range(20)]
    options = {"budget": 22, "span_length": 5, "num_sinks": 2, "recent_tokens": 3}
    generator = SentinelGenerator(ONE, **options, context=context)
    out, scores = generate(model, question, forced, generator)
    assert out[:, :3].tolist() == question
    for row in range(2):
        dense, lasts = DenseFolds(ONE, **{**options, "budget": 1000}), []
        fed = 0
        for start, end in spans[row]:
            # A token in a span sees what one outside would: the span may be folded when it is complete.
            dense.feed(ids[row, fed:end].tolist())
            dense.fold([column for column in dense.live if start <= dense.positions[column] < end])
            fed = end
        dense.feed(ids[row, fed:].tolist())
        dense.budget, dense.folds = 22, 0
        for tokens in (question[row], *([token[row]] for token in forced[:-1])):
            dense.feed(tokens)
            lasts.append(max(column for column, kind in enumerate(dense.kinds) if kind == PLAIN))
        wanted = dense.logits(model, lasts, None)[:, TEXT]
        model.set_attn_implementation("sdpa")
        assert (scores[row][:, TEXT] - wanted).abs().max() < 2e-5
    assert context.next_position.tolist() == [30, 30]
    assert generator.final_context.next_position.tolist() == [52, 52]


@torch.no_grad()
def test_a_context_answers_many_questions_many_times():
    model = tiny_model("llama")
    context = compress(model, torch.arange(3, 33)[None], ONE, seed=3)
    before = context.fork()
    question = torch.tensor([[5, 6, 7]])
    options = {**OPTIONS, "max_new_tokens": 6}
    first = context.generate(model, question, **options)
    assert context.generate(model, torch.tensor([[8, 9]]), **options).shape == (1, 8)
    assert context.generate(model, question, **options).equal(first)
    assert context.cache.num_seen == before.cache.num_seen and context.next_logits.equal(before.next_logits)
    several = context.generate(model, question, **{**options, "do_sample": True}, num_return_sequences=3, top_k=1)
    assert several.equal(first.expand(3, -1))
    assert context.generate(model, question[:, :0], **options)[0, 0] == context.next_logits.argmax()
    with pytest.raises(ValueError, match="the context 2"):
        two = context.fork()
        two.repeat(2)
        two.generate(model, question.expand(3, -1), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 37}, "38 entries"),
        ({"span_length": 1}, "span_length"),
        ({"num_sinks": -1}, "num_sinks"),
        ({"recent_tokens": -1}, "recent_tokens"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SentinelGenerator(ONE, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.int64)}, "empty"),
    ],
)
def test_what_cannot_be_served_is_refused(options, message):
    model = tiny_model("llama", implementation="eager")
    options = {"prompt": torch.tensor([[5, 6]]), **OPTIONS, "max_new_tokens": 2, **options}
    with pytest.raises(ValueError, match=message):
        model.generate(options.pop("prompt"), custom_generate=SentinelGenerator(ONE), **options)


def test_a_filled_cache_is_refused():
    model = tiny_model("llama")
    past = model(input_ids=torch.tensor([[3, 4]])).past_key_values
    with pytest.raises(ValueError, match="context="):
        model.generate(
            torch.tensor([[3, 4, 5]]),
            past_key_values=past,
            custom_generate=SentinelGenerator(ONE),
            max_new_tokens=2,
            **OPTIONS,
        )
