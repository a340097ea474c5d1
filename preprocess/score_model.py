"""The model that scores: which files it is, what it is set to, and how it is loaded.

Notable: identity and settings are found without loading the model, so a finished folder is recognised in the time it
takes to read the weights once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from datamodules.corpus_format import digest, file_sha256

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"
# In the order of preference of transformers and peft.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class ScorerOptions:
    """What decides the scorer.

    Attributes:
        model: folder or hub name of a Hugging Face causal LM.
        adapter: folder or hub name of a PEFT adapter for it.
        rope_theta: rotary base that replaces the model's, without its scaling.
        dtype: of the weights.
        attention: attention implementation.
    """

    model: str
    adapter: str | None = None
    rope_theta: float | None = None
    dtype: Dtype = "bfloat16"
    attention: str = "sdpa"


@dataclass(frozen=True)
class Scorer:
    """A scorer that is known but not loaded.

    Attributes:
        options: the user's.
        folder: where the model lies on this machine.
        adapter_folder: where the adapter lies.
        identity: plain values that decide what it computes.
        vocab_size: token ids it can read.
        max_positions: positions it was made for, None if it says nothing.
    """

    options: ScorerOptions
    folder: Path
    adapter_folder: Path | None
    identity: dict[str, Any]
    vocab_size: int
    max_positions: int | None


def find_scorer(options: ScorerOptions) -> Scorer:
    """Find the files of a model, hash them, and resolve its settings.

    Raises:
        FileNotFoundError: no such model or adapter.
        ValueError: it has no rotary base to replace, or unreadable files.
    """
    import transformers

    import models  # noqa: F401 - registers the suite's models
    from models.pretrained import override_rope

    folder = find_folder(options.model, CONFIG_FILE, WEIGHT_FILES)
    adapter = None if options.adapter is None else find_folder(options.adapter, ADAPTER_CONFIG_FILE, ADAPTER_FILES)
    config = transformers.AutoConfig.from_pretrained(folder)
    override_rope(config, theta=options.rope_theta, context_length=None)
    text = config.get_text_config()
    identity = {
        "model": {
            "config": file_sha256(folder / CONFIG_FILE),
            "weights": files_digest(weight_files(folder, WEIGHT_FILES)),
            "adapter": None if adapter is None else adapter_digest(adapter),
        },
        "rope_theta": options.rope_theta,
        "rope_parameters": getattr(text, "rope_parameters", None),
        "dtype": options.dtype,
        "attention": options.attention,
        "nll_dtype": "float32",
    }
    positions = None if options.rope_theta is not None else getattr(text, "max_position_embeddings", None)
    return Scorer(options, folder, adapter, identity, vocab_size=text.vocab_size, max_positions=positions)


def load_scorer(scorer: Scorer, device: torch.device) -> Any:
    """Load a model, with its adapter, for evaluation.

    Raises:
        ValueError: damaged weights, losses of a class that cannot be had without its logits, or an adapter that is no
            change of weights.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    from losses.output_head import verify_head
    from models.pretrained import load_causal_lm

    logging.disable_progress_bar()  # that of loading, beside which the command shows its own
    options = scorer.options
    try:
        model: Any = load_causal_lm(
            str(scorer.folder),
            dtype=options.dtype,
            attn_implementation=options.attention,
            rope_theta=options.rope_theta,
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {scorer.folder} are damaged or cut off ({error}): fetch them again"
        ) from error
    if scorer.adapter_folder is not None:
        model = _with_adapter(model, scorer.adapter_folder)
    model = model.eval().to(device)
    verify_head(model)
    return model


def choose_device(name: str, *, dtype: str, local_rank: int) -> torch.device:
    """Return the device of a process; ``auto`` takes the GPUs of the machine in turn, else the CPU.

    Raises:
        ValueError: no such device, or float16 on a CPU.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is auto, cpu or cuda, got {name}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device cuda is not available here: use --device cpu")
    if name == "cpu" or not available:
        if dtype == "float16":
            raise ValueError("float16 is not for CPUs (hundreds of times slower): use --dtype float32 or bfloat16")
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def find_folder(name: str, config: str, weights: tuple[str, ...]) -> Path:
    """Return the folder of a model or adapter, fetching it from the hub if it is no path.

    Args:
        name: folder or hub name.
        config: its configuration file.
        weights: possible names of its weights, best first.

    Raises:
        FileNotFoundError: nothing of that name here or on the hub, or no configuration in it.
    """
    path = Path(name)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"no model at {name}: give a Hugging Face folder or a hub name")
    folder = path if path.exists() else _from_hub(name, weights)
    if not (folder / config).is_file():
        raise FileNotFoundError(f"{folder} has no {config}: give a Hugging Face folder or a hub name")
    return folder


def weight_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the files of weights that are loaded from a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / part for part in sorted(set(parts))]
    raise FileNotFoundError(f"{folder} has no weights: looked for {', '.join(names)}")


def files_digest(files: list[Path]) -> str:
    """Return the SHA-256 of names and content of files, wherever they lie."""
    return digest([[file.name, file_sha256(file)] for file in files])


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of configuration and weights of an adapter."""
    return files_digest([folder / ADAPTER_CONFIG_FILE, *weight_files(folder, ADAPTER_FILES)])


def _from_hub(name: str, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path()
    try:
        for file in weights:
            stem, suffix = file.split(".")
            folder = Path(snapshot_download(name, allow_patterns=["*.json", f"{stem}*.{suffix}"]))
            if any(folder.glob(f"{stem}*.{suffix}")):
                break
    except Exception as error:  # the hub client raises many kinds
        raise FileNotFoundError(f"no model {name}: neither a folder nor a name that the hub answers to") from error
    return folder


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(folder))
    if any(config.is_prompt_learning for config in adapted.peft_config.values()):
        raise ValueError(f"the adapter {folder} puts tokens in front of the text: only adapters of weights can score")
    return adapted
