"""Which model speaks for which method and ratio: folders by name, or functions that build one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.loading import load_model, load_tokenizer
from evaluation.model_paths import HUB, writer_identity_of
from evaluation.results import digest
from patches.sentinel.sentinels import FILE_NAME, Sentinels, add_sentinels

RATIO = "RATIO"
DEFAULT = "default"
Model = str | Callable[[], Any]


class Models:
    """The models of a comparison, one of them in memory at a time.

    Args:
        models: one for all, or by method, ``default`` for methods that are not named; ``RATIO`` in a path stands for
            the ratio, and ``hub:NAME`` is a model of the hub.
        sentinels: of models that are built; folders have their own.
        seed: of models that are built.

    Raises:
        ValueError: no model.
    """

    def __init__(self, models: Model | Mapping[str, Model], *, sentinels: Sentinels | None, seed: int):
        self.by_method = dict(models) if isinstance(models, Mapping) else {DEFAULT: models}
        if not self.by_method or any(source is None for source in self.by_method.values()):
            raise ValueError("no model is named: pass model.path=FOLDER, or task.models={method: FOLDER, ...}")
        self.sentinels, self.seed = sentinels, seed
        self._held: tuple[Any, Any, Sentinels | None] | None = None

    def source(self, method: str, ratio: float) -> Model:
        """Return where the model of a cell comes from.

        Raises:
            ValueError: no model is named for the method.
        """
        found = self.by_method.get(method, self.by_method.get(DEFAULT))
        if found is None:
            raise ValueError(f"no model is named for {method}: add it, or {DEFAULT}, to task.models")
        return found.replace(RATIO, str(ratio)) if isinstance(found, str) else found

    def check(self, plan: Sequence[tuple[str, float]]) -> None:
        """Look for the folders of all cells.

        Raises:
            FileNotFoundError: a path is no model folder.
            ValueError: a method without a model, or a sentinel model without sentinels.
        """
        for method, ratio in plan:
            source = self.source(method, ratio)
            if not isinstance(source, str):
                continue
            folder = Path(source)
            is_path = folder.is_dir() or source.startswith((".", "/", "runs/"))
            if is_path and not (folder / "config.json").is_file():
                raise FileNotFoundError(f"{source} ({method}, ratio {ratio}) is no model folder: it has no config.json")
            if method == "sentinel" and not (folder / FILE_NAME).is_file():
                raise ValueError(
                    f"{source} has no {FILE_NAME}, so it cannot fold: name a model that recipe=wikitext2_sentinel_lora "
                    "trained, or leave sentinel out of sweep.methods"
                )

    def load(self, method: str, ratio: float, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the model of a cell and its sentinels."""
        source = self.source(method, ratio)
        if self._held is None or self._held[0] != source:
            self.release()
            model, sentinels = self._load(source, dtype, device)
            self._held = (source, model, sentinels)
        return self._held[1:]

    def release(self) -> None:
        """Forget the model in memory."""
        self._held = None

    def identities(self, plan: Sequence[tuple[str, float]]) -> dict[str, str]:
        """Return what tells the models of the cells apart, by ``method ratio``."""
        known: dict[Any, str] = {}
        for method, ratio in plan:
            source = self.source(method, ratio)
            if source not in known:
                known[source] = identity(source, self.seed)
        return {f"{method} {ratio}": known[self.source(method, ratio)] for method, ratio in plan}

    def _load(self, source: Model, dtype: torch.dtype, device: torch.device) -> tuple[Any, Sentinels | None]:
        if isinstance(source, str):
            sentinels = Sentinels.load(source) if (Path(source) / FILE_NAME).is_file() else None
            return load_model(source.removeprefix(HUB), dtype=dtype, device=device), sentinels
        model = built(source, self.seed)
        if self.sentinels is not None:
            add_sentinels(model, self.sentinels.open_id, slots=self.sentinels.slots, seed=self.seed)
        return model.to(device=device, dtype=dtype).eval(), self.sentinels


def built(make: Callable[[], Any], seed: int) -> Any:
    """Return a model that a function builds, its weights drawn under a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def identity(source: Model, seed: int) -> str:
    """Return what tells a model apart: the content of a folder, the name of a hub model, the weights of a built one."""
    if isinstance(source, str):
        return writer_identity_of(source) if Path(source).is_dir() else source
    weights = {name: float(tensor.double().sum()) for name, tensor in built(source, seed).state_dict().items()}
    return f"built:{digest(weights)[:16]}"


def tokenizer_of(source: Model) -> Any:
    """Return the tokenizer of a folder, or what a function returns.

    Raises:
        ValueError: there is none.
    """
    found = load_tokenizer(source.removeprefix(HUB)) if isinstance(source, str) else source()
    if not callable(getattr(found, "batch_decode", None)):
        raise ValueError(f"{source} has no tokenizer (tokenizer.json): name one with task.tokenizer=FOLDER")
    return found
