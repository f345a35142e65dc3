"""Data files of a recipe: pairs or samples in an npz, in a JSONL, or in a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scoreaction.errors import UserError
from scoreaction.settings import Settings
from scoreaction.tasks.files import PICTURES, read_arrays, read_picture
from scoreaction.types import Pairs, Samples
from scoreaction.yaml_text import read_text

FORMS = "winner and loser, or samples"


class DataFile(Settings, frozen=True, extra="forbid"):
    """Data that an algorithm learns from, dpo from pairs and spin from good samples.

    path: an .npz with the arrays winner and loser, or samples, and perhaps prompts; a .jsonl with an object a line, of winner
    and loser, or sample, each a picture file beside it or a list of numbers, and perhaps prompt; or a folder of pictures, or of
    two such folders winner and loser, whose subfolders are named by the prompts. Pictures have values in [0, 1].
    """

    path: Path = Field(description="an .npz, a .jsonl or a folder")


def read_data(path: Path, *, key: str = "data.path") -> Pairs | Samples:
    """Pairs or samples of a file or a folder. UserError, one line with the key, for whatever is wrong."""
    if path.is_dir():
        return _folder(path, key)
    readers: dict[str, Callable[[Path, str], Pairs | Samples]] = {".npz": _npz, ".jsonl": _json_lines}
    if path.suffix not in readers:
        raise UserError(f"{key}: {path} must be an .npz, a .jsonl or a folder of pictures")
    if not path.is_file():
        raise UserError(f"{key}: {path} is not there (a relative path begins at {Path.cwd()})")
    return readers[path.suffix](path, key)


def _npz(path: Path, key: str) -> Pairs | Samples:
    try:
        arrays = read_arrays(path, "winner", "loser", "samples", "prompts")
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    parts = {name: array for name, array in arrays.items() if name != "prompts"}
    if any(array.dtype.kind not in "fiub" or array.ndim < 2 for array in parts.values()):
        raise UserError(f"{key}: the arrays of {path} must be numbers of shape (n, ...)")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.items()}
    prompts = arrays.get("prompts")
    if prompts is not None and prompts.ndim != 1:
        raise UserError(f"{key}: the prompts of {path} must be one for each sample, (n,), and are {prompts.shape}")
    return _record(tensors, None if prompts is None else [str(prompt) for prompt in prompts.tolist()], f"{key}: {path}")


def _record(parts: dict[str, Tensor], prompts: list[str] | None, where: str) -> Pairs | Samples:
    if parts.keys() == {"winner", "loser"}:
        if parts["winner"].shape != parts["loser"].shape:
            raise UserError(f"{where}: winner and loser must have one shape")
        return Pairs(parts["winner"], parts["loser"], prompts)
    if parts.keys() == {"samples"}:
        return Samples(parts["samples"], prompts)
    raise UserError(f"{where}: must hold {FORMS} (got {', '.join(parts) or 'none of them'})")


def _json_lines(path: Path, key: str) -> Pairs | Samples:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            rows.append((f"{key}: {path} line {number}", _object(line, f"{key}: {path} line {number}")))
    if not rows:
        raise UserError(f"{key}: {path} is empty; write an object a line")
    kind: tuple[str, ...] = ("winner", "loser") if "winner" in rows[0][1] else ("sample",)
    values: dict[str, list[Tensor]] = {name: [] for name in kind}
    for where, row in rows:
        for name in kind:
            if name not in row:
                raise UserError(f"{where}: has no {name}; give each line winner and loser, or sample")
            values[name].append(_value(row[name], path.parent, f"{where}: {name}"))
    prompted = {"prompt" in row for _, row in rows}
    if len(prompted) > 1:
        raise UserError(f"{key}: {path} has lines with a prompt and lines without; give all of them one, or none")
    prompts = [str(row["prompt"]) for _, row in rows] if prompted == {True} else None
    names = {"winner": "winner", "loser": "loser", "sample": "samples"}
    tensors = {names[name]: _stacked(parts, f"{key}: {path}") for name, parts in values.items()}
    return _record(tensors, prompts, f"{key}: {path}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON; write an object a line") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be an object with winner and loser, or sample")
    return value


def _value(value: Any, folder: Path, where: str) -> Tensor:
    if isinstance(value, str):
        return _picture(folder / value, where)
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: must be the name of a picture file, or a list of numbers") from error


def _folder(path: Path, key: str) -> Pairs | Samples:
    better, worse = path / "winner", path / "loser"
    if not (better.is_dir() and worse.is_dir()):
        files = _files(path, key)
        return Samples(_read(path, files, key), _prompts(files, f"{key}: {path}"))
    files = _files(better, key)
    odd = set(files) ^ set(_files(worse, key))
    if odd:
        raise UserError(f"{key}: {min(odd)} is in one of {better} and {worse} only; give both pictures of a pair one name")
    return Pairs(_read(better, files, key), _read(worse, files, key), _prompts(files, f"{key}: {path}"))


def _files(path: Path, key: str) -> list[Path]:
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"{key}: {path} holds no pictures ({', '.join(PICTURES)})")
    return files


def _prompts(files: list[Path], where: str) -> list[str] | None:
    """The names of the subfolders, None where there are none."""
    folders = [file.parent.as_posix() for file in files]
    if "." not in folders:
        return folders
    if set(folders) != {"."}:
        raise UserError(f"{where}: has pictures in subfolders and beside them; a subfolder is a prompt, and each needs one")
    return None


def _read(folder: Path, files: list[Path], key: str) -> Tensor:
    return _stacked([_picture(folder / file, f"{key}: {file}") for file in files], f"{key}: {folder}")


def _stacked(parts: list[Tensor], where: str) -> Tensor:
    different = next((part for part in parts if part.shape != parts[0].shape), None)
    if different is not None:
        shapes = f"{tuple(parts[0].shape)} and {tuple(different.shape)}"
        raise UserError(f"{where}: its samples must have one shape (got {shapes})")
    return torch.stack(parts)


def _picture(path: Path, where: str) -> Tensor:
    try:
        return torch.from_numpy(read_picture(path))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
