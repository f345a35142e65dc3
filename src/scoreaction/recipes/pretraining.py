"""The part of a recipe that `scoreaction pretrain` reads: its section `pretrain`, and the folder of its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scoreaction.errors import UserError
from scoreaction.recipes.recipe import SECTIONS, pretrain_settings
from scoreaction.recipes.text import KEYS, assign, parse_override, read_recipe
from scoreaction.recipes.validation import refuse_unknown
from scoreaction.training.pretraining import Pretrain


def pretraining(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Pretrain, Path | None]:
    """The settings of a recipe's `pretrain:` section, and the folder that its `model.path` names; other keys may be missing.

    UserError, one line that names the key or the file, for whatever is wrong.
    """
    values, _ = read_recipe(name_or_path)
    for key, value in map(parse_override, overrides):
        assign(values, key, value)
    refuse_unknown(values, KEYS, sections=SECTIONS)
    if values.get("pretrain") is None:
        raise UserError("pretrain: is required, for example pretrain: {data: table.csv}")
    model = values.get("model")
    own = model.get("path") if isinstance(model, dict) and model.get("name") == "pretrained" else None
    if own is not None and not isinstance(own, str):
        raise UserError(f"model.path: must be the name of a folder (got {own!r})")
    return pretrain_settings(values["pretrain"]), None if own is None else Path(own)
