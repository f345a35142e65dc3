"""Truth: REINFORCE's closed form on the linear-quadratic chain, ratios of a policy with itself, standardising by hand."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from affine import BETA, LAW, OLD, REWARD, model, none, setting
from driving import each, evaluated, total
from torch import nn
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms import Update
from scoreaction.algorithms._baselines import group_advantages, prompt_advantages
from scoreaction.algorithms._likelihood_ratio import (
    clipped_surrogate,
    minibatches,
    ratio_term,
    spread_is_rounding,
    standardised,
    step_kl,
    steps_with_density,
    transition,
)
from scoreaction.diffusion.predictions import expand
from scoreaction.networks.layers import VectorNet
from scoreaction.world import ALONE

VP = sa.VP()


def collected(found, batch, seed=0, reward=REWARD):
    generator = torch.Generator().manual_seed(seed)
    rollout = found.explore(none(batch), found.times(generator), generator)
    return found.prepare(replace(rollout, rewards=reward(rollout.x0)), generator)


def mean_reward(parameters, steps, *, last_acts=False, skip=()):
    """E r of the affine policy's DDIM chain at eta 1 by exact moments; the reference acts in the last step; differentiable."""
    times, (th0, th1) = sa.Sampler(steps=steps).times(VP), parameters
    mean, variance = f64(0.0), f64(VP.prior_std**2)
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        a_t, a_s, v_t, v_s = VP.alpha(t), VP.alpha(s), VP.sigma2(t), VP.sigma2(s)
        k2 = v_s / v_t * (v_t - (a_t / a_s) ** 2 * v_s)
        acts = (i < steps - 1 or last_acts) and i not in skip
        probe = f64([[0.0], [1.0]])
        said = LAW.prediction(VP, probe, t)
        move = (th0 * a_t * probe + th1) if acts else 0 * probe
        x0, eps = said.x0 + v_t * move, said.eps - a_t * v_t.sqrt() * move
        step = (a_s * x0 + (v_s - k2).clamp(min=0).sqrt() * eps)[:, 0]
        A, b = step[1] - step[0], step[0]
        mean, variance = A * mean + b, A**2 * variance + k2
    return -(variance + (mean - 1) ** 2) / 2 + 0.2 * mean


def slope(steps, **options):
    th = f64(OLD).requires_grad_()
    return torch.autograd.grad(mean_reward(th, steps, **options), th)[0]


def test_the_chains_mean_reward_is_what_the_closed_form_says():
    found = sa.DDPO().build(setting(model(VP), steps=12, batch=20_000))
    rewards = collected(found, 20_000).rewards
    error = 3 * float(rewards.std()) / math.sqrt(20_000)
    close(rewards.mean(), mean_reward(f64(OLD), 12), atol=error, new_policy=mean_reward(f64([-0.6, 0.9]), 12))


@pytest.mark.slow
def test_reinforce_is_the_policy_gradient_of_the_chain():
    """`E r sum_steps d log p` of the run's own losses against the derivative of the closed form, in standard errors."""
    steps, batch = 12, 20_000
    made = model(VP)
    config = sa.DDPO(estimator="reinforce", baseline="batch", advantage_clip=100.0)
    found = config.build(setting(made, steps=steps, batch=batch))
    draws = []
    for seed in range(6):
        experience = collected(found, batch, seed)
        made.parameters["th"].grad = None
        updates = list(found.updates(experience, torch.Generator().manual_seed(0)))
        assert len(updates) == 1
        total(updates[0]).backward()
        draws.append(-made.parameters["th"].grad * experience.rewards.std(correction=0))  # back in reward units
    draws = torch.stack(draws).double()
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(6)
    truth = slope(steps)

    def check(value):
        assert bool(((value - truth).abs() < 4 * error).all()), (value, truth, error)

    missing = mean * (slope(steps, skip=(steps - 4,)) / truth)
    wrong = {"sign": -mean, "missing_step": missing, "mean_over_steps": mean / (steps - 1), "unstandardised_twice": mean * 0.8}
    accepts(check, mean, **wrong)
    assert float((slope(steps, last_acts=True) - truth).abs().max()) > 0  # the reference acts in the last step


