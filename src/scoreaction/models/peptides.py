"""Antimicrobial peptides as tokens: at most 32 amino acids and an end, masked diffusion, without prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError

from scoreaction.diffusion.processes import Masking
from scoreaction.networks.masked import MaskedModel
from scoreaction.settings import Settings
from scoreaction.tasks.peptides.letters import ALPHABET, LENGTH, VOCABULARY
from scoreaction.tasks.peptides.networks import load_network

DEFAULTS: dict[str, Any] = {
    "sampler": {"solver": "one_by_one", "steps": LENGTH, "grid": "uniform"},
    "train": {"iterations": 30, "batch": 64, "lr": 5e-4},
    "evaluation": {"n": 200, "solver": "one_by_one", "steps": LENGTH},
    "algorithm": {"beta": 0.3, "rows": 256, "updates": 8},
}
RETRAIN = "write one with python -m scoreaction.tasks.peptides.pretrain"


class Config(Settings, frozen=True, extra="forbid"):
    """path: a folder written by the retraining command, None for the shipped weights.

    Samples are tokens (n, 32), numbers of the letters `ACDEFGHIKLMNPQRSTVWY-`: the peptide is what stands before the first
    `-`. All positions are masked and filled in, those behind the end too.
    """

    name: Literal["peptides"] = "peptides"
    path: Path | None = None
    lora_rank: int | None = Field(None, ge=1)


def build(config: Config) -> MaskedModel:
    """The model; diversity is measured in the letters at each position."""
    try:
        net = load_network(config.path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"path: {config.path} has no masked.safetensors of this network; {RETRAIN}") from error
    return MaskedModel(net, process=Masking(VOCABULARY), length=LENGTH, letters=ALPHABET, lora_rank=config.lora_rank)
