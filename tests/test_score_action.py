"""Truth: the linear-quadratic case, where value, advantage, performance difference and policy gradient are closed forms."""

import math

import pytest
import torch
from affine import BETA, NEW, OLD, REWARD, ExactValue, experienced, learner, model, none, policy, problem, setting
from driving import each
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._value import kl_to_go, running_cost
from scoreaction.algorithms.score_action import advantage_rate, score_action_loss
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout

VP, FLOW = sa.VP(), sa.Flow()

CASES = [(VP, 1.0, 1.0, 0.15118503), (VP, 0.5, 1.0, 0.11604798), (FLOW, 1.0, 0.999, 0.15514772), (FLOW, 0.5, 0.999, 0.14328653)]

IDS = ["VP-1", "VP-.5", "Flow-1", "Flow-.5"]

GRADIENTS = {"VP-1": (-0.1202011, 0.4413656), "VP-.5": (-0.1752086, 0.3905666)}


def gauss(mean, variance, nodes=3):
    """Points (T, nodes) and weights (nodes,) that integrate a polynomial of degree 5 against N(mean, variance) exactly."""
    points, weights = f64([-math.sqrt(3), 0.0, math.sqrt(3)]), f64([1 / 6, 2 / 3, 1 / 6])
    return mean[:, None] + variance.clamp(min=0).sqrt()[:, None] * points, weights


def integral(values, t):
    """Over times t (T,), of the mean over nodes of values (T, nodes)."""
    return float(torch.trapezoid(values @ f64([1 / 6, 2 / 3, 1 / 6]), t))


def dense(end):
    """Times dense at both ends."""
    u = torch.linspace(0, 1, 4001, dtype=F64)
    return (u**2 * (3 - 2 * u) * end).clamp(max=0.9995 if end < 1 else 1.0)


def scores(process, x, t):
    """s_pre, old and new score at x (T, nodes), t (T,)."""
    alpha = process.alpha(t)[:, None]
    P = 0.8 * alpha**2 + process.sigma2(t)[:, None]
    base = -(x - alpha * 0.3) / P
    return base, *(base + slope * alpha**2 * x + offset * alpha for slope, offset in (OLD, NEW))


@pytest.mark.parametrize(("process", "eta", "end", "truth"), CASES, ids=IDS)
def test_performance_difference_is_the_integrated_advantage(process, eta, end, truth):
    """`J(new) - J(old) = E_new integral q_old dtau`, with the package's q and the exact gradient of the old value."""
    old, new, t = ExactValue(process, eta, OLD, end=end), ExactValue(process, eta, NEW, end=end), dense(end)
    x, _ = gauss(*new.law(t))
    flat, times = x.reshape(-1, 1), t.repeat_interleave(3)
    base, before, after = (s.reshape(-1, 1) for s in scores(process, x, t))

    def difference(*, beta=BETA, drift=1.0, at_eta=eta):
        given = {"old": before, "pretrained": base, "grad_value": drift * old.grad(flat, times), "g2": process.g2(times)}
        q = advantage_rate(after, **given, eta=at_eta, beta=beta)
        return integral(q.reshape(-1, 3), t)

    wrong = {"beta_dropped": difference(beta=1.0), "sign_of_drift": difference(drift=-1.0)}
    if eta < 1:
        wrong |= {"kl_weight_of_eta_1": difference(at_eta=1.0), "drift_without_c": difference(drift=2 / (1 + eta**2))}
    close(difference(), truth, rtol=2e-3, atol=0, **wrong)
    given = {"old": before, "pretrained": base, "grad_value": flat, "g2": process.g2(times)}
    still = advantage_rate(before, **given, eta=eta, beta=BETA)
    close(still, 0.0, atol=1e-12, new=still + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("process", "eta", "end", "truth"), CASES, ids=IDS)
