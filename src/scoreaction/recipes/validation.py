"""Checks of a recipe's values against a pydantic class; every fault is one line that names the dotted key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from scoreaction.errors import UserError, nearest
from scoreaction.settings import Key, dotted, fault_line
from scoreaction.types import Values

C = TypeVar("C", bound=BaseModel)


def check(config: type[C], values: Any, at: Key, *, name: str | None = None) -> C:
    """`config` with these values, strictly: a text is no number, True is no integer, 3 may stand for 3.0.

    `name` is put into the class's own field `name`; a user's file reached by a dotted path may have left its short name
    there.
    """
    if not isinstance(values, dict):
        raise UserError(f"{dotted(at)}: must be a mapping of settings (got {values!r})")
    check_finite(values, at)
    if "name" in config.model_fields:
        allowed = get_args(config.model_fields["name"].annotation)
        values = {"name": allowed[0] if allowed and name not in allowed else name, **values}
    try:
        return config.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(fault_line(error, config, values, at)) from error


def check_finite(value: Any, at: Key) -> None:
    """Raises UserError for a number that is infinite or undefined."""
    if isinstance(value, dict):
        for key, inner in value.items():
            check_finite(inner, (*at, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_finite(inner, (*at, i))
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{dotted(at)}: must be a finite number (got {value})")
    elif isinstance(value, int) and value.bit_length() > 1000:
        raise UserError(f"{dotted(at)}: must be a finite number (got one of {value.bit_length()} bits)")


def refuse_unknown(values: Values, known: Sequence[str], *, sections: Mapping[str, type[BaseModel]]) -> None:
    """Raises UserError for the first key that is not known, with the section that it belongs to."""
    for key in values:
        if key in known:
            continue
        home = next((section for section, config in sections.items() if key in config.model_fields), None)
        if key == "beta":
            home = "algorithm"
        raise UserError(f"{dotted([key])}: unknown key; {f'did you mean {home}.{key}?' if home else nearest(key, known)}")
