"""Trust: what a recipe from elsewhere may not do by itself, so that reading a stranger's folder runs none of its code."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scoreaction import catalog
from scoreaction.errors import UserError, one_line
from scoreaction.types import Values

ALLOW = "--trust, or trust=True in Python, allows it"
OF_A_RUN = ("metrics.jsonl", "summary.json", "model.json", "checkpoints")
"""Names of a run's or a saved model's folder, whose recipe may be anyone's."""


def blocks_of(values: Values) -> list[tuple[str, Values]]:
    """The blocks of unchecked values that name a file, with their keys.

    >>> [key for key, _ in blocks_of({"model": "digits", "reward": [{"name": "ink"}], "evaluation": {"held_out": ["jpeg"]}})]
    ['model', 'reward.0', 'evaluation.held_out.0']
    """
    evaluation = values.get("evaluation")
    several = {
        "reward": values.get("reward"),
        "evaluation.held_out": isinstance(evaluation, dict) and evaluation.get("held_out"),
    }
    blocks: list[tuple[str, Any]] = [(key, values.get(key)) for key in ("model", "algorithm", "critic")]
    for key, inner in several.items():
        blocks += [(f"{key}.{i}", block) for i, block in enumerate(inner)] if isinstance(inner, list) else [(key, inner)]
    named: list[tuple[str, Values]] = []
    while blocks:
        key, block = blocks.pop(0)
        block = {"name": block} if isinstance(block, str) else block
        if isinstance(block, dict):
            named.append((key, block))
            blocks += [(f"{key}.reward", block["reward"])] if "reward" in block else []  # of a reward around another
            blocks += [(f"{key}.writer", block["writer"])] if "writer" in block else []
    return named


def named_modules(values: Values) -> set[str]:
    """The modules of a user's own that unchecked values name."""
    names = (block.get("name") for _, block in blocks_of(values))
    return {name for name in names if isinstance(name, str) and "." in name}


def is_own(path: Path) -> bool:
    """True for a shipped recipe, and for one that lies in the working folder, which is no run's folder."""
    folder = path.absolute().parent
    if path in catalog.recipes().values():
        return True
    return folder.resolve() == Path.cwd().resolve() and not any((folder / name).exists() for name in OF_A_RUN)


def refuse_untrusted(values: Values, path: Path) -> None:
    """UserError where a recipe from elsewhere names a module, whose code would run, or would have a token sent to a server."""
    for key, block in blocks_of(values):
        name, urls = block.get("name"), block.get("url")
        if isinstance(name, str) and "." in name:
            raise UserError(f"{key}.name: {path} names the module {name}, whose code would run; {ALLOW}")
        variable = block.get("token_variable", catalog.TOKEN_VARIABLE)
        for url in urls if isinstance(urls, list) else [urls]:
            if isinstance(url, str) and not _is_here(url) and os.environ.get(str(variable)):
                raise UserError(f"{key}.url: {path} would have the token in {variable} sent to {url}; {ALLOW}")


def refuse_far_prompts(values: Values, path: Path) -> None:
    """UserError where a recipe takes prompts, or a menu of them, from a file neither beside it nor in the working folder."""
    algorithm = values.get("algorithm")
    menu = algorithm.get("menu") if isinstance(algorithm, dict) else None
    for key, named in (("prompts", values.get("prompts")), ("algorithm.menu", menu)):
        if isinstance(named, str) and named not in catalog.prompt_sets():
            _refuse_far(key, named, path)


def _refuse_far(key: str, named: str, path: Path) -> None:
    base = next((folder for folder in (Path.cwd(), path.parent) if os.path.isfile(folder / named)), Path.cwd())
    below = os.path.isfile(base / named) and (base / named).resolve().is_relative_to(base.resolve())
    if below or not os.path.isfile(base / named):  # of a name that is no file's, those who read it say so
        return
    where = one_line(named, most=100)
    raise UserError(f"{key}: {path} may name a file below its own or the working folder, not {where}; {ALLOW}")


def _is_here(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
