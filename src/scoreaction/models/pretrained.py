"""A model that `scoreaction pretrain` made of your own table or pictures; or the one of the moons that ships."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from scoreaction.diffusion.processes import PROCESSES, ProcessName
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.models._denoiser import Denoiser
from scoreaction.models.pipelines.decoding import to_unit
from scoreaction.networks.consistency import load_consistency
from scoreaction.networks.model import Model
from scoreaction.settings import Settings

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 25, "eta": 1.0},
    "train": {"iterations": 200, "batch": 128, "lr": 1e-3},
    "evaluation": {"n": 1024, "steps": 50},
}
DESCRIPTION, WEIGHTS = "pretrained.json", "weights.safetensors"


class Config(Settings, frozen=True, extra="forbid"):
    """path: a folder that `scoreaction pretrain` wrote; null is that of the moons, which ships. lora_rank null trains all.

    consistency: the folder of a consistency model that `scoreaction distill` made of this model.
    """

    name: Literal["pretrained"] = "pretrained"
    path: Path | None = None
    lora_rank: int | None = Field(None, ge=1)
    consistency: Path | None = None


class Description(BaseModel, frozen=True, extra="forbid"):
    """A pretrained network in words: all but its weights.

    shape: of a sample; scale, shift: of a table's columns; pretrain: the settings it was trained with; metrics: how well.
    """

    shape: tuple[int, ...]
    process: ProcessName
    width: int | None
    depth: int
    scale: list[float] | None = None
    shift: list[float] | None = None
    pretrain: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    def network(self) -> Denoiser:
        """The network, untrained."""
        return Denoiser(self.shape, PROCESSES[self.process](), width=self.width, depth=self.depth)

    def model(self, net: Denoiser, lora_rank: int | None = None) -> Model:
        """The model of a trained network: columns get their units back, pictures come in [0, 1]."""
        decode: Any = to_unit
        if self.scale is not None:
            decode = Rescale(*(torch.tensor(part, dtype=torch.float64) for part in (self.scale, self.shift)))
        targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"] if net.pictures else None
        process = PROCESSES[self.process]()
        return Model(
            net, process=process, predicts="v", shape=self.shape, decode=decode, lora_rank=lora_rank,
            lora_targets=targets if lora_rank else None,
        )  # fmt: skip


def is_pretrained(folder: Path) -> bool:
    """True for a folder that `scoreaction pretrain` finished."""
    return (folder / DESCRIPTION).is_file()


def build(config: Config) -> Model:
    """The model around the stored network."""
    folder = config.path or Path(str(resources.files("scoreaction") / "data" / "pretrained" / "moons"))
    if not is_pretrained(folder):
        raise ValueError(f"path: {folder} holds no pretrained model; make one with scoreaction pretrain")
    try:
        described = Description.model_validate_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
        net = described.network()
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (ValidationError, SafetensorError, RuntimeError, KeyError, OSError) as error:
        line = " ".join(str(error).split())[:160]
        raise ValueError(f"path: {folder} is damaged, or was written by another version ({line})") from error
    model = described.model(net, config.lora_rank)
    return model if config.consistency is None else load_consistency(model, config.consistency)
