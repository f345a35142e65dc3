"""Truth: the formulas of Flow-Factory's GRPO, from random velocities, noise and rewards."""

import torch
from twins import F64, close, f64

import scoreaction as sa
from scoreaction.algorithms._likelihood_ratio import clipped_surrogate, standardised
from scoreaction.diffusion.predictions import to_prediction
from scoreaction.diffusion.solvers import find_solver


def test_grpo_is_what_flow_factory_minimises():
    """Truth: its step of the SDE with noise level a, which is eta = a/sqrt(2) here, log ratio, clip, advantages by group.

    Its densities are means over dimensions and ours sums: its loss is ours with the log ratio over D, and small clips are D
    times as large here. Not compared: pure noise, where it takes another sigma, and its last step, which has noise.
    """
    generator = torch.Generator().manual_seed(0)
    x, v, v_old, z = (torch.randn(6, 5, generator=generator, dtype=F64) for _ in range(4))
    t, a, clip, groups = f64([0.1, 0.3, 0.5, 0.6, 0.8, 0.9]), 0.7, 0.01, torch.tensor([0, 0, 0, 1, 1, 1])
    s, rewards = t - 0.04, f64([0.2, 0.9, 0.4, 2.0, 2.5, 1.1])
    sigma, dt = t[:, None], -0.04

    def published(velocity):
        d = (sigma / (1 - sigma)).sqrt() * a
        mean = x * (1 + d**2 / (2 * sigma) * dt) + velocity * (1 + d**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, d * (-dt) ** 0.5

    old_mean, std = published(v_old)
    after = old_mean + std * z
    log_prob = lambda mean: (-((after - mean) ** 2) / (2 * std**2) - std.log()).mean(1)  # noqa: E731
    ratio = (log_prob(published(v)[0]) - log_prob(old_mean)).exp()
    by_group = rewards.reshape(2, 3)

    def loss(spread):
        advantage = ((by_group - by_group.mean(1, keepdim=True)) / spread).flatten()
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)), advantage

    def never(x, t):
        raise AssertionError("one call a step")

    def step(velocity, eta):
        prediction = to_prediction(sa.Flow(), "velocity", x, t, velocity)
        return find_solver("euler_maruyama", eta).step(sa.Flow(), never, prediction, x, t, s, eta, None)

    new, old = step(v, a / 2**0.5), step(v_old, a / 2**0.5)
    close(old.mean, old_mean, atol=1e-12, noisier=step(v_old, a).mean)
    close(old.std, std[:, 0], atol=1e-12, noisier=step(v_old, a).std)
    truth, advantage = loss(by_group.std(1, correction=0, keepdim=True))
    close(standardised(rewards, groups), advantage, atol=1e-12, whole_batch=loss(rewards.std(correction=0))[1])
    found = clipped_surrogate(new.log_ratio(old, after) / 5, advantage, clip)
    close(found, truth, atol=1e-12, swapped=clipped_surrogate(old.log_ratio(new, after) / 5, advantage, clip),
          summed=clipped_surrogate(new.log_ratio(old, after), advantage, clip))  # fmt: skip
