"""Records that a model's file may give of itself beside its model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from scoreaction.networks.model import Model
from scoreaction.types import Conditions


@dataclass(frozen=True)
class Skeleton:
    """A model to plan with: `mode` makes more tensors of its kind, fake ones of a model without weights.

    conditions: those of one prompt; parameters: their number, by component; sizes in bytes: vae_bytes of what decodes and stays
    on the device, offloaded_bytes of what is there only while it decodes, frozen_bytes of frozen weights where they are others
    than their tensors say. tiny_decoder: the small autoencoder that would suit it.
    """

    model: Model
    conditions: Conditions
    parameters: dict[str, int]
    mode: AbstractContextManager[Any] = field(default_factory=nullcontext)
    vae_bytes: int = 0
    encoder_bytes: int = 0
    offloaded_bytes: int = 0
    frozen_bytes: int | None = None
    tiny_decoder: str | None = None


@dataclass(frozen=True)
class Card:
    """Another library's part of a model card: keys and tags for the hub, and lines of Python that load what was saved."""

    header: dict[str, Any]
    tags: list[str]
    code: list[str]
