"""Cases T3 and T4: training steps on a GPU, as a share of its bfloat16 peak.

T3: the published DRT (146M) against the peak, its own longer context, and its sliding-window base. T4: LoRA on random
weights of the 8B shape at 32,768 tokens, with gradient checkpointing; the FLOPs are those that are executed, recomputed
ones included. A step is forward, backward and AdamW under bf16 autocast; the data are random tokens.

Legend: B sequences, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measure import check, peak_bytes_on, seconds_on
from benchmarks.registry import Row, case
from callbacks.throughput import peak_tflops
from losses.output_head import hidden_states, output_head
from models.drt import DRTConfig, DRTForCausalLM
from models.sliding_window_lm import SlidingWindowLMConfig, SlidingWindowLMForCausalLM

WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "window_size": 513}
RETRIEVAL = {"num_lower_layers": 6, "layers_per_group": [6], "num_encoder_layers": 2, "chunk_size": 63}
EIGHT_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 1.53e7,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def autocast(device: str) -> AbstractContextManager[Any]:
    """Multiply in bfloat16, as `trainer=gpu` does."""
    return torch.autocast(device, torch.bfloat16)


def device_peak(device: str) -> float:
    """Return the dense bfloat16 FLOP/s of the data sheet.

    Raises:
        ValueError: the table of the throughput callback does not know the device.
    """
    name = torch.cuda.get_device_name(device)
    if (tflops := peak_tflops(name)) is None:
        raise ValueError(f"the bfloat16 peak of {name} is not known: add it to callbacks.throughput.PEAK_BF16_TFLOPS")
    return tflops * 1e12


def trainer_of(model: torch.nn.Module, loss: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], Tensor]:
    """Return a function that does one optimiser step on the tokens and returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=tokens.is_cuda)

    def step() -> Tensor:
        with autocast(tokens.device.type):
            value = loss(tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


@dataclass(frozen=True)
class Pretraining:
    """Sizes of T3."""

    context: int = 16_380
    factor: int = 4
    """The longer context is this many times as long; steps of both hold equally many tokens."""
    vocabulary: int = 50_265
    device: str = "cuda"
    sizes: dict[str, Any] = field(default_factory=lambda: dict(WIDE))
    retrieval: dict[str, Any] = field(default_factory=lambda: dict(RETRIEVAL))

    def _ids(self) -> dict[str, int]:
        pad = self.vocabulary - 2  # behind the ids that are drawn, before the landmark
        return {"vocab_size": self.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": pad}

    def drt(self, **changes: Any) -> DRTForCausalLM:
        """Build the DRT, noisy retrieval as in training."""
        torch.manual_seed(0)
        options = {"softmax_off_by_one": True, "landmark_token_id": self.vocabulary - 1, "retrieval_noise": "gumbel"}
        config = DRTConfig(**(self.sizes | self.retrieval | self._ids() | options | changes))
        return DRTForCausalLM(config).to(self.device).train()

    def base(self) -> SlidingWindowLMForCausalLM:
        """Build the window model with as many blocks and no retrieval."""
        torch.manual_seed(0)
        blocks = self.retrieval["num_lower_layers"] + sum(self.retrieval["layers_per_group"])
        config = SlidingWindowLMConfig(**(self.sizes | self._ids()), num_hidden_layers=blocks)
        return SlidingWindowLMForCausalLM(config).to(self.device).train()

    def tokens(self, length: int, count: int = 1) -> Tensor:
        """Draw token ids ``[B, T]``."""
        return torch.randint(1, self.vocabulary - 2, (count, length), device=self.device)


def _own_loss(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    loss = _own_loss(model, tokens)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def _check_drt(problem: Pretraining) -> None:
    """Compare float32 and, in its loss, bf16 autocast with float64 and the plain implementations."""
    slow = {"gca_implementation": "reference", "attention_implementation": "reference"}
    tokens = problem.tokens(6 * problem.retrieval["chunk_size"] + 5)
    exact = _gradients(problem.drt(retrieval_noise=None, **slow).double(), tokens)
    check(_gradients(problem.drt(retrieval_noise=None), tokens), exact, 1e-3)
    with autocast(problem.device):
        half = _own_loss(problem.drt(retrieval_noise=None), tokens).detach()
    check({"loss": half}, {"loss": exact["loss"]}, 1e-2)


def pretraining(problem: Pretraining, peak: float) -> Iterator[Row]:
    """Compare the DRT's step with the peak, with a longer context, and with its base."""
    _check_drt(problem)
    drt, base, length = problem.drt(), problem.base(), problem.context
    many, long = problem.tokens(length, problem.factor), problem.tokens(length * problem.factor)
    seconds = seconds_on(
        problem.device,
        {
            "drt": trainer_of(drt, partial(_own_loss, drt), many),
            "long": trainer_of(drt, partial(_own_loss, drt), long),
            "base": trainer_of(base, partial(_own_loss, base), many),
        },
    )
    size, measure = sum(p.numel() for p in drt.parameters()) / 1e6, "training step, s"
    shape = f"{size:.0f}M parameters, {problem.factor} x {length} tokens, bf16 autocast"
    limit = drt.num_flops_per_token(length) * many.numel() / peak
    yield Row(shape, measure, seconds["drt"], f"{peak / 1e12:.0f} TFLOP/s", limit, 0.35, floor=0.22)
    longer = f"{size:.0f}M parameters, 1 x {long.numel()} tokens, bf16 autocast"
    yield Row(longer, measure, seconds["long"], f"contexts of {length}", seconds["drt"], 1.05, "lower")
    yield Row(shape, measure, seconds["drt"], "sliding window, as many blocks", seconds["base"], 1.15, "lower")


@dataclass(frozen=True)
class FineTuning:
    """Sizes of T4."""

    context: int = 32_768
    device: str = "cuda"
    sizes: dict[str, Any] = field(default_factory=lambda: dict(EIGHT_BILLION))
    dtype: torch.dtype = torch.bfloat16
    """Of the frozen weights; adapters are float32."""

    def model(self) -> Any:
        """Build the model on the device with random weights, adapters on it, and gradient checkpointing."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**self.sizes), dtype=self.dtype)
            model = get_peft_model(model, LoraConfig(**LORA))  # type: ignore[arg-type]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.to(self.device).train()

    def tokens(self) -> Tensor:
        """Draw token ids ``[1, T]``."""
        return torch.randint(0, self.sizes["vocab_size"], (1, self.context), device=self.device)

    def attention_flops(self) -> float:
        """Count causal attention: two products forward, twice, and five backward, of T^2 / 2 pairs a layer."""
        pairs, layers = self.context**2 / 2, self.sizes["num_hidden_layers"]
        return (2 * 2 + 5) * 2 * pairs * self.sizes["hidden_size"] * layers


def _chunked_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean next-token loss without logits, as the token weighting recipes compute it."""
    hidden = hidden_states(model, tokens)
    return output_head(model).nll(hidden[0, :-1], tokens[0, 1:]).mean()


def _plain_loss(model: Any, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model(tokens, use_cache=False).logits[0, :-1], tokens[0, 1:])


def _check_lora(device: str) -> None:
    """Compare a small model's loss and adapter gradients with those of its logits in float64."""
    sizes = EIGHT_BILLION | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    small = FineTuning(40, device, sizes | {"num_attention_heads": 4, "num_key_value_heads": 2}, torch.float32)
    tokens, results = small.tokens(), []
    for loss, exact in ((_chunked_loss, False), (_plain_loss, True)):
        model = small.model().double() if exact else small.model()
        value = loss(model, tokens)
        value.backward()
        moved = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}  # lora_A begins at 0
        results.append({"loss": value.detach()} | moved)
    check(results[0], results[1], 1e-4)


def products_of(step: Callable[[], object]) -> float:
    """Run a step and count the FLOPs of its matrix products, attention left out."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return float(sum(count for name, count in counts.items() if "attention" not in str(name)))


def fine_tuning(problem: FineTuning, peak: float) -> Iterator[Row]:
    """Compare the step with the peak, and its memory with 45 GiB."""
    _check_lora(problem.device)
    built: list[Any] = []

    def build_and_step() -> None:
        model = problem.model()
        built.append((model, trainer_of(model, partial(_chunked_loss, model), problem.tokens())))
        built[0][1]()

    held = peak_bytes_on(problem.device, build_and_step)
    model, step = built[0]
    flops = products_of(step) + problem.attention_flops()
    seconds = seconds_on(problem.device, {"ours": step})["ours"]
    size = sum(p.numel() for p in model.parameters()) / 1e9
    shape = f"{size:.3g}B parameters, LoRA r {LORA['r']}, {problem.context} tokens, checkpointing, bf16"
    measure = "training step, s, recomputed FLOPs counted"
    yield Row(shape, measure, seconds, f"{peak / 1e12:.0f} TFLOP/s", flops / peak, 0.4, floor=0.3)
    yield Row(shape, "weights and training step, peak bytes", held, "45 GiB", 45 * 2.0**30, 1, "lower")


@case("T3", group="training_gpu", device="cuda")
def published_drt() -> Iterator[Row]:
    yield from pretraining(Pretraining(), device_peak("cuda"))


@case("T4", group="training_gpu", device="cuda")
def eight_billion_lora() -> Iterator[Row]:
    yield from fine_tuning(FineTuning(), device_peak("cuda"))
