"""Truth: the tilted law of Gaussian data, at which the forward estimator rests and RAM does not; its gradient by hand."""

from dataclasses import replace

import pytest
import torch
from affine import none
from driving import run
from oracles.forward import TASK
from oracles.linear_quadratic import LinearQuadratic
from test_contract import gains, improves, tuner_of
from test_forward import REWARD, VP, at_rest, pushed, rests
from twins import F64, accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._forward import Noised, renoised
from scoreaction.algorithms._score_action_forward import forward_loss
from scoreaction.networks.conditions import take

FORWARD = {"estimator": "forward", "beta": TASK.beta, "trust": 0.0, "updates": 1}


def means(x, t, law):
    """E[r | x_t] of samples with this law, noised to t, and its gradient: (rows,), (rows, 1)."""
    (mean, variance), alpha, sigma2 = law, VP.alpha(t)[:, None], VP.sigma2(t)[:, None]
    gain = variance * alpha / (alpha**2 * variance + sigma2)
    x0_hat, left = mean + gain * (x - alpha * mean), variance * (1 - gain * alpha)
    return REWARD(x0_hat) - TASK.q / 2 * left[:, 0], gain * (TASK.l - TASK.q * (x0_hat - TASK.mu))


def slope_to_go(x, t):
    """The gradient of the tilted policy's KL to go: `(grad E[r | x_t] - grad V)/beta`.

    `V = beta log E_pre[exp(r/beta) | x_t]`, whose gradient is that of the base's mean reward over `1 + S q/beta`, S the
    variance of x0 given x_t.
    """
    gain = TASK.v * VP.alpha(t)[:, None] / (VP.alpha(t) ** 2 * TASK.v + VP.sigma2(t))[:, None]
    left = TASK.v * (1 - gain * VP.alpha(t)[:, None])
    value = means(x, t, (TASK.m, TASK.v))[1] / (1 + left * TASK.q / TASK.beta)
    return (means(x, t, TASK.tilted)[1] - value) / TASK.beta


def test_the_kl_to_go_by_hand():
    """Truth: the gradient of V by the oracle of the linear-quadratic case."""
    lq = LinearQuadratic(VP, f64([TASK.m]), f64([[TASK.v]]), f64([[TASK.q]]), f64([TASK.l]), f64([TASK.mu]), TASK.beta)
    x, t = f64([[0.3], [-1.2]]), f64([0.2, 0.2])
    value = lq.value_grad(x, t[0])
    close(means(x, t, TASK.tilted)[1] - TASK.beta * slope_to_go(x, t), value, atol=1e-9, reward=means(x, t, TASK.tilted)[1])


def errors(rule, *, law=TASK.tilted, to_go=1.0, batch=2000, seeds=12):
    """The mean gradient of the product's updates, in standard errors, with exact values in the place of fitted ones."""
    found = []
    for seed in range(seeds):
        learner, rollout, generator = at_rest(sa.ScoreAction(**FORWARD), rule, seed=seed, batch=batch)
        learner.fit = lambda *rest: iter(())
        learner.critic.forward = lambda x, t, prompt: means(x, t, law)[0]
        learner.to_go.gradient = lambda x, t, prompt: to_go * slope_to_go(x, t)
        rollout = learner.prepare(rollout, generator)
        ((_, loss, _),) = run(learner.updates(rollout, generator))
        found.append(torch.autograd.grad(loss, learner.model.parameters["th"])[0].double())
    return pushed(found)


@pytest.mark.slow
def test_it_rests_at_the_tilted_law():
    """Twins: without the KL to go, which is RAM, and with its sign turned; a policy of another law."""
    wrong = {"no_kl_to_go": errors("optimal", to_go=0.0), "turned": errors("optimal", to_go=-1.0), "ram": errors("ram")}
    accepts(rests, errors("optimal"), **wrong)


