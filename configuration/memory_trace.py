"""What a step holds beside weights and moments, counted by running it on tensors that have shapes but no data.

Notable: every operator of forward and backward runs, so any model is counted, at any size, on any machine; only what
would take time or look at numbers is cut short: of the equal blocks that a kernel works through one is run, and a
frozen retriever is replaced. A GPU's blocks are larger than a CPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kernels that work through equal blocks: the generator of the blocks, and which of them needs the most memory.
_BLOCKS = (
    ("kernels.cross_entropy._blocks", 0),
    ("kernels.gca.retrieval._row_blocks", 0),
    ("kernels.landmark.tiled._tiles", -1),
    ("kernels.sliding_window.blocked._tiles", 0),
)
# Sizes of these blocks by type of device.
_SIZES = (
    "kernels.cross_entropy.BLOCK",
    "kernels.gca.selection.BLOCK",
    "kernels.landmark.tiled.TILE",
    "kernels.sliding_window.blocked.MAX_BLOCK",
    "kernels.sliding_window.blocked.TILE",
)


def _received(_: Tensor, like: Tensor, group: Any, step: int) -> Tensor | None:
    return torch.empty_like(like) if 0 <= group.rank - step < group.size else None


def _random_retriever(*_: Any) -> Any:
    from models.rpt.retrievers import RandomRetriever

    return RandomRetriever()


# What asks for numbers or for other processes, and what stands in for it.
_STAND_INS: dict[str, Callable[..., Any]] = {
    "kernels.context_parallel.exchange.gather_whole": lambda *_, **__: None,
    "kernels.context_parallel.exchange.shift": _received,
    "losses.cross_entropy._check_vocabulary": lambda *_: None,
    "models.rpt.modeling_rpt.configured_retriever": _random_retriever,
    "torch.compiler.is_compiling": lambda: True,  # kernels then look at no number
    "torch.distributed.all_to_all_single": lambda *_, **__: None,
    # Numbers would tell transformers that no row is packed; attention without padding then needs no mask.
    "transformers.masking_utils.find_packed_sequence_indices": lambda _: None,
    "transformers.masking_utils.is_tracing": lambda padding=None: padding is not None,
}


@dataclass(frozen=True)
class StepTrace:
    """Bytes of a step that are not weights or moments.

    Attributes:
        kept: when the forward pass ends: what the backward pass waits for.
        forward: at the fullest moment of the forward pass.
        most: at the fullest moment, without gradients of weights.
        most_together: at the fullest moment, gradients of weights that the step has made by then included.
    """

    kept: int
    forward: int
    most: int
    most_together: int

    def continued(self, longer: StepTrace, share: float) -> StepTrace:
        """What a longer step needs still, ``share`` times as far beyond it as it is beyond this one."""
        pairs = zip(astuple(self), astuple(longer), strict=True)
        return StepTrace(*(int(there + share * (there - here)) for here, there in pairs))


class LiveBytes(TorchDispatchMode):
    """Adds up the memory that operators allocate, while it lives; what existed before does not count.

    Attributes:
        others: bytes alive now that are not gradients of weights.
        gradients: bytes alive now that are.
        most: the largest ``others`` so far.
        most_together: the largest sum of both so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.others = self.gradients = self.most = self.most_together = 0
        self._alive: dict[int, tuple[Any, int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns."""
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._add(given.untyped_storage(), new=False)
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage(), new=True)
        return results

    def keep_apart(self, weight: Tensor) -> None:
        """Count the gradient that a weight has just received as a gradient."""
        assert weight.grad is not None
        key = weight.grad.untyped_storage()._cdata
        reference, size, known = self._alive[key]
        if not known:
            self._alive[key] = reference, size, True
            self.others, self.gradients = self.others - size, self.gradients + size

    def _add(self, storage: Any, *, new: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self._alive:
            return
        self._alive[key] = weakref.ref(storage, lambda _: self._remove(key)), size, False
        self.others += size
        self.most = max(self.most, self.others)
        self.most_together = max(self.most_together, self.others + self.gradients)

    def _remove(self, key: int) -> None:
        _, size, is_gradient = self._alive.pop(key)
        if is_gradient:
            self.gradients -= size
        else:
            self.others -= size


def trace_step(model: nn.Module, loss: Callable[[], Tensor], *, low: bool) -> StepTrace:
    """Count a forward and a backward pass; inside of `without_data`.

    Args:
        model: whose gradients are kept apart.
        loss: runs the forward pass.
        low: whether it runs under bfloat16 autocast.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    live = LiveBytes()
    hooks = [parameter.register_post_accumulate_grad_hook(live.keep_apart) for parameter in trained]
    try:
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                result = loss()
            kept, forward = live.others, live.most
            result.backward()
        return StepTrace(kept, forward, live.most, live.most_together)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None


@contextmanager
def without_data(*, like_gpu: bool) -> Iterator[None]:
    """Let tensors that are made inside have shapes, types and places in memory but no numbers.

    Args:
        like_gpu: work in the blocks of a GPU, and norm as it does.
    """
    with ExitStack() as stack:
        for name, place in _BLOCKS:
            stack.enter_context(patch(name, _only(_found(name), place)))
        if like_gpu:
            for name in _SIZES:
                sizes = _found(name)
                stack.enter_context(patch.dict(sizes, {"cpu": sizes["cuda"]}))
            stack.enter_context(
                patch("models.rms_norm._CPUNorm.apply", _exact_norm(_found("models.rms_norm._CPUNorm")))
            )
        for name, stand_in in _STAND_INS.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def place_weights(module: nn.Module) -> None:
    """Replace weights and buffers on the meta device by ones that computations on the CPU take; inside `without_data`.

    ``Module.to_empty`` cannot: it swaps tensors, which these refuse.
    """
    placed: dict[Tensor, Tensor] = {}

    def place(tensor: Tensor) -> Tensor:
        if tensor not in placed:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_weight = isinstance(tensor, nn.Parameter)
            placed[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return placed[tensor]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = place(tensor)  # type: ignore[assignment]


def _found(name: str) -> Any:
    """An attribute by its dotted name."""
    from pkgutil import resolve_name

    module, _, attribute = name.rpartition(".")
    return getattr(resolve_name(module), attribute)


def _only(blocks: Callable[..., Iterator[Any]], place: int) -> Callable[..., Iterator[Any]]:
    def one(*arguments: Any, **options: Any) -> Iterator[Any]:
        every = list(blocks(*arguments, **options))
        return iter([every[place]] if every else [])

    return one


def _exact_norm(norm: Any) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The fused norm of a GPU keeps its input in float32."""
    apply = norm.apply

    def exact(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        result: Tensor = apply(x.float(), weight.float(), eps)
        return result.to(x.dtype)

    return exact
