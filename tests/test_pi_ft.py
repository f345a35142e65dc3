"""Truth: the linear-quadratic chain, whose inner iteration has a known error ratio and whose values are quadratics."""

from dataclasses import replace

import pytest
import torch
from affine import BETA, LAW, REWARD, exactly, gradient, model, points, setting
from oracles.linear_quadratic import ScalarLQ
from torch import nn
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms import _critic, pi_ft
from scoreaction.algorithms._pathwise import Decisions, Weights, improved, lookahead_loss, stepped
from scoreaction.algorithms.pi_ft import curvature
from scoreaction.diffusion.solvers import time_grid
from scoreaction.sampling.experience import Points
from scoreaction.types import Prediction

VP, FLOW = sa.VP(), sa.Flow()


def backward_values(process, beta, q=1.0):
    """Per step of the uniform 50-step chain: A, b, k, and (Pi, h) of the value at its end (the closed form, by hand)."""
    times = time_grid(process, 50)
    steps = ScalarLQ(process, m=0.3, v=0.8).steps(times)
    Pi, h, out = q, q, []
    for A, b, k in reversed(steps):
        out.append((A, b, k, Pi, h))
        D = 1 + Pi * k**2 / beta
        Pi, h = A**2 * Pi / D, A * (h - Pi * b) / D
    return times, f64(out[::-1])


class Inner:
    """Inner iterations at x = 0.7 of every step with noise, with the package's own step, weights and improvement."""

    def __init__(self, process, beta, q=1.0):
        times, values = backward_values(process, beta, q)
        self.A, self.b, self.k, self.Pi, self.h = values[:-1].T
        self.beta, self.t, self.s = beta, times[:-2], times[1:-1]
        self.setting, self.x = setting(model(process), steps=50), f64([[0.7]]).expand(49, 1)
        self.process, self.weights = process, Weights.of_chain(process, self.t, self.s, 1.0)
        said = LAW.prediction(process, self.x, self.t)
        self.reference, self.pure = said.x0, process.alpha(self.t) == 0
        self.eps = said.eps

    def grad(self, x0):
        alpha, sigma = self.process.alpha(self.t)[:, None], self.process.sigma(self.t)[:, None]
        eps = torch.where(self.pure[:, None], self.eps, (self.x - alpha * x0) / sigma)
        zero = torch.zeros(49, dtype=torch.long)
        where = Points(self.x, self.t, None)
        decisions = Decisions(where, self.s, zero, self.weights, self.reference, x0, torch.ones(49), zero)
        ahead = stepped(self.setting, decisions, Prediction(x0, eps), torch.Generator().manual_seed(1))
        return -self.Pi[:, None] * ahead.x + self.h[:, None]

    def __call__(self, x0, trust=0.0):
        fixed = {"grad_value": self.grad(x0), "reference": self.reference, "old": x0, "beta": self.beta}
        return improved(self.weights, **fixed, trust=trust)


@pytest.mark.parametrize(("process", "largest"), [(VP, 0.05808529), (FLOW, 0.03804677)], ids=["VP", "Flow"])
def test_an_inner_iteration_has_the_closed_forms_error_ratio(process, largest):
    """`-k^2 Pi_s/beta` at every step: the values of the closed form, and the ratio of three iterates."""
    inner = Inner(process, BETA)
    first = inner.reference
    second = inner(first)
    third = inner(second)
    ratio = ((third - second) / (second - first))[:, 0]
    truth = -(inner.k**2) * inner.Pi / BETA
    close(ratio, truth, atol=1e-6, sign=-truth, k_once=-inner.k * inner.Pi / BETA, beta_dropped=truth * BETA)
    close(ratio.abs().max(), largest, atol=1e-8, smallest=ratio.abs().min())
    if process is VP:
        close(ratio[45], -0.041955, atol=5e-7, next_step=ratio[46])
    i = 45
    measured = curvature(
        inner.weights.take(torch.tensor([i])), (second - first)[i], (inner.grad(second) - inner.grad(first))[i], BETA
    )
    close(measured, -ratio[i], without_beta=measured * BETA)
    assert curvature(inner.weights, 0 * first, 0 * first, BETA) == 0  # nothing moved: nothing is known


