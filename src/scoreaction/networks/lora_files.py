"""LoRA weights in safetensors files, named as peft and diffusers do (lora_A, lora_B) or kohya (lora_down, lora_up, alpha)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scoreaction.networks.adapters import LoraShape

PART = re.compile(r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.default)?\.weight")
DOWN = ("lora_A", "lora_down", "lora.down")
METADATA = "lora_adapter_metadata"
"""Key of a file's header under which diffusers stores an adapter's configuration."""


@dataclass(frozen=True)
class LoraWeights:
    """LoRA weights `W + B A` by module: A (rank, in, ...), and B (out, rank, ...), already multiplied by alpha/rank."""

    A: dict[str, Tensor]
    B: dict[str, Tensor]

    def shape(self) -> LoraShape:
        """Placement and size of the adapter that holds these weights, with alpha = rank."""
        ranks = {module: a.shape[0] for module, a in self.A.items()}
        rank = max(ranks.values())
        return LoraShape(rank, rank, list(self.A), ranks=ranks)

    def onto(self, modules: Iterable[str], path: Path) -> LoraWeights:
        """Renames the weights after a network's modules; ValueError if a module is not among them, or not just once."""
        known = list(modules)
        names = {module: _match(module, known, path) for module in self.A}
        return LoraWeights({names[m]: a for m, a in self.A.items()}, {names[m]: b for m, b in self.B.items()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a safetensors file, in float32, and the texts of its header; ValueError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.consistency: {path} cannot be read as safetensors; give a file in that format") from error


def refuse_different(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError if a file's tensors differ from the expected ones in a name or a shape; `where` names the file."""
    for name in sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"{where} belongs to another network; {name} is in only one of the two")
    for name, value in expected.items():
        there, here = tuple(tensors[name].shape), tuple(value.shape)
        if there != here:
            raise ValueError(f"{where} belongs to another network; {name} has shape {there} there and {here} here")


def copy_into(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into parameters of the same names."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[name])


def parse_lora(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> LoraWeights:
    """Reads an adapter from a file's tensors and header; ValueError if they are not the whole LoRA of one network."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, value in tensors.items():
        match = PART.fullmatch(name)
        if match:
            (A if match["part"] in DOWN else B)[match["module"]] = value
        elif name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(value)
        else:
            raise ValueError(
                f"model.consistency: {path}: {name} is no LoRA weight of a layer; save it with diffusers' save_lora_weights"
            )
    unpaired = sorted((set(A) ^ set(B)) | (set(alphas) - set(A)))
    if unpaired or not A:
        module = unpaired[0] if unpaired else "it"
        raise ValueError(f"model.consistency: {path} is no whole LoRA; {module} lacks one of its two factors")
    alphas = {module: float(a.shape[0]) for module, a in A.items()} | _header_alphas(metadata, A, path) | alphas
    return LoraWeights(A, {module: alphas[module] / A[module].shape[0] * b for module, b in B.items()})


def _header_alphas(metadata: dict[str, str], A: dict[str, Tensor], path: Path) -> dict[str, float]:
    """Alphas in the header, by module: diffusers writes peft's configuration there, with the network's name before each key."""
    alphas: dict[str, float] = {}
    config = json.loads(metadata.get(METADATA, "{}"))
    for prefix in {key.partition(".")[0] for key in config}:
        if config.get(f"{prefix}.use_rslora") or config.get(f"{prefix}.use_dora"):
            raise ValueError(f"model.consistency: {path}: rsLoRA and DoRA are not read; give a plain LoRA")
        pattern = config.get(f"{prefix}.alpha_pattern") or {}
        for module in A:
            if module.startswith(f"{prefix}."):
                special = [value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)]
                alphas[module] = float([*special, config[f"{prefix}.lora_alpha"]][0])
    return alphas


def _match(module: str, known: list[str], path: Path) -> str:
    """Name in the network of a file's module: the same name, one that ends so, or one with kohya's underscores for dots."""
    inner = re.sub(r"^(base_model\.model\.|unet\.|transformer\.)", "", module)
    flat = re.sub(r"^lora_(unet|transformer)_", "", module)
    matches = [name for name in known if name == module] or [
        name
        for name in known
        if name == inner or name.endswith(f".{inner}") or re.fullmatch(rf"(.*_)?{re.escape(flat)}", name.replace(".", "_"))
    ]
    if len(matches) != 1:
        raise ValueError(
            f"model.consistency: {path} belongs to another network; it changes {module}, which this one does not have"
        )
    return matches[0]
