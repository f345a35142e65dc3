"""Truth: enumeration of numbers that the design of tokens rests on: look-aheads, orders, inconsistent references."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from token_laws import Exact, enumerated, even_chance, first, model_of, potts, reward_of, sequences
from twins import close, f64

import scoreaction as sa
from scoreaction.algorithms._setting import Objective, Setting
from scoreaction.algorithms._tokens import token_advantage
from scoreaction.algorithms.ddpp import residual
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.reveals import position_kl
from scoreaction.diffusion.sequences import PolicyLaw, total_variation
from scoreaction.diffusion.solvers import SOLVERS
from scoreaction.sampling.look_ahead import soft_mean
from scoreaction.types import Tokens
from scoreaction.world import ALONE

BETA = 0.5


def one(tensor):
    return torch.zeros((), dtype=torch.float64) + tensor


@pytest.mark.long
def test_look_aheads_and_how_far_they_lead():
    """The law of an exact sampler guided by each: TV .0116 of the soft mean, .0466 of the mean, .2289 of the surest one."""
    rng, x = np.random.default_rng(1), sequences(6, 3)
    law = potts(rng, 6, 3, pair=0.8)
    rewards = 0.8 * (x[:, 0] == x[:, 2]) + 0.6 * (x[:, 3] == 1) - 0.5 * (x[:, 1] == x[:, 3]) + 0.7 * (x[:, 4] == x[:, 5])
    exact = enumerated(law, 6)
    space, reward = exact.space, reward_of(rewards, 3)
    best, model = exact.optimum(reward, BETA), model_of(exact)
    base, rows = exact.log_conditionals(space.states), torch.arange(len(space.states))
    masked, count = space.masked, space.masked.sum(1, keepdim=True).clamp(min=1)

    def distance(draws, beta):
        guesses = model.guesses(len(rows), draws, RowNoise(0, rows))(rows, space.states, Tokens(base, base.amax(-1)))
        value = soft_mean(reward(guesses.flatten(0, 1), None).unflatten(0, (len(rows), -1)), beta)
        after = torch.where(masked[..., None], space.filled(rows), 0)
        joint = (base.exp() / count[..., None]) * torch.exp(value[after] / BETA) * masked[..., None]  # positions are tilted too
        joint = joint / joint.sum((1, 2), keepdim=True)
        chance = joint.sum(2)
        found = PolicyLaw.of(space, (joint / chance[..., None].clamp(min=1e-300)).clamp(min=1e-300).log(), base, chance)
        return total_variation(found.law, best.law.law)

    soft, mean, surest = distance(256, BETA), distance(256, math.inf), distance(None, BETA)
    close(soft, 0.0116, atol=0.006, mean=mean, surest=surest, base=total_variation(exact.law, best.law.law))
    close(mean, 0.0466, atol=0.006, soft=soft)
    close(surest, 0.2289, atol=1e-3, soft=soft)


def test_by_its_own_confidence_a_policy_takes_paths_that_the_reference_cannot():
    """Of the optimum of the first law all paths: its KL would be infinite. Twin: the order of the reference, none."""
    law, rewards = first()
    exact = enumerated(law, 4)
    space, best = exact.space, exact.optimum(reward_of(rewards, 3), BETA)
    policy, reference = best.law.log_conditionals(space.states), exact.log_conditionals(space.states)

    def impossible(confidence):
        end = one(0.0)
        chances = [
            SOLVERS["confident"].step(sa.Masking(3), None, Tokens(policy, c), space.states, end, end, 1.0, None).chance
            for c in (confidence, reference.amax(-1))
        ]
        possible = space.visits(policy, chances[0] * chances[1])[~space.masked.any(1)]
        return 1 - float(possible.sum())

    close(impossible(policy.amax(-1)), 1.0, atol=1e-9, by_the_reference=impossible(reference.amax(-1)))
    close(impossible(reference.amax(-1)), 0.0, atol=1e-9, own=impossible(policy.amax(-1)))


def test_an_inconsistent_reference_has_another_optimum():
    """Logits moved by N(0, .5^2): in a fixed order the optimum of J is not the tilted law, and J falls short of beta log Z."""
    law, rewards = first()
    exact = enumerated(law, 4)
    space, values = exact.space, f64(rewards)
    noise = torch.randn(*exact.log_conditionals(space.states).shape, generator=torch.Generator().manual_seed(0))

    def optimum(scale):
        """The best policy in random order by the recursion `V = mean over i of beta log sum_v p_i exp(V/beta)`."""
        p = torch.log_softmax(exact.log_conditionals(space.states) + scale * noise, -1)
        value, policy = torch.zeros(len(space.states), dtype=torch.float64), p.clone()
        value[~space.masked.any(1)] = values
        for masks in range(1, 5):
            here = (space.masked.sum(1) == masks).nonzero().flatten()
            after = torch.where(space.masked[here][..., None], space.filled(here), 0)
            tilted = p[here] + value[after] / BETA
            policy[here] = torch.log_softmax(tilted, -1)
            value[here] = BETA * (torch.logsumexp(tilted, -1) * space.masked[here]).sum(1) / masks
        chance = even_chance(space)
        own, found = PolicyLaw.of(space, p, p, chance).law, PolicyLaw.of(space, policy, p, chance)
        tilt = own * torch.exp(values / BETA)
        objective = float(found.law @ values) - BETA * found.kl_nats
        return (
            total_variation(found.law, tilt / tilt.sum()),
            BETA * float(tilt.sum().log()) - objective,
            objective - float(value[-1]),
        )

    away, short, error = optimum(0.5)
    assert 0.01 < away < 0.05
    assert 0.003 < short < 0.03
    close(error, 0.0, atol=1e-9, short=short)
    close(optimum(0.0)[:2], [0.0, 0.0], atol=1e-9, inconsistent=[away, short])


@cache
def fully_masked():
    """The law and reward of DDPP's rows: log p of the product at all masks, and rewards over beta."""
    rng, x = np.random.default_rng(2), sequences(5, 3)
    law = potts(rng, 5, 3, pair=0.8)
    additive = 0.5 * rng.standard_normal((5, 3))[np.arange(5), x].sum(1)
    rewards = additive + 0.8 * (x[:, 0] == x[:, 2]) - 0.5 * (x[:, 1] == x[:, 3]) + 0.7 * (x[:, 3] == x[:, 4])
    exact = enumerated(law, 5)
    alone = exact.log_conditionals(torch.full((1, 5), 3))[0]
    product = alone[torch.arange(5), exact.space.sequences].sum(1)
    return torch.tensor(law), f64(rewards) / BETA, product