def test_it_converges_to_the_optimal_shift():
    """`(k^2/beta)(h - Pi (A x + b))/D` on the mean of the step, in expectation over its noise."""
    inner = Inner(VP, BETA)
    x0 = inner.reference
    for _ in range(8):
        x0 = inner(x0)
    noise = torch.randn(49, 1, generator=torch.Generator().manual_seed(1), dtype=F64)[:, 0] * inner.k
    shift = inner.weights.pull * (x0 - inner.reference)[:, 0]
    at = inner.A * 0.7 + inner.b
    D = 1 + inner.Pi * inner.k**2 / BETA
    drawn = inner.k**2 / BETA * (inner.h - inner.Pi * (at + noise)) / D
    mean = inner.k**2 / BETA * (inner.h - inner.Pi * at) / D
    close(shift, drawn, atol=1e-9, one_iteration=inner.weights.pull * (inner(inner.reference) - inner.reference)[:, 0])
    close(shift + inner.k**2 * inner.Pi * noise / BETA / D, mean, atol=1e-9, without_D=mean * D)


def test_where_the_ratio_exceeds_one_only_damping_converges():
    """A reward so curved that undamped iterations diverge; the measured curvature as trust gives Newton's step."""
    inner = Inner(VP, 0.02, q=40.0)
    size = inner.k**2 * inner.Pi / inner.beta
    i = int(size.argmax())
    assert float(size[i]) > 1

    def left(damped, iterations=8):
        """The last move of the worst step against the first."""
        x0, moves = inner.reference, []
        for _ in range(iterations):
            trust = float(size[i]) * inner.beta if damped else 0.0
            new = inner(x0, trust)
            moves.append(float((new - x0)[i, 0].abs()))
            x0 = new
        return moves[-1] / moves[0]

    def converges(value):
        assert value < 1e-9

    accepts(converges, left(True), undamped=left(False))
    assert left(False) > 1


def staged(numbers, *, steps=10, batch=64, exact=True, **config):
    """A learner in float64, the decisions at these steps, and V given as `-2 x^2 + x` of where a step leads."""
    torch.manual_seed(0)
    found = sa.PIFT(beta=BETA, **config).build(setting(model(VP), steps=steps, batch=batch, max_rows=25))
    experience = exactly(found, batch)
    found.critic.double()
    found.critic.scale.calibrate(experience.rewards)
    if exact:
        found.grad_ahead = lambda at, groups: 1 - 4 * at.x
        found.value_ahead = lambda at, groups: (at.x - 2 * at.x**2)[:, 0]
    chosen = (torch.tensor(numbers)[:, None] * batch + torch.arange(batch)).flatten()
    return found, experience, pi_ft.decisions_at(found.setting, experience, chosen, Weights.of_step)


