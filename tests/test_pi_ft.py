"""Truth: the linear-quadratic chain, whose inner iteration has a known error ratio and whose values are quadratics."""

import pytest
import torch
from affine import BETA, LAW, REWARD, exactly, model, none, points, setting
from driving import count, each, total
from oracles.linear_quadratic import ScalarLQ
from torch import nn
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms import pi_ft
from scoreaction.algorithms._step import StepWeights, minimiser, next_states, noise_of, step_loss
from scoreaction.algorithms._updates import Update
from scoreaction.algorithms.pi_ft import curvature
from scoreaction.diffusion.noise import RowNoise, drawn_seed
from scoreaction.diffusion.solvers import time_grid
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Steps
from scoreaction.types import Prediction
from scoreaction.world import ALONE

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
    """Inner iterations at x = 0.7 of every step with noise, with the package's own step, weights and minimiser."""

    def __init__(self, process, beta, q=1.0):
        times, values = backward_values(process, beta, q)
        self.A, self.b, self.k, self.Pi, self.h = values[:-1].T
        self.beta, self.t, self.s = beta, times[:-2], times[1:-1]
        self.learner, self.x = sa.PIFT().build(setting(model(process), steps=50)), f64([[0.7]]).expand(49, 1)
        self.process, self.weights = process, StepWeights.of_chain(process, self.t, self.s, 1.0)
        self.pretrained, self.eps = LAW.prediction(process, self.x, self.t)
        self.pure = process.alpha(self.t) == 0

    def grad(self, x0):
        alpha, sigma = self.process.alpha(self.t)[:, None], self.process.sigma(self.t)[:, None]
        eps = torch.where(self.pure[:, None], self.eps, (self.x - alpha * x0) / sigma)
        prediction, zero = Prediction(x0, eps), none(49)
        steps = Steps(self.x, self.t, self.s, self.x, prediction, None, zero, zero, zero, torch.ones(49))
        ahead = next_states(self.learner, steps, prediction, noise_of(self.learner, steps, ALONE.rows(49), 1))
        return -self.Pi[:, None] * ahead.x + self.h[:, None]

    def __call__(self, x0, trust=0.0):
        fixed = {"grad_value": self.grad(x0), "pretrained": self.pretrained, "old": x0, "beta": self.beta}
        return minimiser(self.weights, **fixed, trust=trust)


@pytest.mark.parametrize(("process", "largest"), [(VP, 0.05808529), (FLOW, 0.03804677)], ids=["VP", "Flow"])
def test_an_inner_iteration_has_the_closed_forms_error_ratio(process, largest):
    """`-k^2 Pi_s/beta` at every step: the values of the closed form, and the ratio of three iterates."""
    inner = Inner(process, BETA)
    first = inner.pretrained
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
        take(inner.weights, torch.tensor([i])), (second - first)[i], (inner.grad(second) - inner.grad(first))[i], BETA
    )
    close(measured, -ratio[i], without_beta=measured * BETA)
    assert curvature(inner.weights, 0 * first, 0 * first, BETA) == 0  # nothing moved: nothing is known


def test_it_converges_to_the_optimal_shift():
    """`(k^2/beta)(h - Pi (A x + b))/D` on the mean of the step, in expectation over its noise."""
    inner = Inner(VP, BETA)
    x0 = inner.pretrained
    for _ in range(8):
        x0 = inner(x0)
    noise = RowNoise(1, torch.arange(49)).normal((49, 1), F64)[:, 0] * inner.k
    shift = inner.weights.shift * (x0 - inner.pretrained)[:, 0]
    at = inner.A * 0.7 + inner.b
    D = 1 + inner.Pi * inner.k**2 / BETA
    drawn = inner.k**2 / BETA * (inner.h - inner.Pi * (at + noise)) / D
    mean = inner.k**2 / BETA * (inner.h - inner.Pi * at) / D
    close(shift, drawn, atol=1e-9, one_iteration=inner.weights.shift * (inner(inner.pretrained) - inner.pretrained)[:, 0])
    close(shift + inner.k**2 * inner.Pi * noise / BETA / D, mean, atol=1e-9, without_D=mean * D)


