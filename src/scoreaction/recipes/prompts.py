"""The recipe's `prompts`: a shipped set, a list, or a file of lines, JSON or a table; with weights and metadata."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from scoreaction import catalog
from scoreaction.errors import UserError, nearest
from scoreaction.types import Prompt
from scoreaction.yaml_text import read_text

PromptValue = str | dict[str, Any]
"""A text, or a mapping with `prompt`, perhaps `weight`, and metadata for a reward."""
EXAMPLE = '{"prompt": "a cat", "weight": 2}'


def read_prompts(value: Any, folder: Path) -> str | list[PromptValue] | None:
    """Prompts as a recipe has them: null, a shipped set by name, a file (also looked for in `folder`), or a list.

    What a file holds is kept, so that runs stand alone. UserError for whatever is wrong.
    """
    if value is None or (isinstance(value, str) and value in catalog.prompt_sets()):
        return value
    if isinstance(value, str):
        path = next((p for p in (Path(value), folder / value) if p.is_file()), None)
        if path is None:
            raise UserError(
                f"prompts: {value!r} is neither a shipped set nor a text file; {nearest(value, catalog.prompt_sets())}"
            )
        return _file(path)
    if not isinstance(value, list) or not value:
        raise UserError(f"prompts: must be null, the name of a shipped set, a file or a list of texts (got {value!r})")
    return _drawable([_checked(prompt, f"prompts.{i}") for i, prompt in enumerate(value)], "prompts")


def prompt_list(prompts: str | list[PromptValue] | None) -> list[str] | None:
    """The prompts themselves: plain texts, or a `Prompt` with weight and metadata.

    >>> prompt_list(["a cat", {"prompt": "two cats", "count": 2}])[1].metadata
    {'count': 2}
    """
    if isinstance(prompts, str):
        return [line.strip() for line in read_text(catalog.prompt_sets()[prompts]).splitlines() if line.strip()]
    return None if prompts is None else [_prompt(value) for value in prompts]


def _prompt(value: PromptValue) -> str:
    if isinstance(value, str):
        return value
    rest = {key: more for key, more in value.items() if key not in ("prompt", "weight")}
    return Prompt(value["prompt"], weight=value.get("weight", 1.0), metadata=rest)


def _file(path: Path) -> list[PromptValue]:
    """The prompts of a file, read by the ending of its name."""
    where, ending = f"prompts: {path}", path.suffix.lower()
    if ending not in READERS:
        lines = "; pandas.read_parquet(FILE).to_json(OTHER, orient='records', lines=True) writes a .jsonl"
        raise UserError(f"{where}: must be a .txt, .jsonl, .json, .csv or .tsv{lines if ending == '.parquet' else ''}")
    prompts = [_checked(value, f"{where} {place}") for place, value in READERS[ending](read_text(path), where)]
    if not prompts:
        raise UserError(f"{where} holds no prompt; write one a line")
    return _drawable(prompts, where)


Places = list[tuple[str, Any]]
"""Unchecked prompts of a file, each with its place there."""


def _lines(text: str, where: str) -> Places:
    """A prompt a line."""
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if any(isinstance(_json(part), list | dict) for part in (text, *(line for _, line in lines[:1]))):
        raise UserError(f"{where}: holds JSON; let its name end in .json or .jsonl")
    return lines


def _json_lines(text: str, where: str) -> Places:
    """A JSON text or object a line."""
    lines = [
        (place, _json(line)) for place, line in ((f"line {i}", x) for i, x in enumerate(text.split("\n"), 1)) if line.strip()
    ]
    for place, value in lines:
        if value is None:
            raise UserError(f"{where} {place}: not JSON; write an object such as {EXAMPLE} on each line")
    return lines


def _json_list(text: str, where: str) -> Places:
    """A JSON list of texts or objects; lines of them are read too."""
    values = _json(text)
    return [(f"item {i}", x) for i, x in enumerate(values, 1)] if isinstance(values, list) else _json_lines(text, where)


def _json(text: str) -> Any:
    """The value of a JSON text, None for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _table(text: str, where: str, *, delimiter: str) -> Places:
    """The column of prompts by its heading, which a single column need not have; other columns are weight and metadata."""
    first = text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=";" if ";" in first and delimiter not in first else delimiter, strict=True)
    try:
        rows = [(f"line {reader.line_num}", [cell.strip() for cell in row]) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(
            f"{where} line {reader.line_num}: {error}; put cells with quotes into quotes, and double theirs"
        ) from error
    names = [cell.lower() for cell in rows[0][1]] if rows else []
    column = next((names.index(heading) for heading in HEADINGS if heading in names), None)
    if column is None and len(names) > 1:
        raise UserError(f"{where}: none of its columns ({', '.join(names)}) is named prompt; name the column of the prompts so")
    for place, row in rows:
        if len(row) != len(names):
            raise UserError(
                f"{where} {place}: has {len(row)} cells for {len(names)} columns; put cells with commas into quotes"
            )
    if len(names) < 2:
        return [(place, row[0]) for place, row in rows[0 if column is None else 1 :]]
    return [(place, _record(dict(zip(rows[0][1], row, strict=True)), row[column or 0])) for place, row in rows[1:]]


def _record(cells: dict[str, Any], prompt: str) -> dict[str, Any]:
    with suppress(KeyError, ValueError):  # a weight that is no number is refused with all others
        cells["weight"] = float(cells["weight"])
    return {**cells, "prompt": prompt}


HEADINGS = ("prompt", "prompts", "caption", "text")
"""Headings, in any case, of a table's column of prompts."""
READERS: dict[str, Callable[[str, str], Places]] = {
    "": _lines, ".txt": _lines, ".jsonl": _json_lines, ".json": _json_list,
    ".csv": partial(_table, delimiter=","), ".tsv": partial(_table, delimiter="\t"),
}  # fmt: skip
"""How a file is read, by the ending of its name."""


def _checked(value: Any, where: str) -> PromptValue:
    """A text, or a mapping whose prompt is one and whose weight is a number."""
    if isinstance(value, dict):
        text, weight = value.get("prompt"), value.get("weight", 1.0)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: must have a prompt that is a text (got {text!r})")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"{where}: weight must be a number, 0 or more (got {weight!r})")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: must be a text; put it in quotes (got {value!r})")
    if not str(value).strip():
        raise UserError(f"{where}: is empty; write a prompt")
    return str(value)


def _drawable(values: list[PromptValue], where: str) -> list[PromptValue]:
    if all(isinstance(value, dict) and value.get("weight", 1.0) == 0 for value in values):
        raise UserError(f"{where}: every weight is 0; give one prompt a weight above it")
    return values