def test_the_learner_measures_the_curvature_and_damps_by_it():
    found, _, decisions = staged([4], trust=0.1, updates=1, inner=2)
    th = found.setting.model.parameters["th"]
    updates = found._improve(decisions, 3, torch.Generator().manual_seed(0))
    for _ in range(3):  # pieces of the first inner iteration: 64 rows, 25 at a time
        first = next(updates)
    assert first.step
    with torch.no_grad():
        th += f64([0.3, 0.5])
    second = list(updates)
    chain = Weights.of_chain(VP, decisions.points.t, decisions.s, 1.0)
    truth = float((decisions.weights.pull / decisions.weights.stay * chain.pull * 4 / BETA)[0])
    measured = found.state["curvature"]
    close(
        measured, [0, 0, 0, truth, 0], atol=1e-9, of_the_chain=[0, 0, 0, float((chain.pull**2 / chain.stay * 4 / BETA)[0]), 0]
    )
    said, ahead = found._ahead(
        decisions, torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0))))
    )
    points = decisions.points
    x0 = found.setting.model.predict(points.x, points.t).x0

    def by_hand(trust):
        fixed = {"weights": decisions.weights, "grad_value": 1 - 4 * ahead.x, "reference": decisions.reference, "old": said}
        loss = lookahead_loss(x0, **fixed, beta=BETA, trust=trust * BETA) * decisions.scale
        return torch.autograd.grad(loss.mean(), th, retain_graph=True)[0]

    value = sum(float(u.loss.detach()) for u in second)
    fixed = {"weights": decisions.weights, "grad_value": 1 - 4 * ahead.x, "reference": decisions.reference, "old": said}
    close(gradient(found.setting.model, second), by_hand(truth), rtol=1e-6, sign=-by_hand(truth))
    with torch.no_grad():
        th += f64([0.1, -0.2])  # away from old the penalty shows
        x0 = found.setting.model.predict(points.x, points.t).x0
        losses = [
            float((lookahead_loss(x0, **fixed, beta=BETA, trust=k * BETA) * decisions.scale).mean()) for k in (truth, 0.1)
        ]
    again = list(pi_ft.improvement(found, replace(decisions, old=said), lambda d, p: (1 - 4 * ahead.x)[d.index], trust=truth))
    close(sum(float(u.loss.detach()) for u in again), losses[0], rtol=1e-9, least_trust=losses[1], before=value)


def test_a_stages_curvature_is_its_trust(monkeypatch):
    """What was measured of a stage damps that stage, where it is more than the least."""
    asked = []
    monkeypatch.setattr(pi_ft, "improvement", lambda learner, decisions, look, *, trust: asked.append(trust) or iter(()))
    found, _, decisions = staged([4], trust=0.1, updates=1, inner=1)
    found.state["curvature"] = [0.0, 0.0, 0.05, 7.0, 0.0]
    for stage in (2, 3):
        list(found._improve(decisions, stage, torch.Generator().manual_seed(0)))
    close(asked, [0.1, 7.0], atol=0, the_least_for_both=[0.1, 0.1], measured_for_both=[0.05, 7.0])


def test_the_target_is_the_value_ahead_minus_beta_times_the_steps_kl(monkeypatch):
    """`V(t, x_t) = E V(s, x_s) - beta stay/2 ||x0 - x0_pre||^2`, for the policy as it is after it was improved."""
    seen = {}

    def watched(value, target, **options):
        seen.update(value=value, target=target, **options)
        return iter(())

    monkeypatch.setattr(_critic, "critic_updates", watched)
    found, experience, decisions = staged([2, 3])
    with torch.no_grad():
        found.setting.model.parameters["th"] += 0.4
    list(found._evaluate(decisions, torch.Generator().manual_seed(0)))
    t, s, x = decisions.points.t, decisions.s, decisions.points.x
    score = lambda f: -f(x, t).eps / VP.sigma(t)[:, None]  # noqa: E731
    with torch.no_grad():
        apart = (score(found.setting.model.predict) - score(found.setting.model.reference))[:, 0] ** 2
        old = (
            score(lambda x, t: Prediction(x, experience.rollout.prediction.eps[2:4].flatten(0, 1)))
            - score(found.setting.model.reference)
        )[:, 0] ** 2
        _, ahead = found._ahead(decisions, torch.Generator().manual_seed(0))
    cost = (t - s) * VP.g2((t + s) / 2) / 2
    value = (ahead.x - 2 * ahead.x**2)[:, 0]
    wrong = {"no_kl": value, "beta_dropped": value - cost * apart, "old_policy": value - BETA * cost * old}
    close(seen["target"], value - BETA * cost * apart, rtol=1e-9, atol=1e-9, **wrong)
    rows = torch.tensor([5, 100])
    look = REWARD(LAW.prediction(VP, x, t).x0)[rows]
    at = decisions.points.take(rows)
    close(
        seen["value"](rows).detach(),
        found.critic(at.x, at.t, None, look).detach(),
        no_skip=found.critic(at.x, at.t, None, None).detach(),
    )


