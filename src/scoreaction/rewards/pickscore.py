"""PickScore: preference of people among pictures for a prompt (Kirstain et al. 2023, arXiv 2305.01569)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scoreaction.rewards._clip import VIT_H_14, Precision, load_clip
from scoreaction.rewards.clip import ClipScore
from scoreaction.settings import Settings

PARAMETERS = VIT_H_14
"""Weights of yuvalkirstain/PickScore_v1."""


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = s cos(image features, prompt features)`, s the scale that the network learned (100); about 18 to 24.

    Images (batch, 1 or 3, H, W) in [0, 1]. Differentiable. A difference of 1 is odds of e that people pick the better
    one. Needs transformers; ValueError where the weights are not there.
    """

    name: Literal["pickscore"] = "pickscore"
    path: str = Field("yuvalkirstain/PickScore_v1", description="folder or hub id of a CLIPModel")
    tokenizer: str | None = Field(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", description="folder or hub id of its tokenizer; null where path has it"
    )
    dtype: Precision = Field("fp32", description="precision of its weights")


def build(config: Config) -> ClipScore:
    """The reward."""
    clip = load_clip(config.path, dtype=config.dtype, tokenizer=config.tokenizer)
    return ClipScore("pickscore", clip, float(clip.net.logit_scale.exp()))
