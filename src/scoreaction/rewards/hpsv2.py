"""HPSv2: preference of people among pictures for a prompt (Wu et al. 2023, arXiv 2306.09341), through open_clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._clip import VIT_H_14, Precision, TextMemory, fitted, unit
from scoreaction.rewards._images import check_images, texts_of
from scoreaction.settings import Settings
from scoreaction.types import DTYPES, Prompts

PARAMETERS = VIT_H_14
"""Weights of xswu/HPSv2."""
FETCH = (
    "fetch HPS_v2.1_compressed.pt of xswu/HPSv2 from the hub and convert it once: python -c"
    ' "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in'
    " torch.load('HPS_v2.1_compressed.pt', weights_only=True)['state_dict'].items()}, 'hpsv2.safetensors')\""
)


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = cos(image features, prompt features)` of a fine-tuned CLIP ViT-H/14; about 0.2 to 0.35.

    Images (batch, 1 or 3, H, W) in [0, 1]; one that is not square gets black edges. Differentiable. Needs open_clip:
    pip install open_clip_torch. ValueError where it or the weights are not there.
    """

    name: Literal["hpsv2"] = "hpsv2"
    path: str | None = Field(None, description="safetensors file of the ViT-H-14, or a folder in open_clip's format")
    dtype: Precision = Field("fp32", description="precision of its weights")


def build(config: Config) -> Reward:
    """The reward."""
    if config.path is None:
        raise ValueError(f"path: HPSv2's weights are not shipped; {FETCH}; then give path that file")
    net, tokenizer = _load(Path(config.path).expanduser())
    net = net.to(DTYPES[config.dtype]).eval().requires_grad_(False)

    size = net.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    memory = TextMemory(lambda texts: unit(net.encode_text(tokenizer(texts).to(net.logit_scale.device))))

    def hpsv2(samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="hpsv2")
        texts = texts_of(samples, prompts, name="hpsv2")
        pixels = fitted(samples, side).to(net.to(samples.device).logit_scale)
        return (unit(net.encode_image(pixels)) * memory(texts, samples.device)).sum(1).to(samples)

    return Reward(hpsv2, differentiable=True)


def _load(path: Path) -> tuple[Any, Callable[[list[str]], Tensor]]:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises the second
        raise ValueError(
            f"hpsv2 needs open_clip, which cannot be imported ({str(error).splitlines()[0]}); pip install open_clip_torch"
            ", or serve it from an environment that has it (scoreaction serve-reward hpsv2) and take the reward http"
        ) from error
    if path.is_dir():
        if not list(path.glob("*.safetensors")) or not (path / "open_clip_config.json").is_file():
            raise ValueError(f"path: {path} must hold open_clip_config.json and a .safetensors file")
        name, weights = f"local-dir:{path}", None
    elif path.is_file() and path.suffix == ".safetensors":
        name, weights = "ViT-H-14", str(path)
    else:
        raise ValueError(f"path: {path} is no safetensors file; {FETCH}")
    try:
        net = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
    except Exception as error:  # open_clip passes on whatever a wrong file raises
        raise ValueError(f"path: {path} does not fit open_clip's {name}: {str(error).splitlines()[0]}") from error
    return net, open_clip.get_tokenizer(name)
