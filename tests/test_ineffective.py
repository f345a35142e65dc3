"""Truth: r = 1[x > tau] of x ~ N(theta, 1), whose gradient is phi(tau - theta); what each rule makes of it in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from twins import F64, accepts, close, f64, same

from scoreaction.algorithms._baselines import dead, group_advantages
from scoreaction.algorithms._likelihood_ratio import standardised

B, TAU = 8, 2.5
TRUE = stats.norm.pdf(TAU)
EMPTY = stats.norm.cdf(TAU) ** B
"""The chance that no sample of a group has a reward."""


def groups(count, shift=0.0, tau=TAU, seed=0, size=B):
    """x and r of so many groups, (count size,), drawn from N(shift, 1), with their numbers, and log dN(0)/dN(shift)."""
    x = shift + torch.randn(count * size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x, (x > tau).double(), torch.arange(count).repeat_interleave(size), shift**2 / 2 - shift * x


def estimate(x, advantage, weight=1.0, size=B):
    """The mean of `w A d log N(x; theta)/d theta`, and its standard error."""
    values = (weight * advantage * x).view(-1, size).mean(1)
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def within(truth, error, share=0.0):
    def check(found):
        assert abs(found - truth) < 4 * error + share * abs(truth), f"{found} is not {truth} +- {error}"

    return check


def test_centred_advantages_are_the_gradient_but_for_one_over_the_group():
    """`1 - 1/B` = .875 of it, by the mean over all groups. Twins: over groups that say something (5.9 times), no factor."""
    x, r, number, _ = groups(200_000, tau=1.0)
    found, error = estimate(x, group_advantages(r, number, torch.ones_like(r)))
    true = stats.norm.pdf(1.0)
    alive = 1 - float(dead(r, number).double().mean())
    accepts(within((1 - 1 / B) * true, error), found, over_the_living=found / alive, unbiased=true)
    p = stats.norm.sf(TAU)  # in closed form, of every group and of those that are not dead
    k = torch.arange(B + 1, dtype=F64)
    chance = f64(stats.binom.pmf(k.numpy(), B, p))
    exact, living = (chance * k / B * (1 - k / B)).sum() / (p * (1 - p)), float(1 - chance[[0, -1]].sum())
    close(exact, 1 - 1 / B, atol=1e-9, over_the_living=(1 - 1 / B) / living)


@pytest.mark.parametrize(("p", "factor"), [(0.5, 1.86), (0.1, 2.33)])
def test_the_std_of_a_group_weighs_hard_prompts_most(p, factor):
    """GRPO: `E sqrt(q(1-q))/(p(1-p))` times the gradient. Twin: what centring alone gives."""
    tau = stats.norm.isf(p)
    x, r, number, _ = groups(3_000, tau=tau)
    found, error = estimate(x, standardised(r, number))
    close(found / stats.norm.pdf(tau), factor, atol=4 * error / stats.norm.pdf(tau) + 0.005, centred=1 - 1 / B)


def truncated(shift):
    """The gradient with weights of at most 1 in large groups: `E[w r x] - E[w r] E[w x]/E[w]`, by quadrature."""
    x = f64(np.linspace(shift - 9, shift + 9, 200_001))
    w = f64(stats.norm.pdf(x - shift)) * torch.exp(shift**2 / 2 - shift * x).clamp(max=1)
    of_r, of_x, both, every = (torch.trapezoid(w * f, x) for f in ((x > TAU) * 1.0, x, (x > TAU) * x, torch.ones_like(x)))
    return float(both - of_r * of_x / every)


def test_advantages_are_the_same_for_rewards_with_a_constant_added():
    """Also of hinted groups; where all rewards are equal they are 0. Twin: a baseline divided by the number of others."""
    generator = torch.Generator().manual_seed(0)
    r, weight = torch.rand(12, generator=generator, dtype=F64), torch.rand(12, generator=generator, dtype=F64) * 3
    number = torch.arange(3).repeat_interleave(4)

    def by_number(rewards):
        weighted = (weight * rewards).view(3, 4)
        return (0.75 * (rewards.view(3, 4) - (weighted.sum(1, keepdim=True) - weighted) / 3)).flatten()

    truth = group_advantages(r, number, weight)
    close(group_advantages(r + 100, number, weight), truth, atol=1e-9, weighed_by_number=by_number(r + 100))
    equal = torch.full((12,), 5.0, dtype=F64)
    close(group_advantages(equal, number, weight), 0.0, atol=1e-12, weighed_by_number=by_number(equal))


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_hint_with_its_exact_weight_is_the_policys_gradient(shift):
    """1.00 times (1 - 1/B), with less variance than without. Truncated it is less; without a weight `phi(tau - shift)`."""
    x, r, number, log_weight = groups(100_000, shift)
    weight, ones, factor = log_weight.exp(), torch.ones_like(r), 1 - 1 / B
    found, error = estimate(x, group_advantages(r, number, weight), weight)
    unweighted, its_error = estimate(x, group_advantages(r, number, ones))
    accepts(within(factor * TRUE, error), found, none=unweighted, true=TRUE * 2)
    hinted = stats.norm.pdf(TAU - shift)  # of x about theta; about the hint's mean it is the hinted policy's gradient
    at_hint, its_error = estimate(x - shift, group_advantages(r, number, ones))
    accepts(within(factor * hinted, its_error), at_hint, true=factor * TRUE)
    x, r, number, log_weight = groups(4_000, shift, size=256)
    short = log_weight.exp().clamp(max=1)
    less, error = estimate(x, group_advantages(r, number, short), short, 256)
    accepts(within(truncated(shift), error + 0.005 * TRUE), less / (1 - 1 / 256), exact=TRUE, none=unweighted)
    plain_x, plain_r, plain_number, _ = groups(100_000)
    _, plain = estimate(plain_x, group_advantages(plain_r, plain_number, ones))
    accepts(lambda own: _between(0, own, 0.7 * plain), error, plain=plain)


def test_a_hint_that_overshoots_has_the_wrong_sign_without_a_weight():
    """Reward 1 in a band at 1.5 +- .25, the hint at 2: .0964 with its weight, -.0855 as published, times (1 - 1/B)."""
    x, _, number, log_weight = groups(100_000, 2.0)
    r = ((x - 1.5).abs() < 0.25).double()

    def slope(theta):
        return stats.norm.pdf(1.25 - theta) - stats.norm.pdf(1.75 - theta)

    weight, factor = log_weight.exp(), 1 - 1 / B
    close([slope(0.0), slope(2.0)], [0.0964, -0.0855], atol=1e-4, swapped=[-0.0855, 0.0964])
    found, error = estimate(x, group_advantages(r, number, weight), weight)
    accepts(within(factor * slope(0.0), error), found, published=factor * slope(2.0))
    found, error = estimate(x - 2.0, group_advantages(r, number, torch.ones_like(r)))
    accepts(within(factor * slope(2.0), error), found, weighted=factor * slope(0.0))


def _between(low, value, high):
    assert low < value < high, (low, value, high)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_rule_is_the_gradient_times_one_and_the_share_of_dead_groups(shift):
    """(1 + P0) (1 - 1/B) of it: dead groups drawn again, by the policy (shift 0) or with a hint. Twins: no weight, one."""
    x, r, number, _ = groups(200_000, seed=1)
    again, new, _, log_weight = groups(200_000, shift, seed=2)
    gone = dead(r, number)
    close(gone.double().mean(), EMPTY + stats.norm.sf(TAU) ** B, atol=0.003, alive=1 - EMPTY)
    x, r, weight = (torch.where(gone, *pair) for pair in ((again, x), (new, r), (log_weight.exp(), torch.ones_like(r))))
    found, error = estimate(x, group_advantages(r, number, weight), weight)
    unweighted, _ = estimate(x, group_advantages(r, number, torch.ones_like(r)))
    truth = (1 + EMPTY) * (1 - 1 / B) * TRUE
    accepts(within(truth, error), found, once=truth / (1 + EMPTY), **({"none": unweighted} if shift else {}))


def test_dead_groups_are_those_whose_rewards_differ_by_rounding():
    """Twins: all that are zero, of the whole batch at once."""
    rewards = torch.tensor([1.0, 1.0 + 1e-7, 0.0, 0.0, 0.0, 1.0, 1e6, 1e6 + 0.05])
    number = torch.tensor([4, 4, 2, 2, 9, 9, 0, 0])
    truth = [True, True, True, True, False, False, True, True]
    same(dead(rewards, number).tolist(), truth, zeros=(rewards == 0).tolist(), whole=[False] * 8)
    mixed = torch.tensor([0, 1, 0, 1])  # a group need not stand together
    same(dead(torch.tensor([1.0, 0.0, 1.0, 2.0]), mixed).tolist(), [True, False, True, False], neighbours=[False] * 4)


# Paths
