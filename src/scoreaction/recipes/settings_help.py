"""Settings as text: the keys of a class with the values that they take and their defaults."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema


def settings_table(config: type[BaseModel]) -> str:
    """A class's settings: the text of its docstring, and a line for each with its default and the values it takes.

    >>> class Config(BaseModel):
    ...     '''scale: by which it is multiplied.'''
    ...     scale: float = 1.0
    >>> print(settings_table(Config))
    scale: by which it is multiplied.
    <BLANKLINE>
    key    default  takes
    scale  1.0      number
    """
    rows = [("key", "default", "takes"), *_rows(config)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    table = [f"{key:<{widths[0]}}  {default:<{widths[1]}}  {takes}".rstrip() for key, default, takes in rows]
    prose = inspect.cleandoc(config.__doc__ or "").partition(">>>")[0].strip()
    return "\n".join([*([prose, ""] if prose else []), *(table if len(rows) > 1 else ["no settings"])])


def _rows(config: type[BaseModel]) -> list[tuple[str, str, str]]:
    """Key, default and values of each setting; of one that is a block of settings those of the block, with dotted keys."""
    try:
        schema = config.model_json_schema(mode="validation", by_alias=False)
    except PydanticInvalidForJsonSchema:  # a field of a kind that JSON does not have
        schema = {}
    top = schema.get("$defs", {}).get(schema["$ref"].rpartition("/")[2], {}) if "$ref" in schema else schema
    rows = []
    for name, field in config.model_fields.items():
        if name == "name":
            continue
        block = field.annotation
        if isinstance(block, type) and issubclass(block, BaseModel):
            rows += [(f"{name}.{key}", default, takes) for key, default, takes in _rows(block)]
            continue
        default = "required" if field.is_required() else _text(field.get_default(call_default_factory=True))
        takes = _takes(top["properties"][name], schema) if top else str(field.annotation)
        rows.append((name, default, takes + (f"; {field.description}" if field.description else "")))
    return rows


def _takes(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The values that a JSON schema's field admits, in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_takes(part, schema) for part in field["anyOf"]))
    if "$ref" in field:
        inner = schema["$defs"][field["$ref"].rpartition("/")[2]]
        return _takes(inner, schema) if "enum" in inner else "mapping"
    if "enum" in field:
        return " or ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        return f"list of {_several(field['items'], schema)}" if "type" in field.get("items", {}) else "list"
    kinds = {"number": "number", "integer": "whole number", "boolean": "true or false", "string": "text", "null": "null"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {field[key]:.10g}" for key, word in bounds.items() if key in field and abs(field[key]) < 2**53]
    return " ".join([kinds.get(field.get("type", ""), "mapping" if "type" in field else "anything"), *limits])


def _several(items: dict[str, Any], schema: dict[str, Any]) -> str:
    """The values of a list's items: kinds in the plural, and names as they are to be written."""
    one = _takes(items, schema)
    return one if "enum" in items else re.sub(r"^(list|whole number|number|text|mapping)\b", r"\1s", one)


def _text(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "{" + ", ".join(f"{key}: {value}" for key, value in default.model_dump().items()) + "}"
    return default if isinstance(default, str) and default else json.dumps(default, ensure_ascii=False, default=str)