def test_the_lower_bound_is_one_on_policy_only():
    """At all masks and q = p the constant that minimises the loss is `E r/beta`: 1.546 on policy, 5.506 with x0 of the optimum.

    log Z is 4.167. Twins: each other.
    """
    law, gain, product = fully_masked()
    tilted = law * torch.exp(gain)
    log_z = float(torch.logsumexp(product + gain, 0))
    close(log_z, 4.167, atol=1e-3, of_the_law=float(tilted.sum().log()))

    def constant(weights):
        """The minimum over log Z of the mean square, found by its derivative, which is linear."""
        at = [float(weights @ residual(torch.zeros_like(gain), BETA * gain, f64(c), BETA)) for c in (0.0, 1.0)]
        return -at[0] / (at[1] - at[0])

    on, off = constant(product.exp()), constant(tilted / tilted.sum())
    close(on, 1.546, atol=1e-3, off=off)
    close(off, 5.506, atol=1e-3, on=on)
    assert on < log_z < off


def test_log_z_of_few_candidates_is_too_low():
    """`log mean_j exp(r/beta)` of M draws of the product misses log Z by 1.25, .52, .16, .04 nats at M = 4, 16, 64, 256."""
    _, gain, product = fully_masked()
    log_z = float(torch.logsumexp(product + gain, 0))
    generator, found = torch.Generator().manual_seed(0), []
    for m in (4, 16, 64, 256):
        drawn = torch.multinomial(product.exp().expand(2**19 // m, -1), m, replacement=True, generator=generator)
        found.append(log_z - float(soft_mean(gain[drawn], 1.0).mean()))
    close(found, [1.25, 0.52, 0.16, 0.04], atol=0.03, none=[0.0] * 4)


def test_few_of_the_weights_count_at_a_small_beta():
    """The effective share of exp(r/beta) under p: .039, .385 and .006 at beta .5, 1 and .25."""
    law, gain, _ = fully_masked()
    shares = [float((law @ torch.exp(s * gain)) ** 2 / (law @ torch.exp(2 * s * gain))) for s in (1.0, 0.5, 2.0)]
    close(shares, [0.039, 0.385, 0.006], atol=1e-3, reversed=shares[::-1])


@pytest.mark.slow
def test_the_spread_of_one_trajectorys_gradient():
    """sd/|mean| along a direction: REINFORCE with a baseline 17, expected over tokens 5.6, over positions as well 3.7.

    The expectations are derivatives of `token_advantage`; all have the mean of the exact gradient.
    """
    rng, x = np.random.default_rng(1), sequences(4, 3)
    law = potts(rng, 4, 3)
    rewards = f64(0.8 * (x[:, 0] == x[:, 2]) + 0.6 * (x[:, 3] == 1) - 0.5 * (x[:, 1] == x[:, 3]))
    net = Exact(enumerated(law, 4))
    space, base = net.law.space, net.law.log_conditionals(net.law.space.states)
    g = torch.Generator().manual_seed(0)
    old = 0.4 * torch.randn(*base.shape, generator=g, dtype=torch.float64)
    torch.randn(*base.shape, generator=g, dtype=torch.float64)
    direction = torch.randn(*base.shape, generator=g, dtype=torch.float64)
    direction /= direction.norm()
    log_p = torch.log_softmax(base + old, -1)
    masked, rows = space.masked, torch.arange(len(space.states))
    after = torch.where(masked[..., None], space.filled(rows), 0)
    chance = even_chance(space)
    value = torch.zeros(len(rows), dtype=torch.float64)
    value[~masked.any(1)] = rewards
    for masks in range(1, 5):
        here = (masked.sum(1) == masks).nonzero().flatten()
        gain = (log_p.exp() * value[after]).sum(-1) - BETA * position_kl(log_p, base)
        value[here] = (gain * chance)[here].sum(1)
    gain = value[after] - value[:, None, None]
    _, slope = torch.func.jvp(
        lambda change: token_advantage(torch.log_softmax(base + old + change, -1), gain=gain, pretrained=base, beta=BETA),
        (torch.zeros_like(old),),
        (direction,),
    )
    score = direction - (log_p.exp() * direction).sum(-1, keepdim=True)
    visits = space.visits(log_p, chance)
    truth = float((visits[:, None] * chance * slope).sum())
    n, state = 100_000, torch.full((100_000,), len(rows) - 1)
    sums = {name: torch.zeros(n, dtype=torch.float64) for name in ("score", "cost", "tokens", "both")}
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        place = torch.multinomial(chance[state], 1, generator=generator)[:, 0]
        token = torch.multinomial(log_p[state, place].exp(), 1, generator=generator)[:, 0]
        sums["score"] += score[state, place, token]
        sums["cost"] += BETA * (log_p - base)[state, place, token]
        sums["tokens"] += slope[state, place]
        sums["both"] += (chance * slope)[state].sum(1)
        state = after[state, place, token]
    returns = value[state] - sums["cost"]
    estimates = {"reinforce": sums["score"] * (returns - returns.mean()), "tokens": sums["tokens"], "both": sums["both"]}
    spread = {name: float(e.std()) / abs(truth) for name, e in estimates.items()}
    for estimate in estimates.values():
        close(estimate.mean(), truth, atol=4 * float(estimate.std()) / n**0.5, sign=-truth)
    close([spread["tokens"], spread["both"]], [5.6, 3.7], atol=0.15, reinforce=[spread["reinforce"]] * 2)
    close(spread["reinforce"], 17.1, atol=1.0, tokens=spread["tokens"])


def test_a_step_that_shows_several_gains_the_sum_over_its_positions():
    """`sum_i chance_i (trust beta KL_old - A_i)` of each row. Twin: the mean over positions, as if one were shown."""
    law, reward = first()
    exact = enumerated(law, 4)
    made, space = model_of(exact), exact.space
    with torch.no_grad():
        made.net.change.copy_(0.5 * torch.randn(made.net.change.shape, generator=torch.Generator().manual_seed(0)))
    sampler = sa.Sampler(solver="ancestral", steps=3, grid="uniform")
    objective = Objective(reward_of(reward, 3), False)
    found = sa.ScoreAction(beta=BETA).build_on_tokens(Setting(made, sampler, objective, 8, None))
    value = torch.randn(len(space.states), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.critic.forward = lambda x, t, prompt: value[space.numbers(x)]
    times, prompt = sampler.times(made.process), torch.zeros(8, dtype=torch.long)
    rollout = found.prepare(found.explore(prompt, times, RowNoise(2, torch.arange(8))), torch.Generator())
    steps = rollout.steps()
    old = steps.old._replace(log_prob=steps.pretrained.log_prob)  # another policy took them
    steps = steps._replace(old=old)
    rows, fine = ALONE.rows(len(steps.t)), (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    (term,) = found._improvement(steps, rows, fine.expand(len(steps.t), -1)).terms
    loss = term.loss(torch.arange(len(steps.t)))[0].detach()

    here, base = made.predict(steps.x, steps.t).log_prob.double(), steps.pretrained.log_prob.double()
    gain = value[space.filled(space.numbers(steps.x))] - value[space.numbers(steps.x)][:, None, None]
    masked = (steps.x == 3).double()
    each = masked * (1 + found.state.trust) * BETA * position_kl(here, base) - masked * (here.exp() * gain).sum(2)
    chance = (1 - steps.s / steps.t)[:, None]  # of the linear schedule
    truth = 3 * (chance * each).sum(1)
    close(loss, truth, atol=0.02, rtol=1e-3, as_if_one=3 * each.sum(1) / masked.sum(1).clamp(min=1))
