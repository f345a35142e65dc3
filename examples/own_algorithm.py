"""An algorithm of your own: reward-weighted regression, beside Score as Action on a task whose optimum is known.

python examples/own_algorithm.py [iterations]        # a minute on a laptop's CPU

The model learns its own samples again, the better ones more (Lee et al. 2023, arXiv 2302.12192): the loss of trajectory i is
`w_i |eps_theta(x_t) - eps|^2` with `x_t = alpha x0_i + sigma eps` and `w = softmax(reward/temperature)` times the batch. Unlike
Score as Action it has no price on the KL, and goes past the optimum, whose reward is 2.10 at 1.23 nats.
"""

import sys

import torch
from pydantic import Field

import scoreaction as sa
from scoreaction.algorithms import Algorithm, Learner, Term, Update
from scoreaction.diffusion.predictions import expand


class RewardWeightedRegression(Algorithm):
    """Settings: checked when they are made, and part of what a run records."""

    temperature: float = Field(1.0, gt=0)
    repeats: int = Field(8, ge=1, description="updates an iteration")

    def build(self, setting):
        return RegressionLearner(self, setting)


class RegressionLearner(Learner):
    def __init__(self, config, setting):
        super().__init__(setting)
        self.config = config

    def updates(self, rollout, generator):
        x0, prompt = rollout.x0, rollout.prompt
        weight = len(x0) * torch.softmax(rollout.rewards / self.config.temperature, dim=0)
        for _ in range(self.config.repeats):
            t = torch.rand(len(x0), generator=generator, dtype=torch.float64)
            eps = torch.randn(x0.shape, generator=generator)
            x = expand(self.process.alpha(t), x0) * x0 + expand(self.process.sigma(t), x0) * eps

            def loss(rows, x=x, t=t, eps=eps):
                """Of these rows, and figures for the log; the loop asks for as many rows as memory holds."""
                error = self.policy(x[rows], t[rows], prompt[rows]).eps - eps[rows]
                return weight[rows] * error.flatten(1).square().sum(dim=1), {"weight": weight[rows]}

            yield Update("policy", [Term(len(x0), loss)])


def x_plus_half_y(samples, prompts):
    return samples[:, 0] + 0.5 * samples[:, 1]


iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 40
for algorithm in (RewardWeightedRegression(temperature=1.0), sa.ScoreAction(beta=0.5)):
    torch.manual_seed(0)
    tuner = sa.Finetuner(
        sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config()),
        reward=x_plus_half_y,
        algorithm=algorithm,
        sampler=sa.Sampler(steps=10),
        train=sa.Train(iterations=iterations, batch=256, lr=2e-3),
    )
    *_, metrics = tuner  # the last iteration's
    draws = (sa.sample(tuner.model, n=2000, steps=50, reference=reference) for reference in (True, False))
    before, after = (float(x_plus_half_y(samples, None).mean()) for samples in draws)
    print(f"{type(algorithm).__name__}: reward {before:.2f} before, {after:.2f} after, {metrics['kl_nats']:.2f} nats")
