"""CLIPScore: fit of a picture to its prompt, by CLIP (Hessel et al. 2021, arXiv 2104.08718)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from scoreaction.rewards._clip import VIT_L_14, Clip, Precision, load_clip
from scoreaction.rewards._images import check_images, texts_of
from scoreaction.settings import Settings
from scoreaction.types import Prompts

PARAMETERS = VIT_L_14
"""Weights of openai/clip-vit-large-patch14."""


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = 100 cos(image features, prompt features)`, -100 to 100; good pictures have 25 to 35.

    Images (batch, 1 or 3, H, W) in [0, 1]. Differentiable. The published score is cut off at 0 and 2.5 cos; here the slope
    stays. A prompt longer than CLIP reads is cut. Needs transformers; ValueError where the weights are not there.
    """

    name: Literal["clip"] = "clip"
    path: str = Field("openai/clip-vit-large-patch14", description="folder or hub id of a CLIPModel and its tokenizer")
    dtype: Precision = Field("fp32", description="precision of its weights")


@dataclass(frozen=True, eq=False)
class ClipScore:
    """`scale` times the cosine of picture and prompt."""

    name: str
    clip: Clip
    scale: float
    differentiable: bool = True

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name=self.name)
        texts = texts_of(samples, prompts, name=self.name)
        return self.scale * (self.clip.images(samples) * self.clip.texts(texts, samples.device)).sum(1).to(samples)


def build(config: Config) -> ClipScore:
    """The reward."""
    return ClipScore("clip", load_clip(config.path, dtype=config.dtype), 100.0)