class Wide(nn.Module):
    """The exact prediction plus a perceptron, so that batches of other shapes may round differently."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = VectorNet(VP, 1, 1)

    def forward(self, x, t, cond):
        exact = LAW.prediction(VP, x.float(), t.double())
        return exact.eps.to(x) + expand(VP.sigma(t.double()), x) * self.net(x, t)


def first_log_ratio(batch, minibatches, *, autocast=None, steps=6, moved=0.0):
    made = sa.Model(Wide(), process=VP, predicts="eps", shape=(1,))
    if autocast:
        made.autocast = lambda: torch.autocast("cpu", dtype=autocast)
    found = sa.DDPO(minibatches=minibatches).build(setting(made, steps=steps, batch=batch))
    experience = collected(found, batch)
    if moved:
        with torch.no_grad():
            next(iter(made.parameters.values())).add_(moved)
    return next(each(found.updates(experience, torch.Generator().manual_seed(0))))[2]["log_ratio_first"]


def test_the_first_pass_has_ratio_one():
    """A policy against itself: exactly 0 where batches have equal shapes, rounding where not."""
    close(first_log_ratio(64, 5), 0.0, atol=0.0, moved=first_log_ratio(64, 5, moved=1e-3))
    close(first_log_ratio(64, 1), 0.0, atol=2e-4, moved=first_log_ratio(64, 1, moved=1e-2))


def test_the_first_pass_in_bfloat16():
    equal = first_log_ratio(64, 5, autocast=torch.bfloat16)
    close(equal, 0.0, atol=1e-3, moved=first_log_ratio(64, 5, autocast=torch.bfloat16, moved=0.1))


def test_the_clip_cuts_where_the_ratio_leaves_and_only_in_the_advantages_direction():
    log_ratio = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5]).requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    loss = clipped_surrogate(log_ratio, advantage, 0.2)
    e = math.exp(0.5)
    close(loss.detach(), [-1.0, -1.2, e, -1 / e, 0.8], unclipped=(-log_ratio.exp() * advantage).detach(), atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), log_ratio)
    close(grad, [-1.0, 0.0, e, -1 / e, 0.0], atol=1e-6, clipped_both_ways=[-1.0, 0.0, 0.0, 0.0, 0.0])
    plain = clipped_surrogate(log_ratio, advantage, None)
    close(plain.detach(), (-log_ratio.exp() * advantage).detach(), clipped=loss.detach())


def test_epochs_and_minibatches_cover_every_step_once():
    """The minibatches' losses at the old policy add up to the whole; each trajectory weighs the same."""
    made = model(VP)
    found = sa.DDPO(minibatches=4).build(setting(made, steps=9, batch=40))
    experience = collected(found, 40)
    steps = steps_with_density(found, experience)
    assert len(steps.s) == 8 * 40  # the last step has no density
    advantage = torch.randn(320, generator=torch.Generator().manual_seed(0))

    def gradient(**options):
        grads = []
        for rows in minibatches(ALONE, 8, 40, generator=torch.Generator(), **options):
            law, outcome = partial(transition, found), steps.x_next
            term = ratio_term(found, steps, rows, advantage, law=law, outcome=outcome, clip=None, first=False)
            loss = evaluated(Update("policy", [term]))[0]
            grads.append(torch.autograd.grad(loss, made.parameters["th"])[0])
        return torch.stack(grads)

    whole, parts = gradient(epochs=1, count=1)[0], gradient(epochs=2, count=4)
    assert len(parts) == 8
    close(parts[:4].mean(0), whole, rtol=1e-3, atol=1e-4, summed=parts[:4].sum(0))
    close(parts[4:].mean(0), whole, rtol=1e-3, atol=1e-4, first_part=parts[0])


def test_steps_are_the_rollouts_own():
    made = model(VP)
    found = sa.DDPO().build(setting(made, steps=4, batch=3))
    experience = collected(found, 3)
    steps = steps_with_density(found, experience)
    row = 2 * 3 + 1  # step 2, trajectory 1
    assert (int(steps.step[row]), int(steps.path[row]), float(steps.weight[row])) == (2, 1, 3.0)
    assert torch.equal(steps.x[row], experience.x[2, 1])
    assert (float(steps.t[row]), float(steps.s[row])) == (float(experience.times[2]), float(experience.times[3]))

    def check(outcome):
        assert torch.equal(outcome, experience.x[3, 1])

    accepts(check, steps.x_next[row], state_before=steps.x[row], final=experience.x0[1])


