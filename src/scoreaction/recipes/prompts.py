"""The recipe's `prompts`: a shipped set, a list, or a file of lines, JSON, a table or parquet; with weights and metadata."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from scoreaction import catalog
from scoreaction.errors import UserError, missing, nearest, one_line
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
        path = next((p for p in (Path(value), folder / value) if os.path.isfile(p)), None)
        if path is None:
            name, hint = one_line(repr(value), most=100), nearest(value, catalog.prompt_sets())
            raise UserError(f"prompts: {name} is neither a shipped set nor a text file; {hint}")
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
    if ending not in READERS and ending != ".parquet":
        raise UserError(f"{where}: must be a .txt, .jsonl, .json, .csv, .tsv or .parquet")
    places = _parquet(path, where) if ending == ".parquet" else READERS[ending](read_text(path), where)
    prompts = [_checked(value, f"{where} {place}") for place, value in places]
    if not prompts:
        raise UserError(f"{where} holds no prompt; write one a line")
    return _drawable(prompts, where)


Places = list[tuple[str, Any]]
"""Unchecked prompts of a file, each with its place there."""


def _lines(text: str, where: str) -> Places:
    """A prompt a line."""
    if text.lstrip().startswith(("[\n", '["', "[{", "{\n", '{"')):
        raise UserError(f"{where}: holds JSON; let its name end in .json or .jsonl")
    return [(f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _json_lines(text: str, where: str) -> Places:
    """A JSON text or object a line."""
    lines = enumerate(text.split("\n"), start=1)
    return [(f"line {number}", _json(line, f"{where} line {number}")) for number, line in lines if line.strip()]


def _json_list(text: str, where: str) -> Places:
    """A JSON list of texts or objects, or lines of them."""
    with suppress(UserError):
        if isinstance(values := _json(text, where), list):
            return [(f"item {number}", value) for number, value in enumerate(values, start=1)]
    return _json_lines(text, where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON; write an object such as {EXAMPLE} on each line") from error


def _table(text: str, where: str, *, delimiter: str) -> Places:
    """The column of prompts by its heading, which a single column need not have; others are weight and metadata."""
    first = text.lstrip().partition("\n")[0]
    delimiter = ";" if ";" in first and delimiter not in first else delimiter
    reader = csv.reader(io.StringIO(text.lstrip()), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        rows: Places = [(f"line {reader.line_num}", dict(zip(names, row, strict=True))) for row in reader if any(row)]
    except (csv.Error, ValueError) as error:
        fault = f"must have {len(names)} cells; put cells with {delimiter!r} or quotes in quotes, doubling their own"
        raise UserError(f"{where} line {reader.line_num}: {fault}") from error
    heading = _heading(names, where) if len(names) > 1 else next((name for name in names if name.lower() in HEADINGS), None)
    if len(names) < 2:
        return [("line 1", name) for name in names if heading is None] + [(place, row[names[0]].strip()) for place, row in rows]
    for _, row in rows:
        with suppress(KeyError, ValueError):  # a weight that is no number is refused with all others
            row["weight"] = float(row["weight"])
    return [(place, {**row, "prompt": row[heading].strip()}) for place, row in rows]


def _heading(names: list[str], where: str) -> str:
    """The column of prompts."""
    heading = next((name for known in HEADINGS for name in names if name.lower() == known), None)
    if heading is None:
        raise UserError(f"{where}: none of its columns ({', '.join(names)}) is named prompt; name the column of the prompts so")
    return heading


def _parquet(path: Path, where: str) -> Places:
    """The column of prompts by its heading, others as weight and metadata: as JSON has them, dates and the like as texts."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise UserError(f"{where}: {missing('pyarrow')}; or write it as .jsonl, .csv or .tsv") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise UserError(f"{where}: cannot be read as parquet ({error}); write it anew, or as .jsonl") from error
    heading = _heading(list(rows[0]), where) if rows else ""
    plain = json.loads(json.dumps(rows, default=str))
    return [(f"row {number}", {**row, "prompt": row[heading]}) for number, row in enumerate(plain, start=1)]


HEADINGS = ("prompt", "prompts", "caption", "text")
"""Headings, in any case, of a table's column of prompts."""
READERS: dict[str, Callable[[str, str], Places]] = {
    "": _lines, ".txt": _lines, ".jsonl": _json_lines, ".json": _json_list,
    ".csv": partial(_table, delimiter=","), ".tsv": partial(_table, delimiter="\t"),
}  # fmt: skip


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
