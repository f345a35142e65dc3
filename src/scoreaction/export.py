"""What a run leaves for others: the averaged weights with what they belong to, and the way back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from scoreaction.checkpoints import write_whole
from scoreaction.model import Model
from scoreaction.rollout import Sampler

WEIGHTS, DESCRIPTION = "weights.safetensors", "model.json"


def save_model(model: Model, sampler: Sampler, path: Path, *, recipe: str | None) -> Path:
    """`weights.safetensors` (the trained parameters, averaged), `model.json` and, where there is one, `recipe.yaml`."""
    path.mkdir(parents=True, exist_ok=True)
    with model.averaged():
        weights = {name: p.detach().cpu().contiguous().clone() for name, p in model.parameters.items()}
    save_file(weights, path / WEIGHTS)
    description = {
        "process": {"name": type(model.process).__name__, **asdict(model.process)},  # type: ignore[call-overload]
        "predicts": model.predicts,
        "shape": list(model.shape),
        "sampler": sampler.model_dump(),
    }
    write_whole(path / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    if recipe is not None:
        write_whole(path / "recipe.yaml", recipe)
    return path


def load_weights(model: Model, path: Path) -> None:
    """Puts saved weights into a model that was built alike; ValueError names what does not fit."""
    file = path / WEIGHTS
    if not file.exists():
        raise ValueError(f"{path}: no {WEIGHTS} there; give the folder that save wrote")
    weights = load_file(file)
    missing = sorted(set(model.parameters) ^ set(weights))
    if missing:
        raise ValueError(f"{file}: belongs to another network; {missing[0]} is in only one of the two")
    model.average = {name: value.to(model.device) for name, value in weights.items()}
    for name, parameter in model.parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{file}: {name} has shape {tuple(weights[name].shape)}, the network's {tuple(parameter.shape)}")
        parameter.data.copy_(weights[name])
