"""Prompts and pictures for rewards that judge the two together."""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn

PROMPTS = ["a cat", "two blue dogs on a boat", "a cat"]


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Smooth and sharp at once, in whole 8-bit steps, (3, H, W) in [0, 1]."""
    found = []
    for i, (height, width) in enumerate(sizes):
        rough = torch.rand(3, height, width, generator=torch.Generator().manual_seed(i))
        smooth = nn.functional.avg_pool2d(rough[None], 5, 1, 2)[0]
        sharp = (torch.arange(width) // 7 % 2).expand(3, height, width)
        found.append(((0.6 * smooth + 0.2 * rough + 0.2 * sharp) * 255).round() / 255)
    return found


def pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