def test_the_losss_gradient_at_old_is_the_policy_gradient(process, eta, end, truth, request):
    """`score_action_loss` at the old policy, integrated over its own law: within 1 % of the slope of the objective."""
    old, t = ExactValue(process, eta, OLD, end=end), dense(end)[1:]
    x, _ = gauss(*old.law(t))
    flat, times = x.reshape(-1, 1), t.repeat_interleave(3)
    base, before, _ = (s.reshape(-1, 1) for s in scores(process, x, t))
    th = f64(OLD).requires_grad_()
    alpha = process.alpha(times)[:, None]

    def gradient(*, value=1.0, beta=BETA, at_eta=eta):
        loss = score_action_loss(
            base + th[0] * alpha**2 * flat + th[1] * alpha, old=before, pretrained=base,
            grad_value=value * old.grad(flat, times), g2dt=process.g2(times), eta=at_eta, beta=beta, trust=3.0,
        )  # fmt: skip
        weighted = torch.trapezoid(loss.reshape(-1, 3) @ f64([1 / 6, 2 / 3, 1 / 6]), t)
        return -torch.autograd.grad(weighted, th, retain_graph=True)[0]

    lq, h = problem(process, eta), 1e-3

    def objective(a, b):
        return lq.affine_objective(*policy(process, (a, b)), start=lq.marginal(f64(end)), t=end)

    slope = [
        (objective(OLD[0] + h, OLD[1]) - objective(OLD[0] - h, OLD[1])) / (2 * h),
        (objective(OLD[0], OLD[1] + h) - objective(OLD[0], OLD[1] - h)) / (2 * h),
    ]
    name = next(i for i in IDS if i in request.node.name.split("[")[1])
    if name in GRADIENTS:
        close(slope, GRADIENTS[name], atol=2e-6, sign=[-s for s in slope])
    wrong = {"sign": -gradient(), "no_kl": gradient(beta=0.0), "beta_dropped": gradient(beta=1.0)}
    if eta < 1:
        c = (1 + eta**2) / 2
        wrong |= {"eta_1": gradient(at_eta=1.0), "drift_without_c": gradient(value=1 / c)}
    close(gradient(), slope, rtol=0.01, atol=0, **wrong)


