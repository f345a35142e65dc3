"""Settings of steering: which method draws the samples, with how many particles, and what it cannot do."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import Field

from scoreaction.diffusion.processes import Masking
from scoreaction.sampling.known import Known
from scoreaction.sampling.sampler import Sampler
from scoreaction.settings import Settings

Method = Literal["auto", "best_of", "svdd", "svdd_published", "smc", "twisted", "guidance"]
Returns = Literal["one", "weighted", "all"]
PARTICLES = 16

BY_SVDD, BY_WEIGHTS, BY_GRADIENT = ("svdd", "svdd_published"), ("smc", "twisted"), ("twisted", "guidance")
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "particles": ("best_of", *BY_SVDD, *BY_WEIGHTS),
    "select": ("best_of", "svdd_published"),
    "target": ("smc",),
    "draws": ("svdd", "smc"),
    "every": (*BY_SVDD, *BY_WEIGHTS),
    "ess": BY_WEIGHTS,
    "returns": ("best_of", *BY_WEIGHTS),
}
"""The methods that take a setting; the others refuse any value of it but the default."""


class Steering(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of steering, which draws from `p(x0) exp(r(x0)/beta)/Z`, p the model's law, without training.

    The model's own sampling is led by the reward of the clean sample x0_hat that it predicts on the way, the look-ahead
    `v(t, x) = r(x0_hat(t, x))`.

    method, of which the last two need the reward's gradient:
    - best_of: of M samples the one with the highest reward (`select: categorical` one with probability ~ exp(r/beta));
    - smc: groups of M particles, weighted by `exp((v(s, x_s) - v(t, x_t))/beta)` and resampled;
    - svdd: in each step M candidates, of which one is kept with probability ~ exp(v(s, x_s)/T), T = beta (eta^2/c) (M-1)/M
      and c = (1 + eta^2)/2; svdd_published keeps the best, or by `select: categorical` one at T = beta;
    - twisted: smc whose proposals are moved along the gradient of v, by `k^2 grad v/beta`, the weights corrected for it;
    - guidance: the score becomes `score + grad v/beta`; no particles, any eta, any solver.
    Of tokens the look-ahead is `v(x) = beta log mean_j exp(r(x0_j)/beta)`, x0_j `draws` sequences from the product of the
    predicted laws, that of svdd_published the reward of the most probable sequence, as in its authors' code; tokens have no
    gradient, and the last two are refused. auto is twisted where the reward has a gradient and smc where not; without noise
    guidance and best_of.

    beta: reward units per nat, by default the algorithm's. particles: M, by default 16. draws: of tokens, by default 1. every:
    only each so many steps are scored. ess: groups are resampled where the effective sample size is below this share of M.
    returns: `one` sample of each group, independent of the others, with an error of order 1/M; `weighted`, the groups of a
    prompt drawn in proportion to their Z, without that error; `all` particles of all groups, one trajectory a sample, n
    rounded up to whole groups. target: the law that is tilted, the model's own or, for a tuned model and smc, its pretrained
    reference's: then the tuned model proposes and the weights correct it. Li et al. 2024 (arXiv 2408.08252), Singhal et al.
    2025 (arXiv 2501.06848), Wu et al. 2023 (arXiv 2306.17775).

    known: a part of the sample that is known; then the reward is not asked, and the law is that of the rest given this part.

    >>> Steering(method="svdd").settled(differentiable=False, sampler=Sampler(), beta=0.5).particles
    16
    """

    method: Method = "auto"
    particles: int | None = Field(None, ge=2)
    beta: float | None = Field(None, gt=0)
    select: Literal["argmax", "categorical"] | None = None
    target: Literal["model", "reference"] = "model"
    draws: int | None = Field(None, ge=1)
    every: int = Field(1, ge=1)
    ess: float = Field(0.5, gt=0, le=1)
    returns: Returns = "one"
    known: Known | None = None

    def settled(self, *, differentiable: bool, sampler: Sampler, beta: float | None, tuned: bool = True) -> Steering:
        """The settings with every default in its place. ValueError, with the remedy, for what does not go together.

        beta: the algorithm's, None or 0 where it has none. tuned: whether a tuned model is steered.
        """
        tokens = issubclass(sampler.find().process, Masking)
        if self.known is not None:
            if self.beta not in (None, 1.0):  # which it is once settled
                raise ValueError("steer.beta: what is known has a scale of its own, steer.known.std; leave beta out")
            differentiable, beta = True, 1.0
        method = self.method if self.method != "auto" else self._best(differentiable and not tokens, sampler.eta)
        self._refuse_unused(method)
        if method in BY_GRADIENT and tokens:
            raise ValueError(
                f"steer.method: {method} moves states by the reward's gradient and tokens have none; use smc, svdd or best_of"
            )
        if self.draws is not None and not tokens:
            raise ValueError("steer.draws: the look-ahead of Gaussian states is one clean sample; leave it out")
        if method in BY_GRADIENT and not differentiable:
            raise ValueError(
                f"steer.method: {method} needs the reward's gradient and this one has none; use smc, svdd or best_of, or, where"
                " gradients do flow, Reward(fn, differentiable=True)"
            )
        if sampler.eta == 0 and method in (*BY_SVDD, *BY_WEIGHTS):
            raise ValueError(
                f"sampler.eta: {method} has nothing to choose from without noise; set it to 1, or steer.method to guidance or"
                " best_of"
            )
        if self.target == "reference" and not tuned:
            raise ValueError("steer.target: the pretrained model is steered, there is no other to correct; leave it out")
        if self.target == "reference" and not sampler.find().markov:
            raise ValueError(f"steer.target: reference needs steps that do not look back as {sampler.solver}'s do; use ddim")
        chosen: dict[str, Any] = {"method": method, "beta": self.beta or beta or None}
        if method in TAKEN_BY["particles"]:
            chosen["particles"] = self.particles or PARTICLES
        if method in TAKEN_BY["draws"] and tokens:
            chosen["draws"] = self.draws or 1
        if method in TAKEN_BY["select"]:
            chosen["select"] = self.select or "argmax"
        if chosen["beta"] is None and chosen.get("select") != "argmax":
            raise ValueError(f"steer.beta: {method} needs it and the algorithm has none; set it, in reward units per nat")
        return self.model_copy(update=chosen)

    def sample_count(self, trajectories: int) -> int:
        """Samples of a measurement that has so many trajectories, of which each group takes as many as it has particles."""
        return max(16, trajectories // (1 if self.returns == "all" else self.particles or 1))

    def group_count(self, n: int, prompts: int) -> int:
        """Groups for n samples of so many prompts: one each, or for `all` whole ones, equally many of each prompt."""
        if self.returns != "all":
            return n
        return math.ceil(math.ceil(n / (self.particles or 1)) / prompts) * prompts

    def _best(self, differentiable: bool, eta: float) -> str:
        if self.target == "reference":
            return "smc"
        if eta == 0:
            return "guidance" if differentiable else "best_of"
        return "twisted" if differentiable else "smc"

    def _refuse_unused(self, method: str) -> None:
        if self.target == "reference" and method == "twisted":
            raise ValueError("steer.target: with reference the tuned model itself is the proposal; set steer.method to smc")
        for key, methods in TAKEN_BY.items():
            value = getattr(self, key)
            if value != type(self).model_fields[key].default and method not in methods:
                raise ValueError(f"steer.{key}: {method} has no use for it (got {value}); leave it out, or use {_or(methods)}")


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


METHODS = tuple(name for name in get_args(Method) if name != "auto")