def test_where_the_ratio_exceeds_one_only_damping_converges():
    """A reward so curved that undamped iterations diverge; the measured curvature as trust gives Newton's step."""
    inner = Inner(VP, 0.02, q=40.0)
    size = inner.k**2 * inner.Pi / inner.beta
    i = int(size.argmax())
    assert float(size[i]) > 1

    def left(damped, iterations=8):
        """The last move of the worst step against the first."""
        x0, moves = inner.pretrained, []
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
    """A learner in float64, its steps of these numbers, and V given as `-2 x^2 + x` of where a step leads."""
    torch.manual_seed(0)
    learner = sa.PIFT(beta=BETA, **config).build(setting(model(VP), steps=steps, batch=batch))
    rollout = exactly(learner, batch)
    learner.critic.double()
    learner.critic.scale.calibrate(rollout.rewards)
    if exact:
        learner.gradient = lambda states: 1 - 4 * states.x
        learner.value = lambda states: (states.x - 2 * states.x**2)[:, 0]
    chosen = (torch.tensor(numbers)[:, None] * batch + torch.arange(batch)).flatten()
    steps = take(rollout.steps(), chosen)
    with torch.no_grad():
        return learner, rollout, steps._replace(pretrained=learner.pretrained(*steps.states))


def first_noise(steps, generator):
    """The noise of the seed that is drawn first, so that all iterations of an improvement have the same."""
    return RowNoise(drawn_seed(generator), torch.arange(len(steps.x))).normal(steps.x.shape, steps.x.dtype)


def test_the_learner_measures_the_curvature_and_damps_by_it():
    learner, _, steps = staged([4], trust=0.1, updates=2, inner=2)
    th, weights = learner.model.parameters["th"], learner._weights(steps)
    updates = each(learner._improve(steps, ALONE.rows(64), 3, torch.Generator().manual_seed(0)))
    next(updates)
    next(updates)
    with torch.no_grad():
        th += f64([0.3, 0.5])
    prediction, ahead = learner._ahead(steps, first_noise(steps, torch.Generator().manual_seed(0)))

    def by_hand(trust):
        """The loss of the second iteration at the policy as it is, and its gradient."""
        loss = step_loss(
            learner.model.predict(steps.x, steps.t).x0, weights=weights, grad_value=1 - 4 * ahead.x,
            pretrained=steps.pretrained.x0, old=prediction.x0, beta=BETA, trust=trust * BETA,
        ) * steps.weight  # fmt: skip
        (grad,) = torch.autograd.grad(loss.mean(), th)
        return grad, loss.mean().detach()

    _, second, _ = next(updates)
    chain = StepWeights.of_chain(VP, steps.t, steps.s, 1.0)
    truth = float((weights.shift / weights.cost * chain.shift * 4 / BETA)[0])
    of_the_chain = float((chain.shift**2 / chain.cost * 4 / BETA)[0])
    close(learner.state.curvature, [0, 0, 0, truth, 0], atol=1e-9, of_the_chain=[0, 0, 0, of_the_chain, 0])
    grad, _ = by_hand(truth)
    close(torch.autograd.grad(second, th)[0], grad, rtol=1e-6, sign=-grad)
    with torch.no_grad():
        th += f64([0.1, -0.2])  # away from old the penalty shows
    _, third, figures = next(updates)
    close(third.detach(), by_hand(truth)[1], rtol=1e-9, least_trust=by_hand(0.1)[1], before=second.detach())
    moved = (learner.model.predict(steps.x, steps.t).x0 - prediction.x0).detach().square()[:, 0]
    to_old = (10 * weights.cost / 2 * moved).mean()  # nats of the ten steps of a path, as if all were of this stage
    close(figures["kl_to_old"], to_old, rtol=1e-6, one_step=to_old / 10, without_half=2 * to_old)
    assert next(updates, None) is None


