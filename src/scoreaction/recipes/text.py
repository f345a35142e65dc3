"""The text of recipes: safe YAML, files and shipped names, and `key=value` overrides; values are not checked here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

from scoreaction import catalog
from scoreaction.catalog import Kind
from scoreaction.errors import UserError, nearest
from scoreaction.settings import dotted
from scoreaction.types import Values
from scoreaction.yaml_text import parse_yaml, read_text

KEYS = [
    "model", "reward", "algorithm", "critic", "sampler", "train", "prompts", "evaluation", "early_stop", "online", "distill",
    "steer", "data", "student", "pretrain",
]  # fmt: skip


def read_recipe(name_or_path: str) -> tuple[Values, Path]:
    """The unchecked values of a shipped recipe or a YAML file, and the file."""
    path = catalog.recipes().get(name_or_path, Path(name_or_path))
    if not os.path.isfile(path):
        if os.path.isdir(path):
            inside = path / "recipe.yaml"
            raise UserError(
                f"{name_or_path}: is a folder; give {inside if os.path.isfile(inside) else 'a shipped name or a YAML file'}"
            )
        looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        hint = "give a shipped name or a YAML file" if looks_like_path else nearest(name_or_path, catalog.recipes())
        raise UserError(f"{name_or_path}: no such recipe; {hint}")
    values = parse_yaml(read_text(path), where=str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    return values, path


SCORING = ("reward", "online", "train.select")
"""Beginnings of the settings of a run that only score: weights are read without them."""


def without_rewards(values: Values) -> Values:
    """A recipe's values without what only scores and measures, whose modules and files need not be there.

    >>> values = {"model": {"name": "digits"}, "reward": {"name": "mine.reward"}, "train": {"select": "held_out.mine"}}
    >>> without_rewards(values)["reward"], without_rewards(values)["train"]
    ({'name': 'none'}, {})
    """
    kept = {key: value for key, value in values.items() if key not in ("early_stop", "online", "steer")}
    without: dict[str, Values] = {"train": {"select": None}, "evaluation": {"held_out": [], "clusters": None}}
    for section, less in without.items():
        own = values.get(section, {})
        if isinstance(own, dict):
            kept[section] = {key: value for key, value in (own | less).items() if value is not None}
    return kept | {"reward": {"name": "none"}}


def parse_override(text: str) -> tuple[list[str], Any]:
    """`algorithm.beta=0.2` to its key and value, which is YAML.

    >>> parse_override("model.means=[[1, 0]]")
    (['model', 'means'], [[1, 0]])
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{text}: an override is key=value, for example algorithm.beta=0.2")
    return parts, parse_yaml(value, where=key)


def assign(values: Values, key: list[str], value: Any) -> None:
    """Sets a dotted key. A new name for a block drops the settings of the old one that are not of the same kind in the new."""
    place: Any = values
    for depth, part in enumerate(key):
        at = dotted(key[:depth])
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise UserError(f"{at}.{part}: {at} is a list; use {at}.0 to {at}.{len(place) - 1}")
            index: int | str = int(part)
        elif isinstance(place, dict):
            index = part
        else:
            raise UserError(f"{dotted(key)}: {at} is {place!r}, which has no keys")
        if depth == len(key) - 1:
            if part == "name":
                _rename(place, key, value)
            place[index] = value
        else:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[index]


def _rename(block: Values, key: list[str], name: Any) -> None:
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {"evaluation": "reward"}
    kind = kinds.get(key[0])
    if kind is None or block.get("name") in (None, name):
        return
    new = catalog.find(kind, name, key=dotted(key)).Config.model_fields
    try:
        old = catalog.find(kind, block["name"], key=dotted(key)).Config.model_fields
    except UserError:  # a misspelt name is mended: its settings were meant for the right one
        old = new
    for setting in set(block) - {"name", "weight"}:  # clips are clips, but the estimators of two algorithms are not the same
        if setting not in old or not suits(setting, new) or old[setting].annotation != new[setting].annotation:
            del block[setting]


def suits(setting: str, fields: dict[str, Any]) -> bool:
    """True if a block with these fields takes a setting made for another; one without a KL as published takes no beta.

    >>> from scoreaction.algorithms import ddpo, draft, dpok
    >>> [suits("beta", algorithm.Config.model_fields) for algorithm in (dpok, draft, ddpo)]
    [True, False, False]
    """
    return setting in fields and not (setting == "beta" and fields["beta"].default == 0)