def test_the_reference_acts_in_the_last_noiseless_step():
    made = model(VP)
    found = sa.DDPO().build(setting(made, steps=5, batch=16))
    rollout = collected(found, 16)
    with torch.no_grad():
        last = [f(rollout.x[4], rollout.times[4]).x0 for f in (made.reference, made.predict)]
        first = made.predict(rollout.x[0], rollout.times[0]).x0
    close(rollout.old.x0[4], last[0], atol=1e-6, policy=last[1])
    close(rollout.old.x0[0], first, atol=1e-6, reference=made.reference(rollout.x[0], rollout.times[0]).x0)
    exploding = sa.Model(model(VP).net, process=sa.VE(), predicts="v", shape=(1,))  # sigma_0 > 0: every step has noise
    noisy = sa.DDPO().build(setting(exploding, steps=5))
    assert int(steps_with_density(noisy, collected(noisy, 2)).step.max()) == 4


def test_advantages_are_standardised():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    whole = (rewards - rewards.mean()) / rewards.std(correction=0)
    close(standardised(rewards), whole, unbiased=(rewards - rewards.mean()) / rewards.std(), raw=rewards)
    s, h = math.sqrt(1.5), math.sqrt(2) / 2
    close(standardised(rewards, groups), [-s, 0, s, -h, -h, 2 * h], atol=1e-5, whole_batch=whole)


@pytest.mark.parametrize("level", [0.0, 1.0, -123.456, 3e6])
def test_rewards_that_differ_by_rounding_have_no_advantage(level):
    rewards = torch.full((64,), level)
    rewards[::2] *= 1 + 1e-7
    noisy = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    assert spread_is_rounding(rewards)
    wrong = {} if level == 0 else {"divided_by_std_plus_1e_8": float(noisy.abs().max())}
    for advantage in (
        standardised(rewards),
        standardised(rewards, torch.arange(64) % 2),
        prompt_advantages({}, rewards, torch.arange(64) % 2),
    ):
        close(float(advantage.abs().max()), 0.0, atol=0, rtol=0, **wrong)
    assert not spread_is_rounding(torch.tensor([level, level + 1 + 0.01 * abs(level)]))


def test_prompts_keep_their_own_running_statistics():
    """A prompt that always pays 10 has no advantage in paying 10, once it is known; before, the batch decides."""
    known, generator = {}, torch.Generator().manual_seed(0)
    groups = torch.tensor([0] * 8 + [1] * 8)
    level = torch.where(groups == 0, 0.0, 10.0)
    batches = [level + torch.randn(16, generator=generator) for _ in range(12)]
    first = prompt_advantages(known, batches[0], groups)
    close(first, standardised(batches[0]), atol=1e-6, own=standardised(batches[0], groups))
    for rewards in batches[1:]:
        last = prompt_advantages(known, rewards, groups)
    assert {key: len(kept) for key, kept in known.items()} == {"0": 64, "1": 64}  # the last 64 only
    mine = torch.cat([rewards[8:] for rewards in batches[-8:]])
    truth = (batches[-1][8:] - mine.mean()) / mine.std(correction=0)
    close(last[8:], truth, atol=1e-5, batch=standardised(batches[-1])[8:], all_history=truth + 0.1)


@pytest.mark.parametrize(("baseline", "each"), [("batch", -1.0), ("group", 0.0)])
def test_baselines_of_a_learner(baseline, each):
    found = sa.DDPO(baseline=baseline, advantage_clip=0.5).build(setting(model(VP), steps=3, batch=4))
    rewards, groups = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])
    advantage = found.advantages(rewards, groups)
    close(advantage[0], max(each, -0.5), other=-0.5 if each == 0 else 0.0)
    assert float(advantage.abs().max()) <= 0.5


@pytest.mark.parametrize("algorithm", [sa.DDPO(), sa.DDPO(baseline="group"), sa.DPOK()], ids=["prompt", "group", "dpok"])
def test_equal_rewards_are_a_logged_skip(algorithm):
    made = model(VP)
    tuner = sa.Finetuner(
        made,
        reward=lambda x, c: torch.full((len(x),), 3.0),
        algorithm=algorithm,
        sampler=sa.Sampler(steps=4),
        train=sa.Train(iterations=2, batch=8, device="cpu"),
    )
    before = made.parameters["th"].detach().clone()
    logged = list(tuner)
    assert [metrics["skipped"] for metrics in logged] == [1.0, 1.0]
    assert torch.equal(before, made.parameters["th"])


