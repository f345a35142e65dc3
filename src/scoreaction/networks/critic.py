"""The critic: a value function with the structure of diffusion, `V = c_skip(t) r(x0_hat) + c_out(t) F(t, x, c)`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.networks.layers import CriticNetwork, PromptEmbedding, RewardScale, value_network
from scoreaction.types import Conditions

Skip = Literal["alpha", "cosine", "whole", "none", "signal"]


class Critic(nn.Module):
    """`V(t, x, c) = m + c_skip(t) (r(x0_hat) - m) + c_out(t) d F(t, x, c)`, with c_skip(0) = 1 and c_out(0) = 0.

    `alpha`: c_skip = alpha^2, c_out = sigma, of the process scaled to alpha^2 + sigma^2 = 1; `cosine`: cos, sin of pi t/2
    (the published choice); `whole`: c_skip = 1, c_out = sigma, a residual on the soft Q of SQDF; `none`: c_skip = 0, c_out = 1,
    for a reward without a gradient; `signal`: that with `F(t, alpha x, c)` of the scaled process, for a value whose gradient is
    all that counts. Such a gradient is `alpha/sigma^2 Cov(x0, target | x)` and vanishes near pure noise; that of F(t, x, c) is
    of order one there. m and d are the mean and spread of the first rewards seen, so that F is of order one. Score as Action
    (Zhao et al. 2025, arXiv 2502.01819), section 4.
    conditions: those of all prompts, (prompts, ...), or None. network: builds F, None is the small one for the shape.

    x (batch, *shape), t (batch,), prompt (batch,) numbers of prompts, look_ahead = r(x0_hat) (batch,) or None to leave the
    skip out; returns (batch,).
    """

    def __init__(
        self,
        process: Process,
        shape: Sequence[int],
        *,
        skip: Skip,
        conditions: Conditions = None,
        network: CriticNetwork | None = None,
    ) -> None:
        super().__init__()
        self.process, self.skip = process, skip
        self.embed = PromptEmbedding(conditions)
        self.net = value_network(process, shape, self.embed.width, network)
        self.scale = RewardScale()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at t."""
        t = t.double()
        match self.skip:
            case "alpha" | "whole":
                alpha2, sigma2 = self.process.alpha(t) ** 2, self.process.sigma2(t)
                c_skip = alpha2 / (alpha2 + sigma2) if self.skip == "alpha" else torch.ones_like(t)
                return c_skip, torch.sqrt(sigma2 / (alpha2 + sigma2))
            case "cosine":
                return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)
            case "none" | "signal":
                return torch.zeros_like(t), torch.ones_like(t)
        raise ValueError(f"algorithm.skip: unknown skip {self.skip!r}; choose from alpha, cosine, whole, none, signal")

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor, look_ahead: Tensor | None = None) -> Tensor:
        c_skip, c_out = self.coefficients(t)
        learned = self.net(self.inputs(x, t), t, self.embed(prompt)).reshape(len(x))
        value = self.scale.mean + c_out.to(x) * self.scale.spread * learned
        if look_ahead is not None:
            value = value + c_skip.to(value) * (look_ahead - self.scale.mean)
        return value

    def inputs(self, x: Tensor, t: Tensor) -> Tensor:
        """The input of F at x (batch, *shape) and t: x itself, or scaled to its share of signal."""
        if self.skip != "signal":
            return x
        alpha2, sigma2 = self.process.alpha(t.double()) ** 2, self.process.sigma2(t.double())
        return expand(torch.sqrt(alpha2 / (alpha2 + sigma2)), x) * x

    def gradient(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """The gradient in x of the learned part, `c_out d grad F`, (batch, *shape); the skip's is that of the look-ahead."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self(x, t, prompt).sum(), x)[0]
