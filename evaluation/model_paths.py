"""What a user writes for a model: a folder, or ``hub:NAME``; how it is called in results, and what tells it apart."""

from collections.abc import Mapping
from pathlib import Path

from evaluation.results import digest, model_identity, read_json

HUB = "hub:"


def named_models(models: Mapping[str, str] | str) -> dict[str, str]:
    """Return label -> path of one or several models.

    Raises:
        ValueError: none is given.
        FileNotFoundError: a folder is no model folder.
    """
    named = {label_of(models): models} if isinstance(models, str) else dict(models or {})
    if not named:
        raise ValueError("models is empty: give a model folder or label: folder pairs")
    named = {label: str(path) for label, path in named.items()}
    for label, path in named.items():
        check_model(path, label)
    return named


def check_model(path: str, label: str) -> None:
    """Refuse a folder that holds no model.

    Raises:
        FileNotFoundError: it has no ``config.json``.
    """
    if not path.startswith(HUB) and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"model {label}: {path} is no model folder (it has no config.json); "
            "make one with export.py, or write hub:NAME for a model of the hub"
        )


def label_of(path: str) -> str:
    """Name a model by its folder, or by the run for ``runs/NAME/model``."""
    place = Path(path.removeprefix(HUB))
    return place.parent.name if place.name == "model" and place.parent.name else place.name


def writer_identity_of(path: str) -> str:
    """Return what tells a model apart that writes: its defaults of generation count, too."""
    defaults = Path(path) / "generation_config.json"
    if path.startswith(HUB) or not defaults.is_file():
        return identity_of(path)
    values = read_json(defaults)
    values.pop("transformers_version", None)
    return "sha256:" + digest([identity_of(path), values])


def identity_of(path: str) -> str:
    """Return what tells the model from others: the hub's name, or the hash of the folder."""
    return path if path.startswith(HUB) else model_identity(Path(path))
