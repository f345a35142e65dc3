"""What the report's sections are made of, and what a run's and a comparison's section share."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scoreaction import shelf
from scoreaction.checkpoints import RunFolder
from scoreaction.config import Recipe, names_of
from scoreaction.evaluation import ExactTask
from scoreaction.exact import Mixture
from scoreaction.tables import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, with what it shows in words."""

    title: str
    caption: str
    source: str
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
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)
    recipe: str = ""
    recipe_of: str = "this run"


def picture(title: str, caption: str, figure: Figure, *, wide: bool = True) -> Picture:
    """A figure embedded as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Picture(title, caption, "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), wide)


def display_name(kind: shelf.Kind, name: str) -> str:
    """What a shelf's file calls itself: its first line up to the colon for algorithms, else its name."""
    path = shelf.files(kind).get(name)
    if path is None or kind != "algorithm":
        return name
    return shelf.summary(path).partition(":")[0] or name


def reward_name(recipe: Recipe) -> str:
    """The reward, or the weighted sum of rewards."""
    if isinstance(recipe.reward, tuple):
        return " + ".join(f"{block.share.weight:g} x {block.name}" for block in recipe.reward if block.share)
    return recipe.reward.name


def held_out_title(recipe: Recipe, name: str) -> str:
    """A held-out reward's name; with its settings where a reward of that name is trained on."""
    block = dict(zip(names_of(recipe.held_out), recipe.held_out, strict=True)).get(name)
    if block is None or block.name not in {reward.name for reward in recipe.rewards}:
        return name
    settings = block.config.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    said = ", ".join(f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items())
    return f"{name} ({said})" if said else name


def about(recipe: Recipe) -> str:
    """What the model and the rewards are, from the first lines of their files."""
    named: list[tuple[shelf.Kind, str]] = [("model", recipe.model.name), *(("reward", block.name) for block in recipe.rewards)]
    paths = [(kind, name, shelf.files(kind).get(name)) for kind, name in named]
    return " ".join(
        f"The {kind} {name}: {shelf.summary(path).rstrip('.').replace('`', '')}."
        for kind, name, path in paths
        if path is not None
    )


def samples_of(folder: Path, kind: str) -> NDArray[Any] | None:
    """The samples that a run left, `base` or `tuned`."""
    path = RunFolder(folder).samples / f"{kind}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays["samples"], dtype=np.float32)


def exact_laws(recipe: Recipe, beta: float | None) -> tuple[Mixture | None, Mixture | None]:
    """The data law and the optimum's, where they are known and the user's parts can be loaded."""
    if isinstance(recipe.reward, tuple):
        return None, None
    try:
        model = recipe.model.module.build(recipe.model.config)
        task = ExactTask.of(model, recipe.reward.module.build(recipe.reward.config), beta)
    except (ValueError, ImportError, OSError):
        return None, None
    return (None, None) if task is None else (task.law, task.optimum.law)


def change(before: float, after: float) -> str:
    """`from 1 to 2`."""
    return f"from {number(before, 3)} to {number(after, 3)}"


def objectives(figures: Values) -> tuple[float, float]:
    """`reward - beta x KL` of the tuned model and of the optimum."""
    tuned = figures["reward_tuned"] - figures["beta"] * figures["kl_nats"]
    return tuned, figures["optimum_reward"] - figures["beta"] * figures["optimum_kl_nats"]
