"""Loading a saved run or tuner as a model that samples."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from scoreaction.networks.model import Model
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.training.export import load_described, load_weights


def load(path: str | Path, *, net: nn.Module | Model | None = None) -> Model:
    """The tuned model that `Finetuner.save` or a run folder holds, with its reference: the inverse of `save`.

    A run of a recipe is rebuilt from it. A network of your own is rebuilt where its class is imported and its attributes
    are plain values; where only the class is not, pass one of its kind as `net`, else one with its pretrained weights. Where
    the model encodes or decodes by functions of yours, pass the whole `Model` as it was before training: it is filled.
    ValueError says what is missing.
    """
    folder = Path(path)
    if (folder / "model").is_dir():
        folder = folder / "model"
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        return load_described(folder, net)
    model = build(load_recipe(str(recipe)), rewards=False).model
    load_weights(model, folder)
    return model
