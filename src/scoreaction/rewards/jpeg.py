"""The size of a picture as a JPEG file: compressibility and its opposite (DDPO, arXiv 2305.13301, section 5.1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._images import check_images, picture_files
from scoreaction.settings import Settings
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = -size` for `prefer: small`, `+size` for `large`; size in kilobytes (1000 bytes) of the JPEG file.

    Images (batch, 1 or 3, H, W) in [0, 1], rounded to 8 bits. A black box. Needs pillow.
    """

    name: Literal["jpeg"] = "jpeg"
    prefer: Literal["small", "large"] = Field("small", description="reward small files or large ones")
    quality: int = Field(95, ge=1, le=95, description="JPEG quality; 95 is DDPO's")


def build(config: Config) -> Reward:
    """The reward."""
    sign = -1.0 if config.prefer == "small" else 1.0

    def jpeg(samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="jpeg")
        sizes = [len(file) / 1000 for file in picture_files(samples, "JPEG", quality=config.quality)]
        return sign * torch.tensor(sizes, device=samples.device)

    return Reward(jpeg)
