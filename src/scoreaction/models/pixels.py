"""Handwritten digits as tokens: 64 pixels of 4 grey levels, class-conditional masked diffusion, prompts like "7"."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError

from scoreaction.diffusion.processes import Masking
from scoreaction.networks.masked import MaskedModel
from scoreaction.settings import Settings
from scoreaction.tasks.digits.networks import NO_CLASS, judge, parse_digit_prompt
from scoreaction.tasks.digits.pixels import LENGTH, LEVELS, NetworkName, load_network, to_images

DEFAULTS: dict[str, Any] = {
    "sampler": {"guidance": 1.0},
    "train": {"iterations": 30, "batch": 64, "lr": 3e-4},
    "evaluation": {"n": 200, "held_out": [{"name": "legibility"}]},
    "prompts": "digits",
    "algorithm": {"beta": 0.3, "rows": 256, "updates": 8},
}
RETRAIN = "write one with python -m scoreaction.tasks.digits.pixels"


class Config(Settings, frozen=True, extra="forbid"):
    """network: `masked` sees all positions and is shown them in any order, `causal` those before each.

    path: a folder written by the retraining command, None for the shipped weights, which are those of `masked`. Rewards see
    images (batch, 1, 16, 16) in [0, 1].
    """

    name: Literal["pixels"] = "pixels"
    network: NetworkName = "masked"
    path: Path | None = None
    lora_rank: int | None = Field(None, ge=1)


def suited(config: Config) -> dict[str, Any]:
    """The samplers that suit the network."""
    sampler = {"solver": "left_to_right" if config.network == "causal" else "one_by_one", "steps": LENGTH, "grid": "uniform"}
    return {"sampler": sampler, "evaluation": {"solver": sampler["solver"], "steps": LENGTH}}


def build(config: Config) -> MaskedModel:
    """The model; diversity is measured in the held-out classifier's features of its images."""
    if config.network == "causal" and config.path is None:
        raise ValueError(f"path: no weights of a causal network are shipped; {RETRAIN} --network causal, and give its folder")
    try:
        net = load_network(config.network, config.path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"path: {config.path} has no {config.network}.safetensors of this network; {RETRAIN}") from error
    return MaskedModel(
        net,
        process=Masking(LEVELS),
        length=LENGTH,
        causal=config.network == "causal",
        lora_rank=config.lora_rank,
        encode=lambda prompts: torch.tensor([parse_digit_prompt(str(prompt)) for prompt in prompts]),
        null=torch.tensor([NO_CLASS]),
        decode=to_images,
        features=judge().features,
    )
