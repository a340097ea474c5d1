import pytest
import torch
from sentinel_cases import ONE, TWO, random_layout, tiny_model

from patches.sentinel import CompressedContext, SentinelGenerator, compress, masked_forward, recurrent_forward

pytestmark = pytest.mark.gpu


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_both_ways_are_those_of_the_cpu(architecture, implementation):
    layout, _, _ = random_layout(3, TWO)
    model = tiny_model(architecture, window=9, implementation=implementation)
    wanted = masked_forward(model, layout)
    model, layout = model.cuda(), layout.to("cuda")
    real = layout.kind >= 0
    assert (masked_forward(model, layout).cpu() - wanted)[real.cpu()].abs().max() < 1e-4
    for chunk_size in (1, 6):
        logits, cache = recurrent_forward(model, layout, chunk_size=chunk_size)
        assert (logits.cpu() - wanted)[real.cpu()].abs().max() < 1e-4
        assert cache.num_kept.equal(layout.num_kept)


@torch.no_grad()
def test_contexts_and_generation_are_those_of_the_cpu(tmp_path):
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    question = torch.tensor([[5, 6, 7], [8, 9, 10]])
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        context = compress(model, ids.to(device), ONE, chunk_size=16)
        context.save(tmp_path / device)
        context = CompressedContext.load(tmp_path / device, device=device)
        logits = context.fork().extend(model, question.to(device))
        generator = SentinelGenerator(ONE, budget=24, span_length=6, num_sinks=2, recent_tokens=4, context=context)
        options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(question.to(device), custom_generate=generator, **options)
        results.append((logits.cpu(), tokens.cpu(), generator.history))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-4
    assert results[0][1].equal(results[1][1]) and results[0][2] == results[1][2]
