"""Folders of pipelines in diffusers format: their index, components, and files that are missing or damaged."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scoreaction.models.pipelines.families import FAMILIES

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are never loaded: a run neither filters pictures nor is given any."""

WORDS = ("tokenizer.json", "vocab.json", "*.model")
"""Files that hold a tokenizer's vocabulary, any one of them."""


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which the libraries that load show no progress bars and no advice: a failure is our one line."""
    from diffusers.utils import logging as ours
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as theirs

    logs: tuple[Any, ...] = (ours, theirs, hub)
    kept = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity(logging.CRITICAL)
        for log in (ours, theirs):
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, kept, strict=True):
            log.set_verbosity(level)
        for log in (ours, theirs):
            log.enable_progress_bar()


def read_index(path: str) -> dict[str, Any]:
    """model_index.json of a folder or a hub id."""
    from diffusers import DiffusionPipeline

    hub = not Path(path).is_dir()
    if not hub and not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"model.path: {path} holds no pipeline (no model_index.json in it); name the folder that has one")
    if Path(path).is_file():
        raise ValueError(f"model.path: {path} is a file; name a folder in diffusers format (convert it with diffusers)")
    try:
        with quiet():
            index = DiffusionPipeline.load_config(path) if hub else _json(Path(path) / "model_index.json")
    except (OSError, ValueError) as error:
        if not hub:
            raise
        where = (
            "no such folder" if path.count("/") != 1 or path.startswith((".", "/", "~")) else "neither a folder nor on the hub"
        )
        raise ValueError(
            f"model.path: {path}: {where}, or the hub cannot be reached; download it first, or give the folder it is in"
        ) from error
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(f"model.path: {path}: its model_index.json names no pipeline class")
    return index


def check_named(path: str, index: dict[str, Any]) -> None:
    """ValueError for a component that the pipeline cannot do without and its index does not name."""
    for name in FAMILIES[index["_class_name"]].needs:
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise ValueError(f"model.path: {path} lacks the component {name}; its model_index.json must name one")


def check_components(path: str, index: dict[str, Any]) -> None:
    """ValueError for a component that is not named, and in a folder for files that are missing or cut short."""
    check_named(path, index)
    for folder in _folders(path, index):
        name = folder.name
        if not folder.is_dir():
            raise ValueError(f"model.path: {path} lacks the component {name}: there is no folder {folder}")
        if _weighs(name) and not list(folder.glob("*.safetensors")):
            raise ValueError(f"model.path: {folder} holds no weights (*.safetensors; pickled files are not read)")
        if name.startswith("tokenizer") and not any(list(folder.glob(words)) for words in WORDS):
            raise ValueError(f"model.path: {folder} holds no vocabulary ({', '.join(WORDS)}); fetch the folder again")
        for file in folder.glob("*.json"):
            _json(file)
        for file in folder.glob("*.safetensors"):
            _check_whole(file)


def variant_of(path: str, index: dict[str, Any]) -> str | None:
    """The variant of the weights to load: None where each component of a folder has plain files, or on the hub.

    `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors` are weights of the variant fp16.
    """
    lacking: dict[str, set[str]] = {}
    for folder in _folders(path, index):
        variants = {file.stem.partition(".")[2].partition("-")[0] for file in folder.glob("*.safetensors")}
        if _weighs(folder.name) and "" not in variants:
            lacking[folder.name] = variants
    if not lacking:
        return None
    common = set.intersection(*lacking.values())
    if not common:
        names = ", ".join(f"{name} ({', '.join(sorted(variants))})" for name, variants in lacking.items())
        raise ValueError(f"model.path: {path} holds weights of different variants: {names}; fetch all of one variant")
    return "fp16" if "fp16" in common else min(common)


def _folders(path: str, index: dict[str, Any]) -> list[Path]:
    """Folders of the components that an index names; none for a hub id."""
    if not Path(path).is_dir():
        return []
    named = (name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None)
    return [Path(path) / name for name in named if not name.startswith("_") and name not in OPTIONAL]


def _weighs(name: str) -> bool:
    return name in ("unet", "transformer", "vae") or name.startswith("text_encoder")


def _json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object; ValueError names it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model.path: {file} cannot be read as JSON; fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"model.path: {file} holds no JSON object; fetch it again")
    return values


def _check_whole(file: Path) -> None:
    """ValueError where the header of a safetensors file and its length do not agree."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.path: {file} is damaged or cut short; fetch it again") from error
