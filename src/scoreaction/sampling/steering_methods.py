"""The methods of steering, each on the particles of some groups."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.kl import drift_rate, path_kl
from scoreaction.diffusion.predictions import expand, mapped
from scoreaction.diffusion.transitions import Kernel, Transition, sum_event
from scoreaction.errors import Failed
from scoreaction.networks.conditions import take
from scoreaction.sampling.look_ahead import twisted
from scoreaction.sampling.particles import Particles, categorical, uniform
from scoreaction.sampling.steering import BY_SVDD, BY_WEIGHTS
from scoreaction.sampling.trajectory import Chosen
from scoreaction.sampling.walks import Walk, Walked
from scoreaction.types import Prediction


def ended(walk: Walk) -> Walked:
    """The groups' ends by the method of the walk's settings."""
    method = walk.steering.method
    if method in BY_SVDD:
        return _Svdd(walk).walk()
    if method in BY_WEIGHTS:
        return _Weighted(walk).walk()
    return _best_of(walk) if method == "best_of" else _Guided(walk).walk()


def _best_of(walk: Walk) -> Walked:
    """M whole samples of each group, weighted by exp(r/beta) or, for argmax, by the best alone."""
    policy = partial(walk.policy, prompt=walk.every_prompt)
    x0 = walk.follow(policy, walk.start(walk.m), lambda step, transition, t, s: Chosen(walk.drawn(transition)))
    rewards, _, _ = walk.look(x0, walk.times[-1], policy, gradient=False)
    rewards = rewards.double().cpu().view(walk.groups, walk.m)
    particles = Particles(walk.groups, walk.m)
    particles.weigh(rewards / walk.beta)
    log_weights, kl = chosen_kl(rewards / walk.beta, argmax=walk.steering.select == "argmax", scores=rewards)
    x0 = x0.unflatten(0, (walk.groups, walk.m))
    return Walked(x0, log_weights, particles.log_z, rewards, kl, torch.stack(particles.shares, 1))


def chosen_kl(log_weights: Tensor, *, argmax: bool, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights of a choice among M, and its KL to a choice at random (groups,): `sum_j w_j log(M w_j)`, a bound.

    Of the best of M it is exact, `log M - (M-1)/M`, where no two are equal.
    """
    m = log_weights.shape[1]
    if argmax:
        best = torch.full_like(scores, -math.inf).scatter(1, scores.argmax(1, keepdim=True), 0.0)
        return best, torch.full((len(scores),), math.log(m) - (m - 1) / m, dtype=torch.float64)
    normalised = log_weights - torch.logsumexp(log_weights, 1, keepdim=True)
    return log_weights, (normalised.exp() * (normalised + math.log(m))).sum(1)


class _Svdd:
    """In each scored step one of M candidates is kept: `j ~ softmax(v(s, x_s^j)/T)`."""

    def __init__(self, walk: Walk) -> None:
        self.walk_, m, eta = walk, walk.m, walk.sampler.eta
        published = walk.steering.method == "svdd_published"
        self.temperature = walk.beta if published else walk.beta * eta**2 / drift_rate(eta) * (m - 1) / m
        self.argmax = walk.steering.select == "argmax"
        self.kl = torch.zeros(walk.groups, dtype=torch.float64)

    def walk(self) -> Walked:
        walk = self.walk_
        x0 = walk.follow(self.predict, walk.start(1).repeat_interleave(walk.m, 0), self.choose)
        nothing = torch.zeros(walk.groups, 1, dtype=torch.float64)
        return Walked(x0[:: walk.m, None], nothing, nothing[:, 0], nothing, self.kl, torch.ones(walk.groups, 1))

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        """The prediction for all candidates; at the start they are alike, and one is evaluated."""
        walk = self.walk_
        if float(t) == float(walk.times[0]):
            one = walk.policy(x[:: walk.m], t, prompt=walk.prompt)
            return mapped(lambda part: part.repeat_interleave(walk.m, 0), one)
        return walk.policy(x, t, prompt=walk.every_prompt)

    def choose(self, step: int, transition: Kernel, t: Tensor, s: Tensor) -> Chosen:
        walk = self.walk_
        x = walk.drawn(transition)
        if not walk.scored(step):
            return Chosen(x)
        values, _, prediction = walk.look(x, s, walk.policy, gradient=False)
        values = values.double().cpu().view(walk.groups, walk.m)
        log_weights, kl = chosen_kl(values / self.temperature, argmax=self.argmax, scores=values)
        self.kl += kl
        kept = torch.arange(walk.groups) * walk.m + categorical(log_weights, uniform(walk.groups, walk.noise))
        parents = kept.repeat_interleave(walk.m)
        return Chosen(take(x, parents), None if prediction is None else take(prediction, parents), parents)


