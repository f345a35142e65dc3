"""LAION's aesthetic predictor: beauty of a picture as people rate it, on CLIP ViT-L/14; the prompt is not read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from scoreaction.rewards._clip import VIT_L_14, Clip, Precision, load_clip
from scoreaction.rewards._images import check_images
from scoreaction.settings import Settings
from scoreaction.types import DTYPES, Prompts

PARAMETERS = VIT_L_14
"""Weights of openai/clip-vit-large-patch14; the head has under a million."""
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('HEAD.pth', weights_only=True), 'HEAD.safetensors')\""
)


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = head(f/|f|)`, f the picture's CLIP features; about 1 to 10, photographs near 5.

    Images (batch, 1 or 3, H, W) in [0, 1]. Differentiable. The head is a chain of linear layers: LAION's first one is a
    single layer, the later one (as in DDPO, arXiv 2305.13301) has five. Needs transformers; ValueError where weights are
    not there.
    """

    name: Literal["aesthetic"] = "aesthetic"
    head: str | None = Field(None, description="safetensors file of the head, or ORG/NAME/FILE on the hub; see docs/rewards.md")
    path: str = Field("openai/clip-vit-large-patch14", description="folder or hub id of the CLIPModel that the head is for")
    dtype: Precision = Field("fp32", description="precision of the weights")


@dataclass(frozen=True, eq=False)
class Aesthetic:
    """The head's number for a picture's unit features."""

    clip: Clip
    head: nn.Module
    differentiable: bool = True

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="aesthetic")
        return self.head.to(samples.device)(self.clip.images(samples))[:, 0].to(samples)


def build(config: Config) -> Aesthetic:
    """The reward."""
    if config.head is None:
        raise ValueError(
            "head: LAION's head is not shipped; fetch sac+logos+ava1-l14-linearMSE.pth from the repository"
            f" christophschuhmann/improved-aesthetic-predictor, convert it once ({CONVERT}) and give head that file"
        )
    head = load_head(config.head)
    clip = load_clip(config.path, dtype=config.dtype, words=False)
    takes, gives = head[0].in_features, clip.net.config.projection_dim
    if takes != gives:
        raise ValueError(
            f"head: {config.head} takes {takes} features, the CLIP {config.path} gives {gives}; use one made for it"
        )
    return Aesthetic(clip, head.to(DTYPES[config.dtype]).eval().requires_grad_(False))


def load_head(name: str) -> nn.Sequential:
    """The linear layers of a safetensors file, in the order of their numbers; ValueError where they make no chain to 1."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(_file(name))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"head: {name} cannot be read as safetensors; a .pth file is converted once by {CONVERT}") from error
    named = [key for key in tensors if key.rpartition(".")[2] == "weight"]
    weights = sorted(named, key=lambda key: [int(number) for number in re.findall(r"\d+", key)])
    biases = [key.removesuffix("weight") + "bias" for key in weights]
    shapes = [tuple(tensors[key].shape) for key in weights]
    chained = all(len(shape) == 2 for shape in shapes) and [s[0] for s in shapes] == [*(s[1] for s in shapes[1:]), 1]
    whole = (
        chained
        and {*weights, *biases} == {*tensors}
        and all(tensors[b].numel() == s[0] for b, s in zip(biases, shapes, strict=True))
    )
    if not weights or not whole:
        raise ValueError(f"head: {name} holds {', '.join(sorted(tensors)[:4])}; it must be linear layers that end in 1 number")
    layers = nn.Sequential(*(nn.Linear(takes, gives) for gives, takes in shapes))
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.load_state_dict({"weight": tensors[weight].float(), "bias": tensors[bias].float()})
    return layers


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)/(.+\.safetensors)", name)
    if hub is None or path.is_absolute():
        raise ValueError(
            f"head: no file {name}; give a safetensors file that is there, or ORG/NAME/FILE.safetensors on the hub"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub[1], hub[2]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"head: no file {name}, and the hub does not give it; fetch it, or give a file that is there"
        ) from error
