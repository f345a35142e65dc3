"""Gradients of a black-box reward: those of a fitted surrogate, or differences along random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.noise import Source, normal
from scoreaction.diffusion.processes import Process
from scoreaction.networks.conditions import take
from scoreaction.networks.layers import CriticNetwork, PromptEmbedding, RewardScale, value_network
from scoreaction.types import Conditions

PART = 64
"""Samples that it looks at in one call."""


class Surrogate(nn.Module):
    """A ridge regression plus a network fitted to the rewards seen so far: it stands in for a black-box reward's gradient.

    The regression is there from the first batch, when a network alone would point anywhere; the network learns what is left.

    x0 (batch, *shape) before decoding, prompt (batch,) the numbers of prompts; returns (batch,). It remembers the last
    `memory` samples (fewer where they are large: 64 MiB), which travel with its state.
    """

    samples: Tensor
    prompts: Tensor
    rewards: Tensor
    seen: Tensor
    center: Tensor
    slope: Tensor
    level: Tensor

    def __init__(
        self,
        process: Process,
        shape: Sequence[int],
        *,
        conditions: Conditions = None,
        memory: int = 4096,
        network: CriticNetwork | None = None,
    ) -> None:
        super().__init__()
        self.embed = PromptEmbedding(conditions)
        self.net = value_network(process, shape, self.embed.width, network)
        self.scale = RewardScale()
        memory = max(256, min(memory, 2**24 // math.prod(shape)))
        self.register_buffer("samples", torch.zeros(memory, *shape))
        self.register_buffer("prompts", torch.zeros(memory, dtype=torch.long))
        self.register_buffer("rewards", torch.zeros(memory))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(*shape))
        self.register_buffer("slope", torch.zeros(math.prod(shape)))
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x0: Tensor, prompt: Tensor) -> Tensor:
        t = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        straight = (x0 - self.center).flatten(1) @ self.slope + self.level
        return self.scale.mean + self.scale.spread * (straight + self.net(x0, t, self.embed(prompt)).reshape(len(x0)))

    def remember(self, x0: Tensor, prompt: Tensor, rewards: Tensor) -> None:
        """Adds samples with their rewards, over the oldest where full."""
        self.scale.calibrate(rewards)
        slots = (self.seen + torch.arange(len(x0), device=self.seen.device)) % len(self.samples)
        self.seen += len(x0)
        slots, x0, prompt, rewards = (part[-len(self.samples) :] for part in (slots, x0, prompt, rewards))
        self.samples[slots], self.prompts[slots], self.rewards[slots] = x0, prompt.to(self.prompts), rewards.to(self.rewards)

    @torch.no_grad()
    def foreseen(self, x0: Tensor, prompt: Tensor, rewards: Tensor) -> float | None:
        """`1 - sum (r - V)^2/sum (r - mean r)^2` of samples that it has not seen, each prompt's compared among themselves.

        Both errors are taken from the mean of the prompt, since what a prompt is worth is no slope in x0: 1 where it knows all
        else, 0 where nothing, and below where less than nothing. None where no two samples of a prompt differ in their reward.
        """
        values = torch.cat([self(*part) for part in zip(x0.split(PART), prompt.split(PART), strict=True)]).double().cpu()
        rewards, groups = rewards.double().cpu(), prompt.cpu().unique(return_inverse=True)[1]

        def centred(values: Tensor) -> Tensor:
            mean = torch.zeros(len(values), dtype=values.dtype).scatter_reduce(0, groups, values, "mean", include_self=False)
            return values - mean[groups]

        spread = centred(rewards)
        if spread.abs().max() <= 1e-6 * rewards.abs().max():
            return None
        return 1 - float((spread - centred(values)).square().sum() / spread.square().sum())

    @torch.no_grad()
    def fit_line(self, rows: int = 512) -> None:
        """Ridge regression on the last `rows` samples, in its dual form; its penalty, or no slope at all, by leave-one-out.

        The left-out residual of sample i is `a_i/(K + l)^-1_ii` with `a = (K + l)^-1 y` (Golub, Heath and Wahba 1979).
        """
        known = min(int(self.seen), len(self.samples))
        newest = (self.seen - 1 - torch.arange(min(known, rows), device=self.seen.device)) % len(self.samples)
        x, y = self.samples[newest].double(), ((self.rewards[newest] - self.scale.mean) / self.scale.spread).double()
        center, level = x.mean(0), y.mean()
        x, y = (x - center).flatten(1), y - level
        kernel = x @ x.T
        eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
        best, slope = float(y.square().mean()), torch.zeros_like(x[0])
        for share in (1e-3, 1e-2, 1e-1, 1.0):
            inverse = torch.linalg.inv(kernel + share * kernel.trace() / len(x) * eye + 1e-9 * eye)
            dual = inverse @ y
            left_out = float((dual / inverse.diagonal()).square().mean())
            if left_out < best:
                best, slope = left_out, x.T @ dual
        self.center.copy_(center)
        self.slope.copy_(slope)
        self.level.copy_(level)

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """The slots of random remembered samples, (rows,)."""
        return torch.randint(min(int(self.seen), len(self.samples)), (rows,), generator=generator)

    def loss(self, slots: Tensor) -> Tensor:
        """Squared error at these remembered samples, in units of the rewards' variance, (rows,)."""
        error = self(take(self.samples, slots), take(self.prompts, slots)) - take(self.rewards, slots)
        return (error / self.scale.spread).square()


class _ZerothOrder(torch.autograd.Function):
    """A black-box function whose backward is a central difference along one random direction."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, score: Callable[[Tensor], Tensor], std: float, noise: Tensor) -> Tensor:
        slope = (score(x0 + std * noise) - score(x0 - std * noise)) / (2 * std)
        ctx.save_for_backward(slope.reshape(-1, *[1] * (x0.ndim - 1)) * noise)
        return score(x0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (direction,) = ctx.saved_tensors
        return grad.reshape(-1, *[1] * (direction.ndim - 1)) * direction, None, None, None


def zeroth_order(score: Callable[[Tensor], Tensor], x0: Tensor, std: float, generator: Source) -> Tensor:
    """`score(x0)` (batch,) with the gradient `(score(x0 + h u) - score(x0 - h u))/(2h) u`, u standard normal: three queries.

    Unbiased for the gradient of score smoothed by N(0, h^2). Nesterov and Spokoiny 2017, eq. 26.
    """
    noise = normal(x0.shape, generator).to(x0)
    return _ZerothOrder.apply(x0, score, std, noise)