def test_a_stages_curvature_is_its_trust(monkeypatch):
    """What was measured of a stage damps that stage, where it is more than the least."""
    trusts = []
    monkeypatch.setattr(pi_ft, "step_term", lambda *args, trust, **options: trusts.append(trust))
    learner, _, steps = staged([4], trust=0.1, updates=1, inner=1)
    learner.state.curvature = [0.0, 0.0, 0.05, 7.0, 0.0]
    for stage in (2, 3):
        list(learner._improve(steps, ALONE.rows(64), stage, torch.Generator().manual_seed(0)))
    close(trusts, [0.1, 7.0], atol=0, the_least_for_both=[0.1, 0.1], measured_for_both=[0.05, 7.0])


def test_the_target_is_the_value_ahead_minus_beta_times_the_steps_kl():
    """`V(t, x_t) = E V(s, x_s) - beta cost/2 ||x0 - x0_pre||^2`, for the policy as it is after it was improved.

    The critic's loss is the squared error to it, in units of the rewards' variance, its look-ahead in the skip.
    """
    learner, rollout, steps = staged([2, 3], critic_updates=1)
    with torch.no_grad():
        learner.model.parameters["th"] += 0.4
    nn.init.normal_(learner.critic.net.last.weight)
    (update,) = learner._evaluate(steps, ALONE.rows(128), torch.Generator().manual_seed(0))
    assert (update.network, count(update.terms[0].rows)) == ("critic", 16)
    t, s, x = steps.states.t, steps.s, steps.x
    score = lambda f: -f(x, t).eps / VP.sigma(t)[:, None]  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        apart = (score(learner.model.predict) - score(learner.model.reference))[:, 0] ** 2
        old = (score(lambda x, t: Prediction(x, rollout.old.eps[2:4].flatten(0, 1))) - score(learner.model.reference))[
            :, 0
        ] ** 2
        _, ahead = learner._ahead(steps, first_noise(steps, generator))
        rows = torch.randint(128, (16,), generator=generator)
        look = REWARD(LAW.prediction(VP, x, t).x0)
        value, without = (learner.critic(*steps.states, part) for part in (look, None))
    cost = (t - s) * VP.g2((t + s) / 2) / 2
    future = (ahead.x - 2 * ahead.x**2)[:, 0]

    def losses(target, value=value):
        return ((value - target) / rollout.rewards.std(correction=0))[rows].square()

    wrong = {
        "no_kl": losses(future),
        "beta_dropped": losses(future - cost * apart),
        "old_policy": losses(future - BETA * cost * old),
        "no_skip": losses(future - BETA * cost * apart, without),
        "other_rows": losses(future - BETA * cost * apart).flip(0),
    }
    loss = update.terms[0].loss(torch.arange(16))[0].detach()
    close(loss, losses(future - BETA * cost * apart), rtol=1e-5, atol=1e-7, **wrong)


def test_the_value_at_the_data_is_the_reward_and_its_gradient_is_its_own():
    learner, _, _ = staged([2], exact=False)
    nn.init.normal_(learner.critic.net.last.weight)
    x, t = f64([[-1.0], [0.5], [2.0]]), f64([0.0, 0.2, 0.7])
    value, grad = learner.value(points(x, t)), learner.gradient(points(x, t))
    close(value[0], REWARD(x)[0], atol=1e-9, of_more_noise=value[1])
    close(grad[0], 1.2 - x[0], atol=1e-7, of_more_noise=grad[1])
    h = 1e-5
    ends = [learner.value(points(x + d, t)) for d in (h, -h)]
    close(grad[:, 0], (ends[0] - ends[1]) / (2 * h), atol=1e-6, skip_left_out=grad[:, 0] - 0.1)


