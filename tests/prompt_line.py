"""Four prompts on a line, each with data N(m, 1.2), a quadratic reward, and what a choice on the chain is worth, exactly."""

from __future__ import annotations

import torch
from torch import nn
from twins import f64

import scoreaction as sa
from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.solvers import ddim_step, time_grid
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.types import Prediction

VP = sa.VP()
MEANS, VARIANCE, MU, BETA, OWN, AT, STEPS = (-1.5, -0.5, 0.5, 1.5), 1.2, 0.4, 0.25, 1, 0.2, 24
PROMPTS = [str(mean) for mean in MEANS]
MENU = {prompt: PROMPTS for prompt in PROMPTS}
REWARD = QuadraticReward(Quadratic(torch.eye(1), torch.tensor([0.0]), torch.tensor([MU])))
LAWS = [Mixture(f64([1.0]), f64([[mean]]), f64([[[VARIANCE]]])) for mean in MEANS]


class Told(nn.Module):
    """The exact v of N(m, 1.2), m the condition; nothing of it is trained."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, cond):
        standard = Mixture(f64([1.0]), f64([[0.0]]), f64([[[VARIANCE]]]))
        t, shift = t.double(), cond[:, None].double()
        prediction = standard.prediction(VP, x.double() - expand(VP.alpha(t), x) * shift, t)
        x0, eps = prediction.x0 + shift, prediction.eps
        return (expand(VP.alpha(t), x) * eps - expand(VP.sigma(t), x) * x0).to(x) + 0 * self.unused


def model():
    return sa.Model(
        Told(), process=VP, predicts="v", shape=(1,), encode=lambda texts: torch.tensor([float(str(p)) for p in texts])
    )


def algorithm(**more):
    return sa.PromptLoop(**{"menu": MENU, "at": [AT], "beta": BETA, "hidden": 32} | more)


def tuner(made=None, *, prompts=(PROMPTS[OWN],), eta=1.0, steps=STEPS, train=None, **more):
    settings = {"iterations": 1, "batch": 64, "device": "cpu", "lr": 3e-3, "schedule": "constant"} | (train or {})
    return sa.Finetuner(
        made or model(), reward=REWARD, algorithm=more.pop("algorithm", None) or algorithm(),
        sampler=sa.Sampler(steps=steps, eta=eta), train=sa.Train(**settings), prompts=list(prompts),
        evaluation=sa.Evaluation(n=64, steps=steps, eta=eta), **more,
    )  # fmt: skip


def biased(made, logits):
    """The model with a chooser that has these logits whatever it sees."""
    with torch.no_grad():
        made.parameters["last.bias"].copy_(torch.as_tensor(logits, dtype=torch.float32))
    return made


def affine(prompt, times, eta=1.0):
    """Slope, offset and variance of x at the last of these times given x at the first, under one prompt's chain."""
    slope, offset, variance = 1.0, 0.0, 0.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        steps = [ddim_step(VP, Prediction(*LAWS[prompt].prediction(VP, f64([[x]]), t)), t, s, eta) for x in (0.0, 1.0)]
        low, high, k = float(steps[0].mean), float(steps[1].mean), float(steps[0].std)
        a = high - low
        slope, offset, variance = a * slope, a * offset + low, a * a * variance + k * k
    return slope, offset, variance


def decided(steps=STEPS):
    """The grid, and the number of the first step at or below the decision's time."""
    times = time_grid(VP, steps, name="power")
    return times, int((times <= AT).nonzero()[0])


def states(eta=1.0, steps=STEPS, nodes=4001):
    """Where the decision is made: states x (nodes,), their weights under the own prompt's chain, and t."""
    times, first = decided(steps)
    slope, offset, variance = affine(OWN, times[: first + 1], eta)
    std = (slope**2 + variance) ** 0.5
    x = torch.linspace(offset - 7 * std, offset + 7 * std, nodes, dtype=torch.float64)
    weight = torch.exp(-0.5 * ((x - offset) / std) ** 2)
    return x, weight / weight.sum(), times[first]


def q_values(x, eta=1.0, steps=STEPS):
    """`Q(x, c) = -((A x + b_c - mu)^2 + S)/2` of each prompt, (nodes, 4)."""
    times, first = decided(steps)
    parts = [affine(prompt, times[first:], eta) for prompt in range(4)]
    return torch.stack([-0.5 * ((a * x + b - MU) ** 2 + variance) for a, b, variance in parts], 1)


def soft(q, weight):
    """`E[r] - beta KL` of the best policies: one that sees the state, and one that does not."""
    prior = torch.full((4,), 0.25, dtype=torch.float64).log()
    seeing = BETA * torch.logsumexp(prior + q / BETA, 1)
    blind = BETA * torch.logsumexp(prior + (weight[:, None] * q).sum(0) / BETA, 0)
    return float((weight * seeing).sum()), float(blind)
