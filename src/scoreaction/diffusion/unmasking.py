"""Solvers of the reverse masking process: which positions a step t -> s shows."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreaction.diffusion.processes.masking import Masking
from scoreaction.diffusion.reveals import Reveal, position_kl
from scoreaction.types import Predict, Tokens


def ancestral(
    process: Masking, predict: Predict, prediction: Tokens, x: Tensor, t: Tensor, s: Tensor, eta: float, past: object
) -> Reveal:
    """Every masked position with chance `(alpha_s - alpha_t)/(1 - alpha_t)`: of first order in law, several at a time."""
    chance = process.chance(t, s).reshape(-1, 1).to(x.device) * (x == process.mask)
    return Reveal(prediction.log_prob, x, process.mask, chance, single=False)


def one_by_one(
    process: Masking, predict: Predict, prediction: Tokens, x: Tensor, t: Tensor, s: Tensor, eta: float, past: object
) -> Reveal:
    """One masked position, uniformly at random: the jump chain of the continuous process, exact if p ignores t."""
    masked = (x == process.mask).double()
    return Reveal(prediction.log_prob, x, process.mask, masked / masked.sum(1, keepdim=True).clamp(min=1), single=True)


def left_to_right(
    process: Masking, predict: Predict, prediction: Tokens, x: Tensor, t: Tensor, s: Tensor, eta: float, past: object
) -> Reveal:
    """The first masked position."""
    masked = x == process.mask
    return Reveal(prediction.log_prob, x, process.mask, (masked & (masked.cumsum(1) == 1)).double(), single=True)


def confident(
    process: Masking, predict: Predict, prediction: Tokens, x: Tensor, t: Tensor, s: Tensor, eta: float, past: object
) -> Reveal:
    """The masked position of the highest confidence, the pretrained model's: no choice of the policy, and no cost in KL.

    By its own confidence a policy would take paths that the pretrained model cannot, and its KL would be infinite.
    """
    masked = x == process.mask
    best = torch.where(masked, prediction.confidence, -torch.inf).argmax(1, keepdim=True)
    chance = torch.zeros_like(x, dtype=torch.float64).scatter(1, best, 1.0) * masked
    return Reveal(prediction.log_prob, x, process.mask, chance, single=True)


def path_kl_of_tokens(process: Masking, times: Tensor, x: Tensor, policy: Tokens, reference: Tokens) -> Tensor:
    """Path KL in nats along states that several positions a step lead to, (batch,).

    `E integral of rate(t) sum_i KL_i dt` over masked positions i, by the trapezoid in alpha of `sum_i KL_i/(1 - alpha)`, its
    last point extrapolated. It depends on no schedule. times (N+1,), x (N, batch, length), predictions at those states.
    """
    alpha = process.alpha(times).to(policy.log_prob)
    costs = (position_kl(policy.log_prob, reference.log_prob) * (x == process.mask)).sum(2) / (1 - alpha[:-1])[:, None]
    last = costs[-1]
    if len(costs) > 1:
        last = last + (costs[-1] - costs[-2]) * (alpha[-1] - alpha[-2]) / (alpha[-2] - alpha[-3])
    ends = torch.cat([costs[1:], last[None]])
    return ((alpha[1:] - alpha[:-1])[:, None] * (costs + ends) / 2).sum(0)
