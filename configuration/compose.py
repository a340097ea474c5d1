"""Compose a recipe and command-line overrides into one plain dictionary.

Every file ``recipes/NAME.yaml`` is a recipe; folders beside it are option groups (``scale=tiny``). Keys that a
recipe does not list but the target object accepts may be set without Hydra's ``+``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configuration.errors import ConfigError, did_you_mean
from configuration.targets import import_target, named_parameters

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NOT_RECIPES = ("base",)
_COPY = re.compile(r"\$\{([\w.]+)\}")


class Composed(dict[str, Any]):
    """A resolved recipe that remembers which of its values are copies.

    Attributes:
        sources: the option that a value is copied from, ``{"data.seed": "seed", "module.model": "model"}``.
    """

    def __init__(self, values: dict[str, Any], sources: dict[str, str]):
        super().__init__(values)
        self.sources = sources


def at_source(sentences: Sequence[str], config: dict[str, Any]) -> list[str]:
    """Name every copied value by the option that it is copied from; what must be something must be it once."""
    sources = getattr(config, "sources", {})

    def source_of(option: str) -> str:
        for copy, source in sources.items():
            if option == copy or option.startswith(copy + "."):
                return source_of(source + option.removeprefix(copy))
        return option

    once: dict[str, str] = {}
    for sentence in sentences:
        renamed = re.sub(r"\w+(\.\w+)+", lambda option: source_of(option[0]), sentence)
        once.setdefault(renamed.split(" must be ")[0], renamed)
    return list(once.values())


def recipe_names(command: str | None = None) -> list[str]:
    """Names of all recipes, or of those that one command runs."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in NOT_RECIPES)
    return [name for name in names if command is None or recipe_command(name) == command]


def recipe_command(name: str) -> str:
    """The command that runs a recipe: its ``command`` key or that of the recipe it inherits, else ``train``."""
    return _declared(name, "command", "train")