def test_the_loss_by_hand():
    eps, noise, old, pretrained, push = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    a, eps = f64([1.0, -2.0, 0.0, 3.0]), eps.requires_grad_()
    fixed = {"noise": noise, "old": old, "pretrained": pretrained, "push": push, "advantage": a}
    (slope,) = torch.autograd.grad(forward_loss(eps, **fixed, beta=0.5, trust=0.3).sum(), eps)

    def by_hand(a, trust=0.3, push=push):
        anchor = (eps - pretrained - push) + trust * (eps - old)
        return 2 * (anchor - a[:, None] / 0.5 * (noise - old)).detach() / 3

    close(slope, by_hand(a), atol=1e-12, flipped=by_hand(-a), no_trust=by_hand(a, 0.0), pull=by_hand(a, push=-push))


def test_its_values_have_not_seen_the_batch_but_for_the_kl_to_go():
    """The order of an iteration's updates: the KL to go is fitted first, the baseline after it was used."""
    config = sa.ScoreAction(estimator="forward", beta=TASK.beta, updates=3, critic_updates=2, each=2)
    learner, rollout, generator = at_rest(config, "ram", batch=40)
    networks = [update.network for update, _, _ in run(learner.updates(learner.prepare(rollout, generator), generator))]
    same(
        networks, ["to_go"] * 2 + ["policy"] * 3 + ["critic"] * 2, critic_first=["critic"] * 2 + ["to_go"] * 2 + ["policy"] * 3
    )


@pytest.mark.slow
def test_the_trust_region_is_in_nats_of_the_path():
    """Truth: `1/2 (alpha^2(end) - alpha^2(1))`, the path KL of a score moved by alpha, as on trajectories."""
    config = sa.ScoreAction(estimator="forward", beta=TASK.beta, updates=1, each=8, trust=1.0)
    for off in (0.0, 0.4):
        learner, rollout, generator = at_rest(config, "ram", batch=4000, off_below=off)
        learner.fit = lambda *rest: iter(())
        fixed = learner._fixed
        learner._fixed = lambda points, rewards, learner=learner, fixed=fixed: moved(learner, fixed(points, rewards))
        run(learner.updates(learner.prepare(rollout, generator), generator))
        truth, whole = ((float(VP.alpha(f64(end))) ** 2 - float(VP.alpha(f64(1.0))) ** 2) / 2 for end in (max(off, 1e-3), 0.7))
        close(learner.state.kl_to_old, truth, atol=0, rtol=0.05, later=whole, twice=2 * truth)
        assert learner.state.trust == (2.0 if truth > 0.1 else 1.0)


def moved(learner, fixed):
    with torch.no_grad():
        learner.model.parameters["th"].copy_(f64([0.0, 1.0]))
    return fixed


@pytest.mark.slow
def test_the_advantage_is_less_a_value_of_the_state():
    """Truth: `r - E[r | x_t]` by hand where the value is exact; where it explains nothing, `r` minus the batch's mean."""
    config = sa.ScoreAction(estimator="forward", beta=TASK.beta, each=4)
    learner, rollout, generator = at_rest(config, "ram", batch=3000)
    points = []

    def advantage(value):
        learner.critic.forward = value
        fixed = learner._fixed

        def kept(given, rewards):
            points[:] = [given]
            return fixed(given, rewards)

        learner._fixed = kept
        learner.fit = lambda *rest: iter(())
        run(learner.updates(learner.prepare(rollout, generator), generator))
        return fixed(points[0], rollout.rewards).advantage

    law = learner.model.net.law
    found = advantage(lambda x, t, prompt: means(x, t, law)[0])
    reward = take(rollout.rewards, points[0].path)
    exact, flat = reward - means(points[0].x, points[0].t, law)[0], reward - rollout.rewards.mean()
    close(found.std() / exact.std(), 1.0, atol=0.02, mean=flat.std() / exact.std())
    close(
        advantage(lambda x, t, prompt: torch.zeros(len(x), dtype=F64)), reward - rollout.rewards.mean(), atol=1e-9, exact=exact
    )