def test_dpok_pays_beta_per_nat_in_reward_units():
    """Advantages are divided by the rewards' std, and so is beta; the penalty is the KL of the steps that were taken."""
    made = model(VP)
    options = {"baseline": "batch", "minibatches": 1, "clip": 10.0, "advantage_clip": 1e6}
    found = sa.DPOK(beta=BETA, **options).build(setting(made, steps=6, batch=500))
    plain = sa.DDPO(**options).build(setting(made, steps=6, batch=500))
    experience = collected(found, 500)
    with_kl, without = (next(each(f.updates(experience, torch.Generator())))[1] for f in (found, plain))
    steps = steps_with_density(found, experience)
    said = made.predict(steps.x, steps.t)
    kl = step_kl(found, said, steps).sum() / 500
    without = without * 500 / 499  # beside a KL, of which the mean of the batch takes no part away
    paid, std = float((with_kl - without).detach()), float(experience.rewards.std(correction=0))
    close(paid * std, BETA * float(kl.detach()), rtol=1e-3, atol=0, not_scaled=paid, mean_over_steps=paid * std / 5)
    assert found.reference_rows is None


@pytest.mark.parametrize("size", [2, 5])
def test_beta_is_worth_the_same_in_groups_of_any_size(size):
    """Truth: r = x of x ~ N(theta, 1), whose gradient is 1, the weight of the KL's. Twin: centring alone, `1 - 1/B` of it."""
    found = sa.DPOK(beta=BETA, baseline="group").build(setting(model(VP), steps=3, batch=20_000 * size)._replace(group=size))
    x = torch.randn(20_000 * size, generator=torch.Generator().manual_seed(size), dtype=F64)
    prompt = torch.arange(20_000).repeat_interleave(size)

    def slope(advantage):
        return float((advantage * x).mean() * x.std(correction=0))

    centred = group_advantages(x, prompt, torch.ones_like(x)) / x.std(correction=0)
    close(slope(found.advantages(x, prompt)), 1.0, atol=0.03, centred=slope(centred))


@pytest.mark.parametrize(("baseline", "known"), [("batch", 4), ("prompt", 16)])
def test_beta_is_worth_the_same_with_the_mean_of_a_batch_or_of_a_prompts_last_rewards(baseline, known):
    """As in groups: r = x of N(0, 1), batches of 4, twelve rewards known before. Twin: a mean with the own one."""
    found = sa.DPOK(beta=BETA, baseline=baseline, advantage_clip=1e6).build(setting(model(VP), steps=3, batch=4))
    x = torch.randn(6000, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    past = torch.randn(6000, 12, generator=torch.Generator().manual_seed(1), dtype=F64)
    slopes = []
    for rewards, before in zip(x, past, strict=True):
        found.state.prompt_rewards = {"0": before.tolist()}
        slopes.append(float((found.advantages(rewards, none(4)) * rewards).mean() * rewards.std(correction=0)))
    slope = sum(slopes) / 6000
    close(slope, 1.0, atol=0.03, with_own=slope * (1 - 1 / known))


def test_a_reward_that_its_mean_has_forgotten_keeps_its_gradient():
    """Of 100 samples of a prompt the mean has the last 64. Twin: all of them given 64/63."""
    found = sa.DPOK(beta=BETA, advantage_clip=1e6).build(setting(model(VP), steps=3, batch=100))
    rewards = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=F64)
    apart = (rewards - rewards[36:].mean()) / rewards.std(correction=0)
    factor = torch.cat([torch.ones(36), torch.full((64,), 64 / 63)]).double()
    close(found.advantages(rewards, none(100)), factor * apart, atol=1e-6, all_alike=64 / 63 * apart)


