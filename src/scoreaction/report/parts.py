"""Parts of the report's sections, and functions that a run's and a comparison's section share."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scoreaction import catalog
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.errors import UserError
from scoreaction.recipes.build import build_block
from scoreaction.recipes.recipe import block_of, numbered
from scoreaction.recipes.trust import named_modules
from scoreaction.report.axes import panels_of
from scoreaction.report.tiles import Tiles
from scoreaction.training.evaluation import ExactTask
from scoreaction.training.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from scoreaction.types import Values


@dataclass(frozen=True)
class Picture:
    """A figure, a data URI for each of its panels, with what it shows in words."""

    title: str
    caption: str
    sources: list[str]
    wide: bool


@dataclass(frozen=True)
class Grid:
    """A table of texts."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Part:
    """A section of the page: what happened in words, key figures, pictures, tables, the recipe."""

    title: str
    headline: list[str]
    cards: list[tuple[str, str, str]] = field(default_factory=list)
    tiles: list[Tiles] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    recipe: str = ""
    recipe_of: str = "this run"


DPI = 130
"""Pixels of an inch of a figure."""


def picture(title: str, caption: str, figure: Figure, *, wide: bool = True) -> Picture:
    """A figure embedded as PNG, panel by panel."""
    sources = ["data:image/png;base64," + base64.b64encode(panel).decode() for panel in panels_of(figure, dpi=DPI)]
    return Picture(title, caption, sources, wide)


def rewards_of(values: Values) -> list[Values]:
    """The rewards that are trained on: one, or the parts of a sum."""
    return values["reward"] if isinstance(values["reward"], list) else [values["reward"]]


def reward_name(values: Values) -> str:
    """The reward, or the weighted sum of rewards."""
    if isinstance(values["reward"], list):
        return " + ".join(f"{block['weight']:g} x {block['name']}" for block in values["reward"])
    return values["reward"]["name"]


def held_out_title(values: Values, name: str) -> str:
    """A held-out reward's name; where a reward of that name is trained on, with the settings that differ."""
    blocks = values["evaluation"]["held_out"]
    block = dict(zip(numbered(block["name"] for block in blocks), blocks, strict=True)).get(name, {})
    trained = next((reward for reward in rewards_of(values) if reward["name"] == block.get("name")), None)
    if trained is None:
        return name
    own = {key: value for key, value in block.items() if value != trained.get(key)}
    differences = ", ".join(f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in own.items())
    return f"{name} ({differences})" if differences else name


def about(values: Values) -> str:
    """A sentence about the model and each reward, from the first lines of their files."""
    named: list[tuple[catalog.Kind, str]] = [("model", values["model"]["name"])]
    named += [("reward", block["name"]) for block in rewards_of(values)]
    paths = [(kind, name, catalog.files(kind).get(name)) for kind, name in named]
    return " ".join(
        f"The {kind} {name}: {catalog.summary(path).rstrip('.').replace('`', '')}."
        for kind, name, path in paths
        if path is not None
    )


def samples_of(folder: Path, kind: str) -> NDArray[Any] | None:
    """The samples that a run left, `base` or `tuned`."""
    path = RunFolder(folder).samples / f"{kind}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        samples = np.asarray(arrays["samples"])
        return samples if np.issubdtype(samples.dtype, np.integer) else samples.astype(np.float32)


def prompts_of(folder: Path, kind: str = "base") -> list[str] | None:
    """The prompts of the samples that a run left, None without."""
    with np.load(RunFolder(folder).samples / f"{kind}.npz", allow_pickle=False) as arrays:
        return arrays["prompts"].tolist() if "prompts" in arrays else None


def letters_of(folder: Path, kind: str = "base") -> str | None:
    """The letters of the tokens of the samples that a run left, None without."""
    path = RunFolder(folder).samples / f"{kind}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return "".join(arrays["letters"]) if "letters" in arrays else None


def exact_laws(values: Values, summary: Values) -> tuple[Mixture | None, Mixture | None]:
    """The data law of samples and the optimum's, where known and of parts that ship: a report imports nothing else."""
    if "distance_to_optimum" not in summary or named_modules(values):
        return None, None
    kinds: list[catalog.Kind] = ["model", "reward"]
    try:
        model, reward = (build_block(block_of(kind, values[kind], (kind,)), kind) for kind in kinds)
    except UserError:
        return None, None
    task = ExactTask.of(model, reward, summary.get("beta"))
    if task is None:
        return None, None
    laws = task.law, task.optimum.law
    return laws if not isinstance(model.decode, Rescale) else (model.decode.law(laws[0]), model.decode.law(laws[1]))
