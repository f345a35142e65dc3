"""Checks of values against a pydantic class; every fault is one line that names the dotted key."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from scoreaction.errors import UserError, nearest
from scoreaction.types import Values

C = TypeVar("C", bound=BaseModel)
Key = tuple[str | int, ...]


def dotted(key: Iterable[str | int]) -> str:
    """A key's parts with dots between them, blank ones in quotes.

    >>> dotted(("reward", 0, "scale")), dotted(("train", " "))
    ('reward.0.scale', "train.' '")
    """
    return ".".join(str(part) if str(part).strip() else repr(part) for part in key)


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


def fault_line(error: ValidationError, config: type[BaseModel], values: Values, at: Key) -> str:
    """The first fault in one line, unknown keys before others."""
    faults = error.errors(include_url=False)
    unknown = next((fault for fault in faults if fault["type"] == "extra_forbidden"), None)
    if unknown is not None:
        return _unknown(config, unknown["loc"], at)
    key = _place(faults[0]["loc"], values, missing=faults[0]["type"] == "missing")
    if faults[0]["type"] == "missing":
        return f"{dotted((*at, *key))}: is required"
    same = [fault for fault in faults if _place(fault["loc"], values) == key]
    problems = ", or ".join(dict.fromkeys(plain(fault["msg"]) for fault in same))
    value = "" if not key or faults[0]["type"] in ("value_error", "assertion_error") else f" (got {_short(faults[0]['input'])})"
    value += _hint(faults[0])
    setting = problems.partition(":")[0]
    if not key and setting in config.model_fields:  # a check of several settings names the one that is wrong
        return f"{dotted(at)}.{problems}"
    return f"{dotted((*at, *key))}: {problems}{value}"


def _hint(fault: Mapping[str, Any]) -> str:
    """The name that a misspelt one is near to, of those that may be chosen; nothing where it is near none."""
    if fault["type"] != "literal_error" or not isinstance(fault["input"], str):
        return ""
    hint = nearest(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _unknown(config: type[BaseModel], loc: Key, at: Key) -> str:
    for part in loc[:-1]:
        inner = config.model_fields[str(part)].annotation if str(part) in config.model_fields else None
        nested = [kind for kind in (inner, *get_args(inner)) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if nested:
            config = nested[0]
    known = [key for key in config.model_fields if key != "name"]
    return f"{dotted((*at, *loc))}: unknown key; {nearest(str(loc[-1]), known)}"


def _place(loc: Key, values: Any, *, missing: bool = False) -> Key:
    """The part of a location that is in the values: pydantic adds names of types to it."""
    place: list[str | int] = []
    for part in loc:
        inside = (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        )
        if not inside:
            return (*place, part) if missing else tuple(place)
        place.append(part)
        values = values[part]
    return tuple(place)


def plain(message: str) -> str:
    """A message of pydantic in our words.

    >>> plain("List should have at least 1 item after validation, not 0")
    'must have at least 1 item'
    """
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return re.sub(r"^[A-Z]\w+ should ", "must ", message).partition(" after validation, not ")[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