def test_the_value_ahead_at_the_data_is_the_reward_and_its_gradient_is_its_own():
    found, _, _ = staged([2], exact=False)
    nn.init.normal_(found.critic.net.last.weight)
    x, t, zero = f64([[-1.0], [0.5], [2.0]]), f64([0.0, 0.2, 0.7]), torch.zeros(3, dtype=torch.long)
    value, grad = found.value_ahead(points(x, t), zero), found.grad_ahead(points(x, t), zero)
    close(value[0], REWARD(x)[0], atol=1e-9, of_more_noise=value[1])
    close(grad[0], 1.2 - x[0], atol=1e-7, of_more_noise=grad[1])
    h = 1e-5
    slope = [(found.value_ahead(points(x + d, t), zero)) for d in (h, -h)]
    close(grad[:, 0], (slope[0] - slope[1]) / (2 * h), atol=1e-6, skip_left_out=grad[:, 0] - 0.1)


def test_a_sweep_goes_from_the_data_to_the_noise_and_takes_every_step():
    found, experience, _ = staged([2], steps=7, stages=3, inner=2, updates=2, critic_updates=1, rows=10**6)
    stages = []
    found._improve = lambda decisions, stage, generator: stages.append((stage, decisions)) or iter(())
    updates = list(found.updates(experience, torch.Generator().manual_seed(0)))
    assert [u.network for u in updates] == ["critic"] * 3
    numbers = [sorted({int((experience.rollout.times == t).nonzero()) for t in d.points.t.unique()}) for _, d in stages]

    def backward(order):
        assert order == [[4, 5, 6], [1, 2, 3], [0]]

    accepts(backward, numbers, forward=numbers[::-1])
    assert [stage for stage, _ in stages] == [0, 1, 2]
    close([float(d.scale[0]) for _, d in stages], [3, 3, 1], atol=0, all_steps=[7, 7, 7])  # together each step once


def test_what_it_needs_is_refused_with_a_remedy():
    made = model(VP)
    with pytest.raises(ValueError, match=r"sampler\.eta: .*set it above 0"):
        sa.PIFT().build(setting(made, eta=0.0))
    with pytest.raises(ValueError, match=r"reward: pi_ft needs its gradient"):
        sa.PIFT().build(setting(made, differentiable=False))


def test_the_value_ahead_at_the_data_is_the_reward_where_sigma_there_is_not_0():
    """Stable Diffusion's table keeps sigma = 0.029 at t = 0, where a critic that never saw it would say something too."""
    made = model(sa.TableVP.scaled_linear())
    found = sa.PIFT(beta=BETA).build(setting(made, steps=4, batch=8))
    found.critic.double()
    made.net.double()
    found.critic.scale.calibrate(f64([-1.0, 0.0, 1.0]))
    nn.init.normal_(found.critic.net.last.weight)
    x, t, zero = f64([[-1.0], [0.5]]), f64([0.0, 0.2]), torch.zeros(2, dtype=torch.long)
    value, grad = found.value_ahead(points(x, t), zero), found.grad_ahead(points(x, t), zero)
    soft = pi_ft.soft_q(found, points(x, t), zero, slope=True)
    with_critic = found.critic(x, t, None, soft.value).detach()
    close(value[0], soft.value[0].detach(), atol=1e-9, with_critic=with_critic[0])
    close(grad[0], soft.grad[0], atol=1e-9, with_critic=grad[0] + found.critic.slope(x, t, None)[0])
    close(value[1], with_critic[1], atol=1e-9, alone=soft.value[1].detach())