@pytest.mark.parametrize("options", [{"eta": 0.5}, {"solver": "dpmpp_2m", "eta": 0.0}])
def test_it_refuses_noise_that_remembers(options):
    with pytest.raises(ValueError, match=r"sampler.eta: the forward estimator needs memoryless noise, which is eta 1"):
        at_rest(sa.ScoreAction(estimator="forward"), "ram", law=(0.0, 1.0), **options)
    with pytest.raises(ValueError, match="algorithm.exploration"):
        at_rest(sa.ScoreAction(estimator="forward", exploration=0.1), "ram", law=(0.0, 1.0))
    at_rest(sa.ScoreAction(estimator="forward"), "ram", law=(0.0, 1.0), solver="sde_dpmpp")


def test_errors_count_as_those_of_the_clean_sample_over_their_size():
    """Truth: x0 from eps by hand. Twins: errors of eps, of x0 as large as they are, over another size, at any noise."""
    config = sa.ScoreAction(estimator="forward", errors="x0", beta=TASK.beta)
    learner, rollout, generator = at_rest(config, "ram", batch=500)
    times = f64([0.2, 0.6, 1.0])[:, None].expand(3, 500)
    points = renoised(learner, rollout, times, generator)
    old = learner.policy(*points.states)

    def weights(errors):
        learner.config = learner.config._replace(errors=errors)
        return learner.weights(points, old.eps, 500)

    ratio = (VP.sigma(points.t) / VP.alpha(points.t)).clamp(max=4.7e-3**-0.5)
    of_eps = (points.eps - old.eps)[:, 0].abs()
    error = ratio * of_eps
    close(error[:1000], (old.x0 - points.x0)[:1000, 0].abs(), atol=1e-9, of_eps=of_eps[:1000])
    mean = lambda size: size.reshape(3, 500).mean(1).repeat_interleave(500)  # noqa: E731
    wrong = {"of_eps": torch.ones_like(error), "not_over_size": ratio**2}
    unbounded = (VP.sigma(points.t) / VP.alpha(points.t) / ratio) ** 2
    truth = {"x0": ratio**2 / mean(error), "own": ratio**2 / error, "eps": 1 / mean(of_eps)}
    for errors, value in truth.items():
        others = {name: other for name, other in truth.items() if name != errors}
        close(weights(errors), value, atol=0, rtol=1e-9, **others, unbounded=value * unbounded, **wrong)


def test_over_their_own_size_errors_of_what_is_rare_pull_less():
    """Truth: `2 p (1 - p)/(p^2 + (1 - p)^2)` by hand, where a state ends at 0 with the odds p, else at 1. Twin: mean size."""
    p, t = 0.9, f64([0.6, 0.6])
    learner, _, _ = at_rest(sa.ScoreAction(estimator="forward", errors="own", beta=TASK.beta), "ram", batch=2)
    x0, x, share = f64([[0.0], [1.0]]), f64([[0.7], [0.7]]), f64([p, 1 - p])
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    eps, old = (x - alpha * x0) / sigma, (x - alpha * (1 - p)) / sigma
    points, advantage = Noised(x0, eps, x, t, torch.arange(2), none(2)), x0[:, 0] - (1 - p)

    def pull(weight):
        return (share * weight * advantage * (eps - old)[:, 0]).sum() / (share * weight).sum()

    plain = pull(torch.ones(2, dtype=F64))
    learner.config = learner.config._replace(errors="x0")
    mean_size = pull(learner.weights(points, old, 2)) / plain
    learner.config = learner.config._replace(errors="own")
    found = pull(learner.weights(points, old, 2)) / plain
    close(found, 2 * p * (1 - p) / (p**2 + (1 - p) ** 2), atol=1e-6, mean_size=mean_size)
    close(mean_size, 1.0, atol=1e-6, own=found)


