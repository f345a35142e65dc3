"""Truth: the sampler's steps by hand with two networks, counting by hand, and the closed-form KL of a shift above a time."""

from dataclasses import replace

import pytest
import torch
from affine import LAW, OLD, REWARD, experienced, model, none, setting
from test_every_algorithm import SMALL, tuner
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.diffusion.kl import path_kl
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.solvers import SOLVERS
from scoreaction.models import gaussian_mixture
from scoreaction.sampling.draw import draw
from scoreaction.sampling.sampler import act
from scoreaction.training.evaluation import measure_kl

VP, OFF = sa.VP(), 0.3
SHIFTED = (0.0, 1.0)
"""The reference with x0 moved by sigma^2/alpha: the score moves by alpha."""


def composed(made, off, *, steps=10, n=5, policy_first=True):
    """DDIM(1) from the noise of seed 3, one step after another, the two networks taking turns at `off`."""
    noise = RowNoise(3, torch.arange(n))
    times = sa.Sampler(steps=steps).times(made.process)
    x = made.process.prior_std * noise.normal((n, *made.shape), torch.float32)
    with torch.no_grad():
        for t, s in zip(times[:-1], times[1:], strict=True):
            predict = made.predict if (float(t) >= off) == policy_first else made.reference
            step = SOLVERS["ddim"].step(made.process, None, predict(x, t), x, t, s, 1.0, None)
            x = step.sample(noise) if float(s) > 0 else step.mean
    return x


def test_samples_are_those_of_the_two_networks_in_turn():
    made = model(VP, SHIFTED)
    wrong = {"policy": composed(made, 0.0), "base": composed(made, 1.1), "swapped": composed(made, OFF, policy_first=False)}
    found = draw(made, sa.Sampler(steps=10, off_below=OFF), 5, None, 3)
    same(found, composed(made, OFF), **wrong)
    made.off_below = OFF  # as a training leaves it
    same(sa.sample(made, n=5, steps=10, seed=3), composed(made, OFF), **wrong)
    same(sa.sample(made, n=5, steps=10, seed=3, reference=True), composed(made, 1.1), gated=found)


def test_rows_of_one_call_have_each_its_own_time():
    """Truth: the two networks at all rows. No gradient reaches a parameter below the time, and x has one everywhere."""
    made = model(VP, OLD)
    x, t = torch.linspace(-1, 1, 6)[:, None].requires_grad_(), f64([0.1, 0.8, 0.3, 0.2, 0.31, 0.29])
    policy, base = made.predict(x, t), made.reference(x, t)
    off = (t < OFF)[:, None]
    found = act(made, sa.Sampler(off_below=OFF), x, t)
    for part in ("x0", "eps"):
        own, other = getattr(policy, part), getattr(base, part)
        truth, swapped = torch.where(off, other, own).detach(), torch.where(off, own, other).detach()
        close(getattr(found, part).detach(), truth, atol=1e-6, swapped=swapped)
    th, kinds = made.parameters["th"], (found.eps, policy.eps[~off[:, 0]], policy.eps)
    gated, above, everywhere = (torch.autograd.grad(eps.sum(), th, retain_graph=True)[0] for eps in kinds)
    close(gated, above, atol=1e-6, everywhere=everywhere)
    (by_x,) = torch.autograd.grad(found.eps.sum(), x)
    assert bool((by_x != 0).all())
    made.evaluations.forward = 0
    act(made, sa.Sampler(off_below=OFF), x, t)
    assert not act(made, sa.Sampler(off_below=OFF), x.detach()[:1], t[:1]).eps.requires_grad
    close(made.evaluations.forward, 7, atol=0, both=13)


@pytest.mark.parametrize(("t", "network"), [(0.1, "reference"), (OFF, "policy")])
def test_a_process_without_rows_calls_the_network_that_the_others_call(t, network, monkeypatch):
    """Of a shared network each process has a part: all must ask for the same one, which the time says and not the rows."""
    made, called = model(VP, OLD), []
    monkeypatch.setattr(made, "_predict", lambda role, x, *rest: called.append(role) or sa.types.Prediction(x, x))
    for rows in (0, 3):
        act(made, sa.Sampler(off_below=OFF), torch.zeros(rows, 1), f64(t))
    same(called, [network] * 2, by_rows=["policy", network] if t < OFF else ["reference", network])


