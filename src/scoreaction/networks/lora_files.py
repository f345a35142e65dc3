"""LoRA weights from safetensors files: of peft and diffusers (lora_A, lora_B), or kohya's (lora_down, lora_up, alpha)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scoreaction.networks.adapters import LoraShape

PART = re.compile(r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight")
DOWN = ("lora_A", "lora_down", "lora.down")
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps an adapter's configuration in a file's header."""


@dataclass(frozen=True)
class LoraWeights:
    """`W + B A` by module: A (rank, in, ...), B (out, rank, ...), which has the file's alpha/rank in it."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def shape(self) -> LoraShape:
        """The adapter that holds these weights."""
        ranks = {module: a.shape[0] for module, a in self.A.items()}
        rank = max(ranks.values())
        return LoraShape(rank, rank, "|".join(map(re.escape, self.A)), ranks=ranks)

    def onto(self, modules: Iterable[str], path: Path) -> LoraWeights:
        """The same by the names that a network gives its modules; ValueError where one is not in it."""
        known = list(modules)
        names = {module: _find(module, known, path) for module in self.A}
        return LoraWeights({names[m]: a for m, a in self.A.items()}, {names[m]: b for m, b in self.B.items()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file in float32, and its header's texts; ValueError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.consistency: {path} cannot be read as safetensors; give a file in that format") from error


def parse_lora(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> LoraWeights:
    """The adapter that a file's tensors are; ValueError where one is no part of a LoRA of one network."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        found = PART.fullmatch(name)
        if found:
            (A if found["part"] in DOWN else B)[found["module"]] = value
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(value)
        else:
            raise ValueError(
                f"model.consistency: {path}: {name} is no LoRA weight of a layer; save it with diffusers' save_lora_weights"
            )
    odd = sorted((set(A) ^ set(B)) | (set(alphas) - set(A)))
    if odd or not A:
        raise ValueError(f"model.consistency: {path} is no whole LoRA; {odd[0] if odd else 'it'} has not both of its factors")
    alphas = {module: float(a.shape[0]) for module, a in A.items()} | _stated(metadata, A, path) | alphas
    return LoraWeights(A, {module: alphas[module] / A[module].shape[0] * b for module, b in B.items()})


def _stated(metadata: dict[str, str], A: dict[str, Tensor], path: Path) -> dict[str, float]:
    """The alphas that the header tells, by module: diffusers writes peft's configuration there, each key after its network."""
    found: dict[str, float] = {}
    config = json.loads(metadata.get(METADATA, "{}"))
    for prefix in {key.partition(".")[0] for key in config}:
        if config.get(f"{prefix}.use_rslora") or config.get(f"{prefix}.use_dora"):
            raise ValueError(f"model.consistency: {path}: rsLoRA and DoRA are not read; give a plain LoRA")
        pattern = config.get(f"{prefix}.alpha_pattern") or {}
        for module in A:
            if module.startswith(f"{prefix}."):
                ours = [value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
                found[module] = float([*ours, config[f"{prefix}.lora_alpha"]][0])
    return found


def _find(module: str, known: list[str], path: Path) -> str:
    """The network's name of a file's module: the whole name, its ending, or with kohya's underscores for dots."""
    inner = re.sub(r"^(base_model\.model\.|unet\.|transformer\.)", "", module)
    flat = re.sub(r"^lora_(unet|transformer)_", "", module)
    fits = [name for name in known if name == module] or [
        name
        for name in known
        if name == inner or name.endswith(f".{inner}") or re.fullmatch(rf"(.*_)?{re.escape(flat)}", _flat(name))
    ]
    if len(fits) != 1:
        raise ValueError(f"model.consistency: {path} belongs to another network; it changes {module}, which this one has not")
    return fits[0]


def _flat(name: str) -> str:
    return name.replace(".", "_")
