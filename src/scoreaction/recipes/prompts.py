"""The recipe's `prompts`: a shipped set, a file of lines or of JSON lines, or a list; with weights and metadata."""

from __future__ import annotations

import json
import math
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
    """A prompt a line; in a .jsonl file a JSON text or object a line."""
    prompts: list[PromptValue] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line.strip())
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"prompts: {path} line {number}: not JSON; write an object such as {EXAMPLE} on each line"
            ) from error
        prompts.append(_checked(value, f"prompts: {path} line {number}"))
    if not prompts:
        raise UserError(f"prompts: {path} holds no prompt; write one a line")
    return _drawable(prompts, f"prompts: {path}")


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