def test_each_row_has_its_prompts_condition():
    """Truth: networks whose x0 is the prompt's number, and for the policy twice that."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, x, t, cond):
            return self.w * cond.expand_as(x)

    made = sa.Model(Own(), process=VP, predicts="x0", shape=(1,), encode=lambda names: torch.ones(len(names), 1))
    with torch.no_grad():
        made.parameters["w"].fill_(2.0)
    sampler, t, conditions = sa.Sampler(off_below=OFF), f64([0.9, 0.1, 0.5]), torch.tensor([[3.0], [5.0], [7.0]])
    found = act(made, sampler, torch.zeros(3, 1), t, conditions).x0[:, 0].detach()
    close(found, [6.0, 5.0, 14.0], atol=1e-6, first=[6.0, 3.0, 6.0])
    found = act(made, sampler, torch.zeros(3, 1), t, conditions, prompt=torch.tensor([1, 2, 0])).x0[:, 0].detach()
    close(found, [10.0, 7.0, 6.0], atol=1e-6, in_order=[6.0, 5.0, 14.0])


@pytest.mark.slow
def test_the_kl_is_that_of_the_time_above():
    """Truth: `1/2 (alpha^2(off) - alpha^2(1))`, of a score moved by alpha; on the rollout, and as a run is measured."""
    made = model(VP, SHIFTED)
    truth, whole = ((float(VP.alpha(f64(end))) ** 2 - float(VP.alpha(f64(1.0))) ** 2) / 2 for end in (OFF, 0.0))
    found = sa.DDPO().build(setting(made, steps=400, off_below=OFF))
    rollout = experienced(found, 8, torch.Generator().manual_seed(0))
    nats = path_kl(VP, rollout.acted, rollout.difference(), 1.0)
    close(nats, truth, atol=0, rtol=0.02, whole_path=whole)
    close(measure_kl(made, found.sampler, 8, None, 0)["kl_nats"], truth, atol=0, rtol=0.02, whole_path=whole)


def test_below_the_time_nothing_is_asked_twice():
    """Of N steps n are the policy's: the rollout asks N times, and the reference, for two of the paths, only n more."""
    made = model(VP)
    found = sa.DDPO().build(setting(made, steps=8, off_below=OFF))
    rollout = experienced(found, 6, torch.Generator().manual_seed(0))
    n = int((sa.Sampler(steps=8).times(VP)[:-1] >= OFF).sum())
    assert 0 < n < 7
    close(made.evaluations.forward, 6 * 8 + 2 * n, atol=0, everywhere=6 * 8 + 2 * 8)
    close(rollout.size, (n, 6), atol=0, all_steps=(8, 6))
    below = LAW.prediction(VP, rollout.x[n], rollout.times[n])
    close(rollout.old.x0[n], below.x0, atol=1e-5, policy=made.predict(rollout.x[n], rollout.times[n]).x0.detach())


def test_exploration_ends_where_the_policy_does():
    found = sa.ScoreAction(exploration=0.1).build(setting(model(VP), steps=8, off_below=OFF))
    rollout = found.explore(none(4), sa.Sampler(steps=8).times(VP), torch.Generator().manual_seed(0))
    moved = (rollout.action.eps != rollout.old.eps).flatten(1).any(1)
    same(moved.tolist(), (rollout.times[:-1] >= OFF).tolist(), everywhere=[True] * 8, nowhere=[False] * 8)


APART = {"hypernoise", "prompt_loop"}
"""What acts at pure noise alone, and what needs prompts."""


@pytest.mark.parametrize("name", [name for name in SMALL if name not in APART])
def test_no_algorithm_asks_the_policy_below_the_time(name):
    """It learns, in every iteration, from what the policy does above. Twin: without the setting the policy is asked there."""

    def earliest(off):
        made, seen = tuner(name, "vp", off_below=off), []
        predict = made.model.predict

        def watched(x, t, *rest, **more):
            seen.append(float(t.min()))
            return predict(x, t, *rest, **more)

        made.model.predict = watched
        assert all(metrics["grad_norm"] > 0 and "skipped" not in metrics for metrics in made)
        return min(seen)

    def above(t):
        assert t >= 0.4

    accepts(above, earliest(0.4), without=earliest(0.0))


def test_advantages_end_with_the_reward_at_the_policys_last_step():
    """Truth: with lambda 1 and a critic that says 0, the reward less the KL to go, of the policy's steps alone."""
    config = sa.ScoreAction(beta=0.5, estimator="likelihood_ratio", look_ahead="none", gae_lambda=1.0)
    found = config.build(setting(model(VP), steps=8, off_below=OFF))
    rollout = experienced(found, 6, torch.Generator().manual_seed(0))
    found.value.critic.forward = lambda x, t, prompt, look=None: torch.zeros(len(x))
    advantage = found.advantages(rollout).reshape(rollout.size)
    target = rollout.target[rollout.chosen.own.argsort()].reshape(rollout.size)
    centred = target - target.mean(1, keepdim=True)
    no_kl = (rollout.rewards - rollout.rewards.mean()).expand(rollout.size)
    close(advantage, centred, atol=1e-4, not_centred=target, no_kl=no_kl)


def test_pi_ft_knows_the_reward_where_its_policy_ends():
    """Its first update is of V at the time at which the base takes over, onto the rewards."""
    found = sa.PIFT(stages=1).build(setting(model(VP), steps=8, off_below=OFF))
    rollout = experienced(found, 6, torch.Generator().manual_seed(0))
    update = next(found.updates(rollout, torch.Generator().manual_seed(0)))
    assert update.network == "critic"
    moved = replace(rollout, rewards=rollout.rewards + 3)
    other = next(found.updates(moved, torch.Generator().manual_seed(0)))
    first, second = (each.terms[0].loss(torch.arange(1))[0].detach() for each in (update, other))
    assert not torch.equal(first, second)
    close(REWARD(rollout.x0), rollout.rewards, atol=1e-6, shifted=moved.rewards)


def test_a_saved_model_acts_as_in_training(tmp_path):
    made = tuner("ddpo", "vp", off_below=OFF)
    list(made)
    made.save(tmp_path)
    options = {"n": 4, "steps": 6, "seed": 3}
    loaded = sa.load(tmp_path, net=gaussian_mixture.build(gaussian_mixture.Config()))
    truth = sa.sample(made.model, **options)
    assert loaded.off_below == OFF
    loaded_samples = sa.sample(loaded, **options)
    loaded.off_below = 0.0
    same(loaded_samples, truth, policy_throughout=sa.sample(loaded, **options))
