"""The size of a picture as a JPEG file: compressibility and its opposite (DDPO, arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from scoreaction.rewards._images import check_images
from scoreaction.types import Conditions


class Config(BaseModel, frozen=True, extra="forbid"):
    """`r(x) = -size` for `prefer: small`, `+size` for `large`; size in kilobytes (1000 bytes) of the JPEG file.

    Images (batch, 1 or 3, H, W) in [0, 1], rounded to 8 bits. A black box. Needs pillow.
    """

    name: Literal["jpeg"] = "jpeg"
    prefer: Literal["small", "large"] = Field("small", description="reward small files or large ones")
    quality: int = Field(95, ge=1, le=95, description="JPEG quality; 95 is DDPO's")


@dataclass(frozen=True)
class Jpeg:
    """Size of the JPEG file in kilobytes, signed."""

    sign: float
    quality: int
    differentiable: bool = False

    def __call__(self, samples: Tensor, conditions: Conditions) -> Tensor:
        from PIL import Image

        check_images(samples, name="jpeg")
        pixels = (samples.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = []
        for picture in pixels:
            file = io.BytesIO()
            Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(file, "JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return self.sign * torch.tensor(sizes, device=samples.device)


def build(config: Config) -> Jpeg:
    """The reward."""
    return Jpeg(-1.0 if config.prefer == "small" else 1.0, config.quality)