def test_a_sweep_goes_from_the_data_to_the_noise_and_takes_every_step():
    learner, rollout, _ = staged([2], steps=7, stages=3, inner=2, updates=2, critic_updates=1, rows=10**6)
    stages = []
    learner._improve = lambda steps, rows, stage, generator: stages.append((stage, steps)) or iter(())
    updates = list(each(learner.updates(rollout, torch.Generator().manual_seed(0))))
    assert [update.network for update, _, _ in updates] == ["critic"] * 3
    numbers = [sorted(set(steps.step.tolist())) for _, steps in stages]

    def backward(order):
        assert order == [[4, 5, 6], [1, 2, 3], [0]]

    accepts(backward, numbers, forward=numbers[::-1])
    assert [stage for stage, _ in stages] == [0, 1, 2]
    weights = [float(steps.weight[0]) for _, steps in stages]
    close(weights, [3, 3, 1], atol=0, all_steps=[7, 7, 7])  # together each step once
    rows = [sorted((steps.step * 64 + steps.path).tolist()) for _, steps in stages]

    def each_once(rows):
        assert sorted(sum(rows, [])) == list(range(7 * 64))

    accepts(each_once, rows, twice=[*rows, rows[0]], one_stage_less=rows[1:])
    for _, steps in stages:
        close(rollout.times[steps.step], steps.t, atol=0, end=steps.s)


def test_a_stage_improves_before_it_evaluates():
    """In each stage first the inner iterations, then the value under the new policy."""
    learner, rollout, _ = staged([2], stages=2, inner=2, updates=3, critic_updates=4, rows=40)
    networks = [update.network for update, _, _ in each(learner.updates(rollout, torch.Generator().manual_seed(0)))]

    def improves_first(order):
        assert order == 2 * (6 * ["policy"] + 4 * ["critic"])

    accepts(improves_first, networks, reversed=networks[::-1], one_sweep_of_each=12 * ["policy"] + 8 * ["critic"])


def test_an_update_is_one_step_of_the_network_whatever_its_rows():
    """The loss of the drawn rows of a stage: `rows` of them, each for the steps of its stage."""
    learner, rollout, _ = staged([2], stages=2, inner=1, updates=1, critic_updates=1, rows=40)
    first = next(learner.updates(rollout, torch.Generator().manual_seed(0)))
    assert isinstance(first, Update)
    assert [count(term.rows) for term in first.terms] == [40]
    values, _ = first.terms[0].loss(torch.arange(40))
    parts = torch.cat([first.terms[0].loss(rows)[0] for rows in torch.arange(40).split(7)]).detach()
    close(parts, values.detach(), atol=1e-12, other_rows=values.detach().flip(0))
    close(total(first).detach(), values.mean().detach(), summed=values.sum().detach())


def test_what_it_needs_is_refused_with_a_remedy():
    made = model(VP)
    with pytest.raises(ValueError, match=r"sampler\.eta: .*set it above 0"):
        sa.PIFT().build(setting(made, eta=0.0))
    with pytest.raises(ValueError, match=r"reward: pi_ft needs its gradient"):
        sa.PIFT().build(setting(made, differentiable=False))


def test_the_value_at_the_data_is_the_reward_where_sigma_there_is_not_0():
    """Stable Diffusion's table keeps sigma = 0.029 at t = 0, where a critic that never saw it would say something too."""
    made = model(sa.TableVP.scaled_linear())
    learner = sa.PIFT(beta=BETA).build(setting(made, steps=4, batch=8))
    learner.critic.double()
    made.net.double()
    learner.critic.scale.calibrate(f64([-1.0, 0.0, 1.0]))
    nn.init.normal_(learner.critic.net.last.weight)
    states = points(f64([[-1.0], [0.5]]), f64([0.0, 0.2]))
    value, grad = learner.value(states), learner.gradient(states)
    soft = pi_ft.soft_q(learner, states, gradient=True)
    with_critic = learner.critic(*states, soft.value).detach()
    close(value[0], soft.value[0], atol=1e-9, with_critic=with_critic[0])
    close(grad[0], soft.grad[0], atol=1e-9, with_critic=grad[0] + learner.critic.gradient(*states)[0])
    close(value[1], with_critic[1], atol=1e-9, alone=soft.value[1])
