"""Settings: pydantic classes whose every fault is one line that names the key, in a recipe and in Python alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from scoreaction.errors import UserError, nearest, one_line
from scoreaction.types import Values

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # which has no public name

Key = tuple[str | int, ...]


class _OneLine(ModelMetaclass):
    """The class of `Settings`: a call that fails says so in one line."""

    def __call__(cls: Any, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise UserError(fault_line(error, cls, values, (cls.__name__,))) from error


class Settings(BaseModel, metaclass=_OneLine):
    """A pydantic class that is refused in one line: its name, the key, and the nearest one where there is no such key.

    >>> class Sampler(Settings, extra="forbid"):
    ...     steps: int = 50
    >>> Sampler(step=3)
    Traceback (most recent call last):
    scoreaction.errors.UserError: Sampler.step: unknown key; did you mean steps?
    """


def dotted(key: Iterable[str | int]) -> str:
    """A key's parts with dots between them, blank ones in quotes.

    >>> dotted(("reward", 0, "scale")), dotted(("train", " "))
    ('reward.0.scale', "train.' '")
    """
    return ".".join(str(part) if str(part).strip() else repr(part) for part in key)


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
    >>> plain("Input should be an object")
    'must be a mapping of settings'
    """
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.replace("should be an object", "should be a mapping of settings")
    return re.sub(r"^[A-Z]\w+ should ", "must ", message).partition(" after validation, not ")[0]


def _short(value: Any) -> str:
    return one_line(repr(value), most=57)