def ascent(found, made, experience, generator):
    """The direction in which an iteration's losses push, all at the old policy."""
    made.parameters["th"].grad = None
    for _, value, _ in each(found.updates(experience, generator)):
        value.backward()
    return -made.parameters["th"].grad.clone()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["pathwise", pytest.param("likelihood_ratio", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("process", "eta", "name"), [(VP, 1.0, "VP-1"), pytest.param(VP, 0.5, "VP-.5", marks=pytest.mark.long)]
)
def test_both_estimators_of_a_run_give_the_policy_gradient(process, eta, name, estimator):
    """Rollout, reference, running cost, advantage, weights and clip as in training; only V is given."""
    exact = ExactValue(process, eta, OLD)
    options = {"updates": 1, "rows": 10**7} | ({} if estimator == "pathwise" else {"clip": 100.0, "gae_lambda": 0.5})
    found, made = learner(process, eta, estimator, steps=300, batch=800, exact=exact, **options)
    draws = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        draws.append(ascent(found, made, experienced(found, 800, generator), generator))
    draws = torch.stack(draws).double()
    # the steps' own error, of first order, is within a third of the tolerance at 300 steps
    error = (draws.std(0).square().mean().sqrt() / 2).clamp(min=0.005)
    mean, truth = draws.mean(0), f64(GRADIENTS[name])
    wrong = {"sign": -mean, "a_mean_over_steps": mean / 300, "zero": 0 * mean}
    close(mean, truth, atol=3 * float(error), **wrong)
    if eta < 1:
        other = f64(GRADIENTS["VP-1"])
        assert float((truth - other).abs().max()) > 3 * float(error)


@pytest.mark.slow
def test_the_sampled_gradient_improves_on_the_objective():
    """A hundred small steps of the run's own updates with the exact value of each old policy raise the closed-form J."""
    lq = problem(VP, 1.0)
    start = lq.marginal(f64(1.0))
    found, made = learner(VP, 1.0, "pathwise", steps=50, batch=256, exact=ExactValue(VP, 1.0, OLD), updates=1, rows=2000)
    generator = torch.Generator().manual_seed(0)
    direction = ascent(found, made, experienced(found, 256, generator), generator)

    def objective(step):
        return lq.affine_objective(*policy(VP, [a + step * float(d) for a, d in zip(OLD, direction, strict=True)]), start=start)

    def rises(step):
        assert objective(step) > objective(0.0) + 0.5 * step * float(direction.square().sum())

    accepts(rises, 0.05, descent=-0.05)


@pytest.mark.slow
def test_times_drawn_at_random_are_unbiased():
    """The mean, over draws of (path, time) points, of the loss of few points is the loss of all points."""
    exact = ExactValue(VP, 1.0, OLD)
    whole, made = learner(VP, 1.0, "pathwise", steps=20, batch=64, exact=exact, updates=1, rows=20 * 64)
    experience = experienced(whole, 64, torch.Generator().manual_seed(0))
    truth = ascent(whole, made, experience, torch.Generator())
    few, made = learner(VP, 1.0, "pathwise", steps=20, batch=64, exact=exact, updates=1, rows=40)
    raw = Rollout(*(getattr(experience, name) for name in ("times", "x", "old", "action", "prompt", "rewards")))
    draws = []
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        draws.append(ascent(few, made, few.prepare(raw, generator), generator))
    draws = torch.stack(draws)
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(150)

    def check(value):
        assert bool(((value - truth).abs() < 3 * error).all()), (value, truth, error)

    accepts(check, mean, a_mean_over_times=mean / 20, a_sum_over_points=mean * 2)
    split, made = learner(VP, 1.0, "pathwise", steps=20, batch=64, exact=exact, updates=4, rows=320)
    parts = ascent(split, made, split.prepare(raw, torch.Generator().manual_seed(5)), torch.Generator())
    close(parts / 4, truth, rtol=1e-4, atol=1e-6, one_update_only=parts)


@pytest.mark.slow
def test_the_target_is_reward_minus_beta_times_kl_to_go():
    """Its conditional mean is V: mean residual at every time, to the error of 100 steps and three standard errors."""
    exact = ExactValue(VP, 1.0, NEW)
    found, _ = learner(VP, 1.0, "pathwise", steps=100, batch=4000, parameters=NEW, updates=1, rows=10**7)
    experience = experienced(found, 4000, torch.Generator().manual_seed(0))
    kl, points = kl_to_go(VP, 1.0, experience), experience.steps()
    truth = exact.value(points.x, points.t).reshape(100, 4000)
    target = torch.empty(400_000)
    target[experience.chosen.own] = experience.target
    target = target.reshape(100, 4000)
    error = 3 * (target - truth).std(1) / math.sqrt(4000) + 0.04
    reward = experience.rewards[None]

    def check(values):
        apart = (values - truth).mean(1).abs()
        assert bool((apart < error).all()), (apart / error).max()

    wrong = {"beta_dropped": reward - kl, "no_kl": reward.expand_as(target), "kl_so_far": reward - BETA * (kl[:1] - kl)}
    accepts(check, target, without_half=reward - 2 * BETA * kl, **wrong)


@pytest.mark.slow
def test_running_cost_is_the_path_kl():
    """Two policies of known laws; the sum of the costs of an iteration is the nats between them, at any eta."""
    for eta in (1.0, 0.5):
        found, _ = learner(VP, eta, "pathwise", steps=100, batch=2000, parameters=NEW)
        experience = experienced(found, 2000, torch.Generator().manual_seed(0))
        cost = running_cost(VP, eta, experience).sum(0)
        lq, start = problem(VP, eta), problem(VP, eta).marginal(f64(1.0))
        law = ExactValue(VP, eta, NEW).law(f64([0.0]))
        reward = float(-(law[1] + (law[0] - 1) ** 2) / 2 + 0.2 * law[0])
        truth = (reward - lq.affine_objective(*policy(VP, NEW), start=start)) / BETA
        wrong = {"mean": cost.mean() / 100, "without_half": 2 * cost.mean()}
        if eta < 1:
            wrong["eta_1_weight"] = cost.mean() / ((1 + eta**2) / (2 * eta)) ** 2
        close(cost.mean(), truth, rtol=0.05, atol=3 * float(cost.std()) / math.sqrt(2000), **wrong)


def test_a_step_costs_the_mean_of_its_ends():
    """By hand, on the path's own squares; the last step, at whose end there is no score, takes its beginning. Twin: all do."""
    found, _ = learner(VP, 1.0, "pathwise", steps=4, batch=3, parameters=NEW)
    experience = experienced(found, 3, torch.Generator().manual_seed(0))
    difference, times = experience.difference().eps[..., 0].double(), experience.times
    squares = difference**2 / VP.sigma2(times[:-1])[:, None]
    weight = (VP.g2((times[:-1] + times[1:]) / 2) * (times[:-1] - times[1:]) / 2)[:, None]
    truth = weight * torch.cat([(squares[1:] + squares[:-1]) / 2, squares[-1:]])
    close(running_cost(VP, 1.0, experience), truth, rtol=1e-4, at_the_beginning=weight * squares)


def test_the_skip_terms_gradient_is_not_forgotten():
    """grad V as updates use it is the gradient of the whole critic, reward at x0_hat included."""
    found, made = learner(VP, 1.0, "pathwise", steps=10, batch=32, updates=1, rows=320)
    experience = experienced(found, 32, torch.Generator().manual_seed(0))
    states, critic = take(experience.steps().states, experience.chosen.own), found.value.critic
    x = states.x.clone().requires_grad_()
    value = critic(x, states.t, states.prompt, REWARD(made.reference(x, states.t).x0))
    (truth,) = torch.autograd.grad(value.sum(), x)
    (alone,) = torch.autograd.grad(critic(x, states.t, states.prompt).sum(), x)
    close(found.value.gradient(states, experience.grad_look), truth, atol=1e-5, skip_without_gradient=alone)
    near = states.t == states.t.min()
    close(truth[near], 1.2 - x.detach()[near], atol=0.25, skip_without_gradient=alone[near])


@pytest.mark.slow
@pytest.mark.parametrize("look", ["surrogate", "zeroth_order", "none"])
def test_black_box_look_aheads_point_the_right_way(look):
    """Near the data the gradient of V must be that of the reward."""
    made = model(VP)
    config = sa.ScoreAction(beta=BETA, look_ahead=look, updates=4, rows=1000, critic_updates=60)
    torch.manual_seed(0)
    found = config.build(setting(made, steps=10, batch=400, differentiable=False))
    assert found.value.look_ahead == look
    optimisers = {name: torch.optim.Adam(net.parameters(), lr=5e-3) for name, net in found.networks.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        experience = experienced(found, 400, generator)
        for update, value, _ in each(found.updates(experience, generator)):
            if update.network != "policy":
                optimisers[update.network].zero_grad()
                value.backward()
                optimisers[update.network].step()
    experience = experienced(found, 400, generator)
    points = take(experience.steps().states, experience.chosen.own)
    grad = found.value.gradient(points, experience.grad_look)[:, 0]
    near = points.t < 0.1
    truth = 1.2 - points.x[near, 0]
    slope = float((grad[near] * truth).mean() / (truth * truth).mean())
    close(slope, 1.0, atol=0.3, sign=-slope, nothing=0.0)


@pytest.mark.parametrize("estimator", ["pathwise", "likelihood_ratio"])
def test_eta_zero_needs_exploration(estimator):
    made = model(VP)
    with pytest.raises(ValueError, match=r"algorithm\.exploration.*set it to 0\.1, or sampler\.eta to 1"):
        sa.ScoreAction(estimator=estimator).build(setting(made, eta=0.0))
    found = sa.ScoreAction(estimator=estimator, exploration=0.1, updates=2, rows=64).build(
        setting(made, eta=0.0, steps=8, batch=16)
    )
    generator = torch.Generator().manual_seed(0)
    rollout = found.explore(none(16), found.times(generator), generator)
    assert float((rollout.action.eps - rollout.old.eps).std()) > 0.05
    direction = ascent(found, made, experienced(found, 16, generator), generator)
    assert bool(torch.isfinite(direction).all())
    assert float(direction.abs().max()) > 0


def test_what_a_choice_needs_is_refused_with_a_remedy():
    made = model(VP)
    for solver, eta, message in (
        ("heun", 0.0, "exploration"),
        ("dpmpp_2m", 0.0, "exploration"),
        ("ddim", 0.0, "exploration"),
        ("sde_dpmpp", 1.0, r"looks back; use ddim or euler_maruyama"),
    ):
        with pytest.raises(ValueError, match=message):
            sa.ScoreAction(estimator="likelihood_ratio").build(setting(made, eta=eta, solver=solver))
    with pytest.raises(ValueError, match="heun takes eta zero"):
        sa.ScoreAction(estimator="likelihood_ratio").build(setting(made, eta=1.0, solver="heun"))
    with pytest.raises(ValueError, match=r"look_ahead.*surrogate, zeroth_order or none"):
        sa.ScoreAction(look_ahead="reward").build(setting(made, differentiable=False))
    assert sa.ScoreAction().build(setting(made, differentiable=False)).value.look_ahead == "surrogate"
    assert sa.ScoreAction().build(setting(made)).value.look_ahead == "reward"
    for bad in ({"beta": 0.0}, {"clip": -1.0}, {"gae_lambda": 1.5}, {"look_ahead": "guess"}, {"betta": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sa.ScoreAction(**bad)


def test_kl_target_moves_beta_the_right_way():
    found, _ = learner(VP, 1.0, "pathwise", steps=5, batch=8, kl_target=1.0)

    def after(kl):
        found.state.beta = 0.5
        found.adapt_beta(kl)
        return found.beta

    close([after(3.0), after(1.0), after(0.0), after(1.1)], [0.51, 0.5, 0.49, 0.505], reversed=[0.49, 0.5, 0.51, 0.495])
    fixed, _ = learner(VP, 1.0, "pathwise", steps=5, batch=8)
    fixed.adapt_beta(100.0)
    assert fixed.beta == BETA
    found.state.kl_floor = 2.0
    close(after(3.0), 0.5, with_the_rounding=0.51)


def test_trust_doubles_where_the_policy_went_too_far_and_rounding_is_not_far():
    def after(kl, trust=4.0, **state):
        state = TrustState(trust=trust, **state)
        adapt_trust(state, kl, least=1.0, region=0.1)
        return state.trust

    close([after(0.2), after(0.05), after(0.05, trust=1.0)], [8.0, 3.6, 1.0], reversed=[3.6, 8.0, 2.0])
    close([after(2.0, kl_floor=1.0), after(2.2, kl_floor=1.0)], [3.6, 8.0], rounding_counts=[8.0, 8.0])
    close(after(0.2, trust=900.0), 1000.0, without_an_end=1800.0)