def test_dpok_compares_a_reward_with_the_others_of_its_group():
    """By hand; one that is alone has nothing to be compared with. Twin: a mean with the own one among them."""
    rewards, prompt = torch.tensor([1.0, 3.0, 10.0, 14.0, 2.0]), torch.tensor([0, 0, 1, 1, 2])
    found = sa.DPOK(beta=BETA, baseline="group").build(setting(model(VP), steps=3, batch=5)._replace(group=2))
    truth = (rewards - torch.tensor([3.0, 1.0, 14.0, 10.0, 2.0])) / rewards.std(correction=0)
    close(found.advantages(rewards, prompt), truth, atol=1e-6, with_own=truth / 2)


def test_dpok_pays_its_kl_where_no_group_says_anything():
    """One prompt is always right and one never. Truth: the KL's own gradient. Twin: nothing at all; DDPO has nothing to do."""
    made, prompt = model(VP), torch.tensor([0, 0, 1, 1])
    config = sa.DPOK(beta=BETA, baseline="group", minibatches=1)
    found = config.build(setting(made, steps=6, batch=4)._replace(group=2))
    rollout = replace(collected(found, 4, reward=lambda x0: torch.tensor([1.0, 1.0, 0.0, 0.0])), prompt=prompt)
    ((_, loss, _),) = list(each(found.updates(rollout, torch.Generator())))
    (slope,) = torch.autograd.grad(loss, made.parameters["th"])
    steps = steps_with_density(found, rollout)
    kl = step_kl(found, made.predict(steps.x, steps.t), steps).sum() / 4
    (truth,) = torch.autograd.grad(BETA * kl / 0.5, made.parameters["th"])  # 0.5 is the std of the rewards
    close(slope, truth, rtol=1e-4, atol=1e-7, nothing=0 * slope)
    alone = sa.DDPO(baseline="group").build(setting(made, steps=6, batch=4)._replace(group=2))
    assert list(each(alone.updates(rollout, torch.Generator()))) == []


def test_step_kl_is_that_of_two_gaussians():
    made = model(VP)
    found = sa.DPOK().build(setting(made, steps=4, batch=5, eta=0.5))
    steps = steps_with_density(found, collected(found, 5))
    kl = step_kl(found, steps.old, steps)
    t, s = steps.t, steps.s
    k2 = 0.25 * VP.sigma2(s) / VP.sigma2(t) * (VP.sigma2(t) - (VP.alpha(t) / VP.alpha(s)) ** 2 * VP.sigma2(s))
    gain = VP.alpha(s) - (VP.sigma2(s) - k2).sqrt() * VP.alpha(t) / VP.sigma(t)
    truth = gain**2 / (2 * k2) * (steps.old.x0 - steps.pretrained.x0)[:, 0].double() ** 2
    close(kl, truth, rtol=1e-3, atol=1e-6, without_half=2 * kl, eta_1=kl / 4)
    assert kl.dtype == torch.float32
    assert truth.dtype == F64


def test_what_a_density_needs_is_refused_with_a_remedy():
    made = model(VP)
    for config in (sa.DDPO(), sa.DPOK(), sa.ScoreAction(estimator="likelihood_ratio", exploration=0.0)):
        for solver, eta, message in (
            ("sde_dpmpp", 1.0, "use ddim or euler_maruyama"),
            ("heun", 0.0, "set"),
            ("dpmpp_2m", 0.0, "set"),
        ):
            with pytest.raises(ValueError, match=message):
                config.build(setting(made, eta=eta, solver=solver))
    for config in (sa.DDPO(), sa.DPOK(), sa.ScoreAction(estimator="likelihood_ratio")):
        with pytest.raises(ValueError, match=r"sampler\.steps: no step has a density.*at least 2"):
            config.build(setting(made, steps=1, batch=4))
        assert config.build(setting(made, steps=2, batch=4))


def test_dpok_learns_nothing_from_a_batch_of_equal_rewards_whatever_came_before():
    """Their distance to the past would be measured in units of their own rounding."""
    found = sa.DPOK(beta=BETA).build(setting(model(VP), steps=4, batch=16))
    mixed = collected(found, 16, reward=lambda x0: torch.linspace(0.2, 0.9, 16))
    for _ in range(2):
        spread = found.advantages(mixed.rewards, mixed.prompt)
    rollout = collected(found, 16, reward=lambda x0: torch.full((16,), 0.9) + 1e-8 * torch.arange(16))
    equal = found.advantages(rollout.rewards, rollout.prompt)
    close(equal, torch.zeros(16), atol=0, spread=spread, at_the_clip=torch.full((16,), 5.0))
