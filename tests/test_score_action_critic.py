"""Truth: the linear-quadratic case: the critic of Score as Action, its advantages, and what a run pays to stay near."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from affine import BETA, NEW, OLD, REWARD, ExactValue, experienced, learner, none, without_critic
from driving import each, evaluated, run
from twins import close, f64, same

import scoreaction as sa
from scoreaction.algorithms._likelihood_ratio import steps_with_density
from scoreaction.algorithms._score_action_ratio import calibrated
from scoreaction.algorithms._trust import adapt_trust
from scoreaction.algorithms._value import kl_to_go, running_cost
from scoreaction.diffusion.kl import path_kl_steps
from scoreaction.diffusion.solvers import time_grid
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Prediction

VP, FLOW = sa.VP(), sa.Flow()


@pytest.mark.long
def test_a_learned_value_reaches_the_closed_form():
    """The martingale loss with the package's critic, on exact pairs (x_t, x_0): V to 2 % of the rewards' spread.

    What is left is the noise of so few samples: under the exact score x_t is x_0 noised, without an error of steps.
    """
    exact = ExactValue(VP, 1.0, (0.0, 0.0))
    torch.manual_seed(0)
    found, made = learner(VP, 1.0, "pathwise", steps=20, batch=4096, parameters=(0.0, 0.0), updates=1, rows=10**6)
    generator = torch.Generator().manual_seed(0)
    times = time_grid(VP, 20, name="power")

    def pairs():
        x0 = 0.3 + math.sqrt(0.8) * torch.randn(4096, 1, generator=generator)
        noise = torch.randn(21, 4096, 1, generator=generator)
        x = VP.alpha(times)[:, None, None].float() * x0 + VP.sigma(times)[:, None, None].float() * noise
        with torch.no_grad():
            said = [made.predict(x[i], times[i]) for i in range(20)]
        old = Prediction(*(torch.stack(parts) for parts in zip(*said, strict=True)))
        raw = Rollout(times, x, old, old, none(4096), REWARD(x[-1]))
        found.config = found.config.model_copy(update={"rows": 40_960})
        prepared = found.prepare(raw, generator)
        found.config = found.config.model_copy(update={"rows": 2048})
        return prepared

    def error(experience):
        states = take(experience.steps().states, experience.chosen.own)
        truth = exact.value(states.x, states.t)
        with torch.no_grad():
            apart = critic(*states, experience.look) - truth
        return float(apart.square().mean().sqrt() / experience.rewards.std())

    critic = found.value.critic
    optimiser, probe = torch.optim.Adam(critic.parameters()), pairs()
    before, rounds = error(probe), 24
    for turn in range(rounds):
        optimiser.param_groups[0]["lr"] = 4e-3 * (0.01 + 0.5 * (1 + math.cos(math.pi * turn / rounds)))
        for _, value, _ in each(found.value.updates(pairs(), critic=25, generator=generator)):
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
    close(error(probe), 0.0, atol=0.02, untrained=before)


def test_the_critics_loss_is_the_martingale_loss():
    found, _ = learner(VP, 1.0, "pathwise", steps=10, batch=64, updates=2, rows=300, critic_updates=3)
    experience = experienced(found, 64, torch.Generator().manual_seed(0))
    updates = list(found.value.updates(experience, critic=3, generator=torch.Generator().manual_seed(7)))
    assert [u.network for u in updates] == ["critic"] * 3
    rows = torch.randint(600, (75,), generator=torch.Generator().manual_seed(7))  # an eighth of the chosen points
    said = found.value.critic(*take(experience.steps().states, experience.chosen.own), experience.look)
    squares = ((said - experience.target) / experience.rewards.std(correction=0)).square()[rows]
    close(
        evaluated(updates[0])[0].detach(),
        squares.mean().detach(),
        rtol=1e-4,
        in_reward_units=experience.rewards.var() * squares.mean().detach(),
    )


@pytest.mark.slow
def test_lambda_returns():
    """lambda 1 telescopes to `r - beta cost to go - V(x_t)`, lambda 0 is one step's gain, V calibrated on the targets."""
    exact = ExactValue(VP, 1.0, NEW)
    found, _ = learner(VP, 1.0, "likelihood_ratio", steps=50, batch=2000, parameters=NEW, exact=exact, gae_lambda=1.0)
    experience = experienced(found, 2000, torch.Generator().manual_seed(0))
    points = experience.steps()
    target = experience.rewards[None] - BETA * kl_to_go(VP, 1.0, experience)
    value = calibrated(exact.value(points.x, points.t).reshape(50, 2000), target)
    telescoped = target - value
    advantage = found.advantages(experience).reshape(50, 2000)
    wrong = {
        "no_cost": advantage + BETA * kl_to_go(VP, 1.0, experience),
        "sign": -advantage,
        "shifted": advantage.roll(1, 0),
    }
    close(advantage, telescoped, atol=2e-4, **wrong)
    found.config = found.config._replace(gae_lambda=0.0)
    one = found.advantages(experience).reshape(50, 2000)
    after = torch.cat([value[1:], experience.rewards[None]])
    close(one, after - value - BETA * running_cost(VP, 1.0, experience), atol=1e-4, telescoped=telescoped)
    found.config = found.config._replace(gae_lambda=0.5)
    half = found.advantages(experience).reshape(50, 2000)
    close(half[-2], one[-2] + 0.5 * one[-1], atol=1e-5, forward=one[-2] + 0.5 * one[-3])