def _declared(name: str, key: str, default: str) -> str:
    """A top-level key of a recipe file or of the recipe it inherits, read before anything is composed."""
    loaded = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    parents = [entry for entry in loaded.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return str(loaded.get(key, _declared(parents[0], key, default) if parents else default))


def recipe_purpose(name: str) -> str:
    """The first comment line of a recipe: what it is."""
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip()


def group_choices() -> dict[str, list[str]]:
    """Option groups and their choices, ``{"scale": ["full", ...], "model": ["drt/full", ...]}``."""
    groups: dict[str, list[str]] = {}
    for folder in sorted(path for path in RECIPES.iterdir() if path.is_dir() and not path.name.startswith("_")):
        files = sorted(folder.rglob("*.yaml"))
        groups[folder.name] = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
    return groups


def compose(arguments: Sequence[str], *, command: str, default_recipe: str | None = None) -> Composed:
    """Compose ``recipe=NAME key=value ...`` into a resolved dictionary of plain values.

    Raises:
        ConfigError: with every problem of the command line, each with the nearest valid name.
    """
    recipe, rest = _split_recipe(arguments, command, default_recipe)
    overrides, problems = _parse(rest)
    groups = group_choices()
    chosen = [o for o in overrides if o.key_or_group in groups]
    values = [o for o in overrides if o.key_or_group not in groups]
    for override in chosen:
        problems += _group_problems(override, groups[override.key_or_group])
    if problems:
        raise ConfigError(problems)
    lines = [o.input_line or "" for o in chosen]
    if command == "train" or _declared(recipe, "sizes", ""):
        lines = _scale_last(recipe, lines)
    skeleton = OmegaConf.to_container(_hydra(recipe, lines), resolve=False)
    assert isinstance(skeleton, dict)
    for override in values:
        line, problem = _locate(override, skeleton)  # type: ignore[arg-type]
        lines.append(line)
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(problems)
    config = _hydra(recipe, lines)
    leaves = _leaves(OmegaConf.to_container(config, resolve=False))
    missing = [key for key, value in leaves if value == "???"]
    if missing:
        raise ConfigError([f"{key} is required by recipe={recipe}: pass {key}=VALUE" for key in missing])
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([f"recipe={recipe} does not resolve: {_first_line(error)}"]) from None
    copies = {key: match[1] for key, value in leaves if (match := _COPY.fullmatch(str(value)))}
    return Composed({"recipe": recipe, **plain}, copies)  # type: ignore[dict-item]


def _split_recipe(arguments: Sequence[str], command: str, default: str | None) -> tuple[str, list[str]]:
    """Take ``recipe=NAME`` out of the arguments and make sure that this command runs it."""
    rest = [a for a in arguments if not a.startswith("recipe=") and a != "--traceback"]
    named = [a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")]
    mine = recipe_names(command)
    if len(named) > 1:
        raise ConfigError([f"one recipe at a time, got {' and '.join(named)}"])
    name = named[0] if named else default
    if name is None:
        raise ConfigError([f"which recipe? pass recipe=NAME, one of: {', '.join(mine)}"])
    if name not in recipe_names():
        near = did_you_mean(name, recipe_names())
        raise ConfigError([f"unknown recipe {name!r}{near}; recipes of {command}.py: {', '.join(mine)}"])
    if name not in mine:
        other = recipe_command(name)
        raise ConfigError([f"recipe={name} belongs to {other}.py: run python {other}.py recipe={name}"])
    return name, rest


def _parse(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
    overrides, problems = [], []
    for argument in arguments:
        if argument.startswith("-"):
            problems.append(f"unknown flag {argument!r}: options are written key=value (see --help)")
            continue
        try:
            text = argument.startswith("prompt=")
            overrides += OverridesParser.create().parse_overrides([_quoted(argument) if text else argument])
        except HydraException:
            problems.append(f"cannot read {argument!r}: write key=value, with quotes around values that hold = or ,")
    return overrides, problems


def _quoted(argument: str) -> str:
    """``key=text`` with the text quoted as Hydra's grammar wants it: any characters, taken as they are."""
    key, _, text = argument.partition("=")
    # Backslashes count only before a quote and at the end.
    escaped = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text).replace("${", "\\${")
    return f"{key}='{escaped}'"


def _group_problems(override: Override, choices: list[str]) -> list[str]:
    value = override.value()
    wanted = value if isinstance(value, list) else [value]  # group=[a,b] takes both
    unknown = [] if override.is_delete() else [choice for choice in wanted if choice not in choices]
    return [
        f"unknown choice {override.key_or_group}={choice}{did_you_mean(str(choice), choices)}; "
        f"choices: {', '.join(choices)}"
        for choice in unknown
    ]


def _scale_last(recipe: str, lines: list[str]) -> list[str]:
    """Append the scale, chosen or the recipe's own, so that it wins over the recipe and all it inherits.

    What a scale means for the sections of a method is in the folder that the recipe's ``sizes`` names.
    """
    chosen = [line.removeprefix("scale=") for line in lines if line.startswith("scale=")]
    scale = chosen[-1] if chosen else _declared(recipe, "scale", "full")
    method = _declared(recipe, "sizes", "pretraining")
    found = sorted(path.stem for path in (RECIPES / "sizes" / method).glob("*.yaml"))
    if scale not in found:
        raise ConfigError([f"recipe={recipe} has no scale={scale}; choices: {', '.join(found)}"])
    # What a scale means for the trainer and its loaders has no place in a recipe without one.
    general = [f"+scale={scale}"] if _trains(recipe) else []
    return [*(line for line in lines if not line.startswith("scale=")), *general, f"+sizes/{method}={scale}"]


def _trains(recipe: str) -> bool:
    """Whether a recipe, or one that it inherits, chooses a trainer."""
    loaded = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    entries = loaded.get("defaults", [])
    parents = [entry for entry in entries if isinstance(entry, str) and (RECIPES / f"{entry}.yaml").is_file()]
    return any(isinstance(entry, dict) and "trainer" in entry for entry in entries) or any(map(_trains, parents))


def _hydra(recipe: str, overrides: list[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(RECIPES), version_base="1.3"):
            return hydra_compose(recipe, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        # A group that the recipe does not choose from, such as a scale where all sizes are options.
        group = re.match(r"Could not override '(\w+)'", _first_line(error))
        sentence = f"takes no {group[1]}=: leave it out" if group else f"does not compose: {_first_line(error)}"
        raise ConfigError([f"recipe={recipe} {sentence}"]) from None


def _locate(override: Override, config: dict[str, Any]) -> tuple[str, str | None]:
    """Return the override as Hydra wants it, and a problem if its key means nothing.

    A key that the recipe leaves out but the parent's target accepts gets the ``+`` that Hydra asks for.
    """
    line, key = override.input_line or "", override.key_or_group
    if override.is_add() or override.is_force_add():
        return line, None
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict):
            return line, f"unknown option {key!r}: {key[: key.rindex('.' + part)]} is a value, not a section"
        if part in node:
            node = node[part]
            continue
        accepted = _accepted(node)
        if part in accepted and not override.is_delete():
            return "+" + line, None
        return line, f"unknown option {key!r}{_suggest(key, part, [*node, *accepted], config)}"
    return line, None


def _accepted(parent: dict[str, Any]) -> list[str]:
    try:
        return list(named_parameters(import_target(parent["_target_"])))
    except (KeyError, ValueError):
        return []


def _suggest(key: str, part: str, siblings: list[str], config: dict[str, Any]) -> str:
    """Suggest a sibling with a similar name, else a key of the same last name anywhere in the recipe."""
    near = did_you_mean(part, [name for name in siblings if not name.startswith("_")])
    last = key.split(".")[-1]
    elsewhere = [path for path, _ in _leaves(config) if path.split(".")[-1] == last]
    return f" (did you mean '{elsewhere[0]}'?)" if elsewhere and not near else near


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values of everything in a nested dictionary that is not a section."""
    if not isinstance(node, dict):
        return [(prefix.removesuffix("."), node)]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{prefix}{key}.")]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
