"""The way out for a run that a card's memory does not hold: settings that do fit, the cheapest for the result first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from scoreaction.commands._plan_watch import THROUGH, Cost, cost_of, peaks, watch_iteration
from scoreaction.models import Skeleton
from scoreaction.models.pipelines.decoding import Decoder
from scoreaction.models.pipelines.quantise import frozen_bytes
from scoreaction.models.pipelines.tiny import empty_tiny
from scoreaction.recipes.recipe import Block, Recipe

CARD = 24 * 2**30
"""Bytes of the card that a plan is held against."""
TRAJECTORIES, SCORERS = "trajectories", "scorers: "


@dataclass(frozen=True)
class Needs:
    """Bytes of what stays on a device, by name, and of what is done one after the other, of which the largest counts."""

    resident: dict[str, int]
    passes: dict[str, int]
    reserve: int
    encoders: int = 0

    @property
    def peaks(self) -> dict[str, int]:
        """The passes with that of the encoders of texts, while which neither trajectories nor scorers are on the device."""
        later = sum(size for name, size in self.resident.items() if name == TRAJECTORIES or name.startswith(SCORERS))
        return self.passes | {"encoding the prompts, beyond trajectories and scorers": max(self.encoders - later, 0)}

    @property
    def worst(self) -> str:
        """The name of the largest of what is done one after the other."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.resident.values()) + self.peaks[self.worst] + self.reserve

    def but(self, resident: dict[str, int] | None = None, passes: dict[str, int] | None = None) -> Needs:
        """The needs with some items changed."""
        return replace(self, resident=self.resident | (resident or {}), passes=self.passes | (passes or {}))


Step = tuple[list[str], Needs]
"""Settings, and the needs with them."""


def way_out(
    recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost], *, card: int = CARD
) -> tuple[list[str], int] | None:
    """Settings with which a recipe fits, as overrides, and the bytes it then needs; None where none of these do.

    Those that leave the training as it is come first, then those that change how a gradient is had, then rounded weights. Each
    is taken only where it saves anything.
    """
    chosen: list[str] = []
    for step in (_half_scorers, _no_gradient, _offloaded, _eight, _four):
        for settings, fewer in step(recipe, skeleton, needs, costs):
            if fewer.total < needs.total:
                kinds = {text.partition("=")[0] for text in settings}
                chosen = [text for text in chosen if text.partition("=")[0] not in kinds] + settings
                needs = fewer
        if needs.total <= card:
            return chosen, needs.total
    return None


def _half_scorers(recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost]) -> Iterator[Step]:
    """Every scorer in bf16."""
    blocks: list[tuple[str, Block]] = [(f"evaluation.held_out.{i}", block) for i, block in enumerate(recipe.held_out)]
    several = len(recipe.rewards) > 1 or not isinstance(recipe.reward, Block)
    blocks = [(f"reward.{i}" if several else "reward", block) for i, block in enumerate(recipe.rewards)] + blocks
    name = next((name for name in needs.resident if name.startswith(SCORERS)), None)
    for key, block in blocks:
        if name is not None and block.traits.parameters and block.config.model_dump().get("dtype") == "fp32":
            needs = needs.but({name: needs.resident[name] - 2 * block.traits.parameters})
            yield [f"{key}.dtype=bf16"], needs


def _no_gradient(recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost]) -> Iterator[Step]:
    """A surrogate in place of the reward's own gradient, or a small decoder that it goes through."""
    if needs.worst != THROUGH or "decoder" not in costs:
        return
    if recipe.algorithm.config.model_dump().get("look_ahead") in ("auto", "reward"):
        config = recipe.algorithm.config.model_copy(update={"look_ahead": "surrogate"})
        changed = recipe.model_copy(update={"algorithm": replace(recipe.algorithm, config=config)})
        passes = peaks(watch_iteration(changed, skeleton.model, gradient=True), costs)
        yield ["algorithm.look_ahead=surrogate"], needs.but(passes={THROUGH: 0} | passes)
    elif skeleton.tiny_decoder is not None and recipe.model.config.model_dump().get("tiny_decoder") is None:
        with skeleton.mode:
            tiny = empty_tiny(skeleton.tiny_decoder).eval().requires_grad_(False)
            x = torch.zeros(costs["decoder"].rows, *skeleton.model.shape, requires_grad=True)
        small = cost_of(skeleton.mode, len(x), lambda: Decoder(tiny)(x), lambda out: torch.autograd.grad(out.sum(), x))
        saved, weights = costs["decoder"].peak - small.peak, sum(p.numel() * p.element_size() for p in tiny.parameters())
        left = {"tiny decoder": weights}
        yield [f"model.tiny_decoder={skeleton.tiny_decoder}"], needs.but(left, {THROUGH: needs.passes[THROUGH] - saved})


def _offloaded(recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost]) -> Iterator[Step]:
    """The autoencoder on the device only while it decodes."""
    config, size = recipe.model.config.model_dump(), skeleton.vae_bytes
    if config.get("offload_vae") is False and size and config.get("tiny_decoder") is None:
        decoding = {name: needs.passes[name] + size for name in ("a picture", THROUGH) if needs.passes.get(name)}
        yield ["model.offload_vae=true"], needs.but({FROZEN: needs.resident[FROZEN] - size}, decoding)


FROZEN = "frozen weights"


def _eight(recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost]) -> Iterator[Step]:
    yield from _quantised(recipe, skeleton, needs, "8bit")


def _four(recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost]) -> Iterator[Step]:
    yield from _quantised(recipe, skeleton, needs, "4bit")


def _quantised(recipe: Recipe, skeleton: Skeleton, needs: Needs, bits: Any) -> Iterator[Step]:
    """The frozen network's linear layers in fewer bits, under a LoRA."""
    config, net = recipe.model.config.model_dump(), skeleton.model.net
    if recipe.train.shard:  # quantised weights are not divided
        return
    if "quantize" not in config or config["quantize"] is not None or config["lora_rank"] is None or not skeleton.conditions:
        return
    offloaded = needs.resident[FROZEN] - frozen_bytes(net, None) < skeleton.vae_bytes
    vae = 0 if offloaded else skeleton.vae_bytes
    yield [f"model.quantize={bits}"], needs.but({FROZEN: vae + frozen_bytes(net, bits)})