def test_a_value_is_believed_as_far_as_it_explains_the_targets():
    """Truth: the exact value is nearly left alone, one of another policy's state is left out; numpy's regression between."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 4000, generator=generator)
    noise = torch.randn(3, 4000, generator=generator)
    target = 2.0 + value + noise
    close(calibrated(value, target), 2.0 + value, atol=0.25, mean=target.mean(1, keepdim=True).expand_as(value))
    close(calibrated(noise + 7, 2.0 + value), torch.full_like(value, 2.0), atol=0.25, believed=2.0 + noise)
    blurred = (value + noise - (value + noise).mean(1, keepdim=True)).flatten()
    slope, _ = np.polyfit(blurred.numpy(), (value - value.mean(1, keepdim=True)).flatten().numpy(), 1)
    truth = 2.0 + value.mean(1, keepdim=True) + slope * blurred.reshape(3, 4000)
    close(calibrated(value + noise, 2.0 + value), truth, atol=1e-3, whole=2.0 + value + noise)


@pytest.mark.slow
def test_advantages_are_of_a_critic_that_has_not_seen_the_batch():
    """Truth: the critic as it was when the iteration began; the twin is the critic after it."""
    found, _ = learner(VP, 1.0, "likelihood_ratio", steps=8, batch=64, updates=1, critic_updates=64)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(found.networks["critic"].parameters(), lr=1e-2)
    of, used = found.advantages, []
    found.advantages = lambda rollout: used.append(of(rollout)) or used[-1]
    for _ in range(2):
        experience = experienced(found, 64, generator)
        before = of(experience)
        for update, value, _ in each(found.updates(experience, generator)):
            if update.network == "critic":
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
    close(used[-1], before, atol=1e-6, after=of(experience))


@pytest.mark.slow
def test_the_step_without_a_ratio_pays_its_kl():
    """Truth: the path KL of the last step, which has no density."""
    found, made = learner(VP, 1.0, "likelihood_ratio", steps=8, batch=64, updates=3)
    generator = torch.Generator().manual_seed(0)
    experience = experienced(found, 64, generator)
    times = experience.times
    kl = path_kl_steps(made.process, times, experience.difference(), 1.0).mean(1)
    truth = float(kl[-1])
    assert float(steps_with_density(found, experience).t.min()) == float(times[-3])
    policy_updates = [update for update, _, _ in run(found.updates(experience, generator)) if update.network == "policy"]
    assert [len(update.terms) for update in policy_updates] == [2] * 3, "each minibatch has a part of what is held"
    held = [float(evaluated(update._replace(terms=update.terms[1:]))[0].detach()) for update in policy_updates]
    wrong = {"whole_path": float(kl.sum()), "nothing": 0.0, "summed": sum(held) / BETA}
    close(sum(held) / 3 / BETA, truth, atol=0.1 * truth, **wrong)


def test_the_trust_region_adapts_its_penalty():
    found, _ = learner(VP, 1.0, "pathwise", steps=5, batch=8, trust=5.0, trust_region=0.1)

    def run(moves):
        found.state.trust = 5.0
        for kl in moves:
            adapt_trust(found.state, kl, least=found.config.trust, region=found.config.trust_region)
        return found.state.trust

    close([run([0.2]), run([0.2] * 3), run([0.05]), run([0.2, 0.05])], [10.0, 40.0, 5.0, 9.0], never=[5.0] * 4)
    assert found.state.kl_to_old == 0.05


def test_the_trust_region_measures_the_path_kl_to_the_old_policy():
    """A policy moved by a known score difference: the nats are those of the path KL, fewer on a coarse grid (left ends)."""
    nats = []
    for steps in (10, 100):
        found, made = learner(VP, 1.0, "pathwise", steps=steps, batch=200, trust=5.0, updates=1, rows=10**6)
        without_critic(found)
        experience = experienced(found, 200, torch.Generator().manual_seed(0))
        with torch.no_grad():
            made.parameters["th"].copy_(torch.tensor([OLD[0], OLD[1] + 1.0]))
        run(found.updates(experience, torch.Generator().manual_seed(0)))
        nats.append(found.state.kl_to_old)
    truth = 0.5 * (1 - float(VP.alpha(f64(1.0))) ** 2)  # 1/2 int g^2 alpha^2 dt = -1/2 int dalpha^2
    close(nats[0], truth, rtol=0.35, atol=0, without_half=2 * nats[0], mean_over_steps=nats[0] / 10)
    close(nats[1], truth, rtol=0.05, atol=0, without_half=2 * nats[1], mean_over_steps=nats[1] / 100)


@pytest.mark.slow
@pytest.mark.parametrize("off_below", [0.0, 0.3])
def test_the_trust_region_sees_the_steps_that_are_compared(off_below):
    """Truth: `1/2 (alpha^2(off_below) - alpha^2(1))`, the path KL of a shift of x0 by 1 above that time, by hand."""
    found, made = learner(
        VP, 1.0, "likelihood_ratio", steps=400, batch=64, trust=5.0, updates=2, sampler={"off_below": off_below}
    )
    without_critic(found)
    experience = experienced(found, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.parameters["th"].copy_(f64([OLD[0], OLD[1] + 1.0]))
    run(found.updates(experience, torch.Generator().manual_seed(0)))
    above, end = (float(VP.alpha(f64(t))) ** 2 for t in (off_below, 1.0))
    truth = (above - end) / 2
    whole = 400 / len(steps_with_density(found, experience).t) * 64
    close(found.state.kl_to_old, truth, atol=0.06 * truth, whole_path=truth * whole if off_below else 2 * truth)


@pytest.mark.parametrize("estimator", ["likelihood_ratio", "pathwise"])
def test_a_surrogate_that_is_a_baseline_has_not_seen_the_batch(estimator):
    """Truth: the surrogate as it was when the iteration began; a gradient may come from what it knows afterwards."""
    found, _ = learner(VP, 1.0, estimator, steps=8, batch=64, look="surrogate")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        before = copy.deepcopy(found.value.surrogate)
        experience = experienced(found, 64, generator)
    chosen = take(experience.steps(), experience.chosen.own)
    unseen, seen = (surrogate(chosen.pretrained.x0, chosen.prompt) for surrogate in (before, found.value.surrogate))
    truth, twin = (unseen, seen) if estimator == "likelihood_ratio" else (seen, unseen)
    close(experience.look, truth.detach(), atol=1e-5, twin=twin.detach())


def test_a_surrogate_that_foresees_nothing_is_told_of_once(caplog):
    """After 256 samples, and five batches on end, of rewards that are noise; twin: rewards that a line explains."""
    told = {}
    for kind in ("noise", "line"):
        caplog.clear()
        found, _ = learner(VP, 1.0, "pathwise", steps=4, batch=64, look="surrogate", updates=1, rows=16)
        generator = torch.Generator().manual_seed(0)
        for batch in range(10):
            rollout = found.explore(none(64), found.times(generator), generator)
            rewards = torch.randn(64, generator=generator) if kind == "noise" else rollout.x0[:, 0]
            found.prepare(replace(rollout, rewards=rewards), generator)
            assert found.state.surrogate_r2 is None if batch == 0 else isinstance(found.state.surrogate_r2, float)
            told[kind, batch] = len([line for line in caplog.messages if "algorithm.estimator=forward" in line])
        assert (found.state.surrogate_r2 > 0.9) == (kind == "line")
    noise, line = ([told[kind, batch] for batch in range(10)] for kind in ("noise", "line"))
    same(noise, 7 * [0] + 3 * [1], line=line)
    assert not any(line)
