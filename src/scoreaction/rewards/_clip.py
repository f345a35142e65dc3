"""CLIP as a judge (Radford et al. 2021, arXiv 2103.00020): its preprocessing, with gradients, its weights, its features."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoreaction.rewards._images import rgb
from scoreaction.types import DTYPES

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the channels, as in every CLIP of OpenAI and of LAION."""

Precision = Literal["fp32", "bf16", "fp16"]
VIT_L_14, VIT_H_14 = 427_616_513, 986_109_441
"""Parameters of both towers: openai/clip-vit-large-patch14; laion/CLIP-ViT-H-14-laion2B-s32B-b79K and what is tuned from it."""
REMEMBERED = 4096
"""Prompts whose features are kept."""


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, clipped to [0, 1] where it overshoots: what pillow does, without its 8 bits."""
    if images.shape[-2:] == (height, width):
        return images
    return nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def normalised(images: Tensor) -> Tensor:
    """`(x - MEAN)/STD` by channel."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std


def cropped(images: Tensor, size: int) -> Tensor:
    """CLIP's input from images (batch, 1 or 3, H, W) in [0, 1]: the middle square, `size` pixels wide, normalised.

    The shorter side becomes `size`, the rest of the longer one is cut off. Gradients flow.

    >>> cropped(torch.zeros(2, 1, 30, 40), 24).shape
    torch.Size([2, 3, 24, 24])
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resized(rgb(images), size * height // short, size * width // short)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return normalised(images[..., top : top + size, left : left + size])


def fitted(images: Tensor, size: int) -> Tensor:
    """All of images (batch, 1 or 3, H, W) in [0, 1], in the middle of a black square, `size` pixels wide, normalised.

    >>> fitted(torch.zeros(2, 1, 30, 40), 24).shape
    torch.Size([2, 3, 24, 24])
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resized(rgb(images), max(1, round(height * scale)), max(1, round(width * scale)))
    down, across = size - images.shape[-2], size - images.shape[-1]
    edges = (across // 2, across - across // 2, down // 2, down - down // 2)
    return normalised(nn.functional.pad(images, edges))


def unit(features: Tensor) -> Tensor:
    """Rows of length 1."""
    return features / features.norm(dim=-1, keepdim=True)


class TextMemory:
    """Cache of the features of prompts: `encode(texts) -> (n, F)` runs once for each of the newest few thousand."""

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self.encode = encode
        self.kept: dict[str, Tensor] = {}

    def __call__(self, texts: list[str], device: torch.device) -> Tensor:
        """(n, F) on this device, without a graph."""
        new = [text for text in dict.fromkeys(texts) if text not in self.kept]
        if new:
            if len(self.kept) + len(new) > REMEMBERED:
                self.kept.clear()
                new = list(dict.fromkeys(texts))
            with torch.no_grad():
                self.kept |= dict(zip(new, self.encode(new), strict=True))
        return torch.stack([self.kept[text].to(device) for text in texts])


class Clip:
    """A CLIP of transformers, frozen: unit features of images (batch, 1 or 3, H, W) in [0, 1] and of `texts`."""

    def __init__(self, net: nn.Module, tokenizer: Callable[..., Any] | None) -> None:
        self.net: Any = net.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.texts = TextMemory(self._encode)

    def images(self, images: Tensor) -> Tensor:
        """(batch, F), with a graph to the images, to whose device the network moves."""
        net = self.net.to(images.device)
        pixels = cropped(images, net.vision_model.config.image_size).to(net.visual_projection.weight)
        return unit(net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output))

    def _encode(self, texts: list[str]) -> Tensor:
        assert self.tokenizer is not None
        length = self.net.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        device = self.net.visual_projection.weight.device
        pooled = self.net.text_model(tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)).pooler_output
        return unit(self.net.text_projection(pooled))


def load_clip(path: str, *, dtype: Precision, tokenizer: str | None = None, words: bool = True) -> Clip:
    """CLIP from a folder or a hub id, safetensors only; its tokenizer from `tokenizer`, by default from beside it.

    `words=False` leaves the tokenizer out. ValueError says what to fetch.
    """
    from transformers import CLIPModel, CLIPTokenizer

    source = where(path, key="path")
    try:
        net = CLIPModel.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(unfetched("path", path, "config.json and model.safetensors of a CLIPModel")) from error
    if not words:
        return Clip(net.to(DTYPES[dtype]), None)
    beside = tokenizer or path
    try:
        split = CLIPTokenizer.from_pretrained(where(beside, key="tokenizer"))
    except (OSError, ValueError, TypeError) as error:
        key = "tokenizer" if tokenizer else "path"
        raise ValueError(unfetched(key, beside, "the files of a CLIPTokenizer (tokenizer.json)")) from error
    return Clip(net.to(DTYPES[dtype]), split)


def where(path: str, *, key: str) -> str:
    """A folder that is there, or what can be a hub id; ValueError for a folder that is not there."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        return path
    raise ValueError(f"{key}: no folder {path}; give a folder that is there, or a hub id such as openai/clip-vit-large-patch14")


def unfetched(key: str, path: str, wanted: str) -> str:
    """The error line for weights that cannot be loaded."""
    if Path(path).expanduser().is_dir():
        return f"{key}: {path} must hold {wanted}; pickled weights (.bin, .pth) are not read"
    return (
        f"{key}: {path} is neither a folder nor fetched before, and the hub does not give it; fetch it where there is a"
        f" network (hf download {path}), or give {key} a folder with {wanted}"
    )