def test_a_prompts_own_mean_is_the_baseline():
    """By hand: four rewards of the batch's mean beside those that the prompt had before. Twin: with those of this batch."""
    learner, rollout, _ = at_rest(sa.ScoreAction(estimator="forward", beta=TASK.beta), "ram", batch=4)
    prompts = torch.tensor([0, 0, 1, 1])
    first, second = f64([1.0, 3.0, 5.0, 7.0]), f64([2.0, 2.0, 4.0, 0.0])
    before = learner.expected(replace(rollout, rewards=first, prompt=prompts))
    close(before, 4.0, atol=1e-9, of_the_prompt=[2.0, 2.0, 6.0, 6.0])
    after = learner.expected(replace(rollout, rewards=second, prompt=prompts))
    with_its_own, of_the_batch = [3.0, 3.0, 3.125, 3.125], [2.0] * 4
    close(after, [2.0, 2.0, 20 / 6, 20 / 6], atol=1e-9, with_its_own=with_its_own, of_the_batch=of_the_batch)
    assert learner.state.prompt_rewards == {"0": [1.0, 3.0, 2.0, 2.0], "1": [5.0, 7.0, 4.0, 0.0]}


@pytest.mark.slow
def test_a_black_box_is_learned_from():
    settings = {"estimator": "forward"}
    right, flipped = (tuner_of("score_action", s, differentiable=False, settings=settings) for s in (1, -1))
    accepts(improves, gains(right, 1), flipped=gains(flipped, -1))


def sampled_and_old(averaging, weights):
    """Samples of a policy, and what its loss has as the old prediction, at each of these weights: all of one rollout's noise.

    After None in the place of weights the updates of an iteration have been made.
    """
    learner, rollout, generator = at_rest(
        sa.ScoreAction(estimator="forward", beta=TASK.beta, averaging=averaging), "ram", batch=6
    )
    points = renoised(learner, rollout, f64([0.2, 0.6])[:, None].expand(2, 6), generator)
    rollout, found = learner.prepare(rollout, generator), []
    for weight in weights:
        if weight is None:
            learner.updated()
            continue
        with torch.no_grad():
            learner.model.parameters["th"].fill_(weight)
        drawn = learner.explore(rollout.prompt, learner.sampler.times(VP), torch.Generator().manual_seed(0)).x0
        found.append(torch.cat([drawn.flatten(), learner._fixed(points, rollout.rewards).old.eps.flatten()]))
    return found


def test_with_averaging_the_policy_that_samples_follows_the_trained_one():
    """Truth: without it, at the weights by hand, .25 * 0 + .75 * .4. Twins: the trained policy, and others."""
    before, trained, followed, wrong = sampled_and_old(0.0, [0.0, 0.4, 0.3, 0.1])
    found = sampled_and_old(0.25, [0.0, 0.4, None, 0.4])
    for value, truth in zip(found, (before, before, followed), strict=True):
        close(value, truth, atol=1e-9, trained=trained, turned=wrong)
    close(found[2], followed, atol=1e-9, not_moved=before)


def test_a_run_lets_it_follow_once_an_iteration():
    tuner = tuner_of("score_action", 1, differentiable=False, settings={"estimator": "forward", "averaging": 0.5})
    (first, *_), (lagged, *_) = tuner.model.parameters.values(), tuner.learner.lagged.buffers()
    begun, halfway = first.detach().clone(), []
    for _, _ in zip(range(2), iter(tuner), strict=False):
        halfway.append((lagged.clone(), first.detach().clone()))
    (one, trained), (two, later) = halfway
    close(one, (begun + trained) / 2, atol=1e-6, not_at_all=begun, twice=(begun + 3 * trained) / 4)
    close(two, (one + later) / 2, atol=1e-6, not_at_all=one)


def test_what_is_taken_back_is_not_followed():
    """An iteration whose last step led out of its region by far. Twin: one that may go anywhere, and is followed half way."""

    def moved(region):
        settings = {"estimator": "forward", "averaging": 0.5, "updates": 1, "trust_region": region}
        tuner = tuner_of("score_action", 1, differentiable=False, settings=settings, lr=10.0)
        lagged = list(tuner.learner.lagged.buffers())
        begun, metrics = [weight.clone() for weight in lagged], next(iter(tuner))
        far = max(float((weight - first).abs().max()) for weight, first in zip(lagged, begun, strict=True))
        return far, metrics["taken_back"]

    close(moved(1e9), [5.0, 0.0], atol=1e-4, whole=[10.0, 0.0])  # Adam's first step is the rate
    same(moved(0.1), (0.0, 1.0), followed=(5.0, 1.0))
