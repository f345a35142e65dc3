"""Trajectories that share their beginning: one stem for several, which part at a step and go on with noise of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Leading, Source
from scoreaction.diffusion.predictions import mapped
from scoreaction.sampling.rollout import Rollout


class Drawing(Protocol):
    """Draws a rollout for prompts on a grid, from x (batch, *shape) or from noise."""

    def __call__(self, prompt: Tensor, times: Tensor, generator: Source, *, x: Tensor | None) -> Rollout: ...


def branched(
    draw: Drawing,
    start: Callable[[Tensor, Source], Tensor],
    prompt: Tensor,
    times: Tensor,
    generator: Source,
    *,
    at: int,
    count: int,
) -> Rollout:
    """Trajectories that are one until step `at` and go on `count` times each from there: row i is of the stem `i mod stems`.

    `draw(prompt, times, generator, x=x)` is a rollout from x, `start(prompt, generator)` the noise. The stems are drawn once,
    for the prompts and by the noise of the first rows, and stand in the rollout as often as they go on; siblings have one
    prompt.
    """
    stems, leading = len(prompt) // count, Leading(generator, len(prompt))
    if at == 0:
        return draw(prompt, times, generator, x=_each(start(prompt[:stems], leading), count))
    stem = draw(prompt[:stems], times[: at + 1], leading, x=None)
    rest = draw(prompt, times[at:], generator, x=_each(stem.x0, count))

    def one_after_another(before: Tensor, after: Tensor) -> Tensor:
        return torch.cat([_each(before, count, 1), after])

    old = mapped(one_after_another, stem.old, rest.old)
    explored = stem.action is not stem.old
    action = mapped(one_after_another, stem.action, rest.action) if explored else old
    return replace(rest, times=times, x=one_after_another(stem.x[:-1], rest.x), old=old, action=action)


def _each(part: Tensor, count: int, dim: int = 0) -> Tensor:
    return torch.cat([part] * count, dim)