class _Weighted:
    """Sequential Monte Carlo: `log w += (v(s, x_s) - v(t, x_t))/beta + log p(x_s | x_t) - log q(x_s | x_t)`, q the proposal.

    The first weight is `exp(v(1, x_1)/beta)`, and the last value is the reward itself: the estimate of Z has no bias.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk_, self.particles = walk, Particles(walk.groups, walk.m)
        self.twisted = walk.steering.method == "twisted"
        self.corrects = walk.steering.target == "reference"
        self.pending = torch.zeros(walk.groups, walk.m, dtype=torch.float64)
        self.x = walk.start(walk.m)
        self.values = torch.zeros(len(self.x), dtype=torch.float64)
        self.grad: Tensor | None = None
        self.known: Prediction | None = None

    def walk(self) -> Walked:
        walk = self.walk_
        self.weigh(walk.times[0], resample=True)
        x0 = walk.follow(self.predict, self.x, self.choose).unflatten(0, (walk.groups, walk.m))
        rewards, kl = self.values.view(walk.groups, walk.m), torch.zeros(walk.groups, dtype=torch.float64)
        shares = torch.stack(self.particles.shares, 1)
        return Walked(x0, self.particles.log_weights, self.particles.log_z, rewards, kl, shares)

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        """That of the model that proposes, which is known at the start unless another one is tilted."""
        walk = self.walk_
        if self.known is not None and not self.corrects and float(t) == float(walk.times[0]):
            return self.known
        return walk.policy(x, t, prompt=walk.every_prompt)

    def weigh(self, t: Tensor, *, resample: bool) -> Tensor | None:
        """Scores the states at t and adds to the weights; resamples, and returns the parents where it did."""
        walk = self.walk_
        predict = walk.pretrained if self.corrects else walk.policy
        gradient = self.twisted and not walk.is_end(t)
        values, grad, self.known = walk.look(self.x, t, predict, gradient=gradient)
        values, self.grad = values.double().cpu(), grad if gradient else None
        self.particles.weigh((values - self.values).view_as(self.pending) / walk.beta + self.pending)
        self.values, self.pending = values, torch.zeros_like(self.pending)
        parents = self.particles.resample(walk.steering.ess, walk.noise) if resample else None
        if parents is not None:
            self.x, self.values = take(self.x, parents), take(self.values, parents)
            self.grad, self.known = take(self.grad, parents), take(self.known, parents)  # None stays None
        return parents

    def choose(self, step: int, transition: Any, t: Tensor, s: Tensor) -> Chosen:
        walk = self.walk_
        target = proposal = transition
        if self.corrects:
            assert self.known is not None
            predict = partial(walk.pretrained, prompt=walk.every_prompt)
            target = walk.solver.step(walk.process, predict, self.known, self.x, t, s, walk.sampler.eta, None)
        elif self.grad is not None:
            proposal = twisted(transition, self.grad, walk.beta)
        density = bool(walk.process.has_density(s))
        self.x = walk.drawn(proposal if density else target)  # without density the law that is tilted acts
        if density and proposal is not target:
            self.pending += target.log_ratio(proposal, self.x).double().cpu().view_as(self.pending)
        parents = None
        if walk.scored(step) or walk.is_end(s):
            parents = self.weigh(s, resample=not walk.is_end(s))
        else:
            self.known = walk.pretrained(self.x, s, prompt=walk.every_prompt) if self.corrects else None
        return Chosen(self.x, None if self.corrects else self.known, parents)


class _Guided:
    """The score of the noised tilted law as far as v knows it: `eps - sigma grad v/beta`, at every eta and by every solver."""

    def __init__(self, walk: Walk) -> None:
        self.walk_ = walk
        self.moved: dict[float, Prediction] = {}
        """The norms of the moves of both predictions at each time of the grid, (groups, 1)."""

    def walk(self) -> Walked:
        walk = self.walk_
        x0 = walk.follow(self.predict, walk.start(1), self.choose)
        self.check(x0, walk.times[-1])
        moves = [self.moved[float(t)] for t in walk.times[:-1]]
        difference = Prediction(*(torch.stack(both) for both in zip(*moves, strict=True)))
        kl = path_kl(walk.process, walk.times, difference, walk.sampler.eta or 1.0)
        nothing = torch.zeros(walk.groups, 1, dtype=torch.float64)
        return Walked(x0[:, None], nothing, nothing[:, 0], nothing, kl, torch.ones(walk.groups, 1))

    def check(self, x: Tensor, t: Tensor) -> None:
        walk = self.walk_
        if not bool(torch.isfinite(x).all()):
            raise Failed(
                f"steer: guidance diverged at t = {float(t):.3g} (beta {walk.beta:g}, {walk.sampler.steps} steps); raise"
                " steer.beta or sampler.steps, or use twisted, smc or svdd"
            )

    def predict(self, x: Tensor, t: Tensor) -> Prediction:
        """The guided prediction; at alpha = 0, where the score says nothing of x0, the model's own."""
        walk, process = self.walk_, self.walk_.process
        self.check(x, t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        if float(alpha) == 0:
            return walk.policy(x, t, prompt=walk.every_prompt)
        _, grad, prediction = walk.look(x, t, walk.policy, gradient=True)
        assert prediction is not None
        move = grad / walk.beta
        by = Prediction(expand(sigma**2 / alpha, move) * move, expand(-sigma, move) * move)
        self.remember(t, by)
        guided = Prediction(*(part + change for part, change in zip(prediction, by, strict=True)))
        return walk.model.projected(t, guided, walk.inside)

    def remember(self, t: Tensor, by: Prediction) -> None:
        self.moved[float(t)] = Prediction(*(sum_event(part**2).sqrt()[:, None].double().cpu() for part in by))

    def choose(self, step: int, transition: Transition, t: Tensor, s: Tensor) -> Chosen:
        """The next states; from alpha = 0 they are moved by `k^2 grad v(s, mean)/beta`."""
        walk = self.walk_
        if float(walk.process.alpha(t)) == 0:
            _, grad, _ = walk.look(transition.mean, s, walk.policy, gradient=True)
            move = expand(transition.std**2 / walk.beta, grad) * grad
            self.remember(t, Prediction(move / expand(walk.process.alpha(s), move), torch.zeros_like(move)))
            transition = Transition(transition.mean + move, transition.std)
        return Chosen(walk.drawn(transition))
