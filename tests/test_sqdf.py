"""Truth: SQDF's fixed points on Gaussian data in closed form, and autograd through the published loss written by hand."""

import math

import pytest
import torch
from affine import BETA, LAW, REWARD, exactly, gradient, model, none, points, setting
from driving import count, each
from torch import nn
from twins import F64, close, f64

import scoreaction as sa
from scoreaction.algorithms._setting import Objective
from scoreaction.algorithms._step import StepWeights, minimiser
from scoreaction.algorithms._value import kl_to_go
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.diffusion.noise import RowNoise, drawn_seed
from scoreaction.diffusion.solvers import ddim_step, time_grid
from scoreaction.networks.conditions import take
from scoreaction.types import Prediction
from scoreaction.world import ALONE

VP = sa.VP()
LINEAR, QUADRATIC = Quadratic.linear([1.0]), Quadratic(torch.eye(1), torch.zeros(1), torch.ones(1))


def learner(*, reward=REWARD, steps=50, batch=64, eta=1.0, process=VP, **config):
    fixed = setting(model(process), steps=steps, batch=batch, eta=eta, grid="uniform")
    return sa.SQDF(beta=BETA, **config).build(fixed._replace(reward=Objective(lambda x0, prompt: reward(x0), True)))


def update_of(agent, rollout, seed):
    """The first update of an iteration."""
    return next(agent.updates(rollout, torch.Generator().manual_seed(seed)))


def fixed_point(reward, *, gamma=1.0, rho=0.0, left_off_by=0, kl_discounted=False):
    """Mean, variance and KL of the chain whose every step is where one more improvement changes nothing."""
    agent = learner(reward=reward, weights="chain", gamma=gamma, discount_rate=rho)
    times = time_grid(VP, 50)
    t, s = times[:-2].repeat_interleave(2), times[1:-1].repeat_interleave(2)  # the reference acts in the last step
    left = 49 - torch.arange(49).repeat_interleave(2) + left_off_by
    x = f64([0.0, 1.0]).repeat(49)[:, None]
    weights = StepWeights.of_chain(VP, t, s, 1.0)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    pretrained = LAW.prediction(VP, x, t).x0
    x0 = pretrained.clone()
    beta = BETA * agent.discount(s, left)[:, None] if kl_discounted else BETA
    for _ in range(12):  # an iteration's error is at most a tenth of the one before
        mean = ddim_step(VP, Prediction(x0, (x - alpha * x0) / sigma), t, s, 1.0).mean
        grad = agent.gradient(points(mean, s), left)[0]
        x0 = minimiser(weights, grad_value=grad, pretrained=pretrained, old=x0, beta=beta, trust=0.0)
    base = ddim_step(VP, Prediction(pretrained, (x - alpha * pretrained) / sigma), t, s, 1.0)
    mean = ddim_step(VP, Prediction(x0, (x - alpha * x0) / sigma), t, s, 1.0).mean
    m, v, kl = VP.alpha(f64(1.0)) * 0.3, VP.alpha(f64(1.0)) ** 2 * 0.8 + VP.sigma2(f64(1.0)), 0.0
    for i in range(49):
        (b, A), shift = (mean[2 * i, 0], mean[2 * i + 1, 0] - mean[2 * i, 0]), (mean - base.mean)[2 * i : 2 * i + 2, 0]
        k2, slope = base.std[2 * i] ** 2, shift[1] - shift[0]
        kl += ((shift[0] + slope * m) ** 2 + slope**2 * v) / (2 * k2)
        m, v = A * m + b, A**2 * v + k2
    last = LAW.prediction(VP, f64([[0.0], [1.0]]), times[-2]).x0[:, 0]  # k = 0: x0_hat itself
    slope = last[1] - last[0]
    return torch.stack([slope * m + last[0], slope**2 * v, kl])


def test_fixed_points_with_the_packages_soft_q():
    """Values of the closed form; twins are a discount of one step more, a discounted KL and none at all."""
    plain = fixed_point(LINEAR)
    close(plain, [1.65877596, 0.67941562, 1.35877596], atol=2e-6, discounted=fixed_point(LINEAR, gamma=0.9))
    discounted = fixed_point(LINEAR, gamma=0.9)
    wrong = {"one_step_more": fixed_point(LINEAR, gamma=0.9, left_off_by=1), "undiscounted": plain}
    wrong["kl_discounted"] = fixed_point(LINEAR, gamma=0.9, kl_discounted=True)
    close(discounted[[0, 2]], [0.71680513, 0.17768972], atol=2e-6, **{name: value[[0, 2]] for name, value in wrong.items()})
    close(fixed_point(QUADRATIC)[:2], [0.81329887, 0.25323191], atol=2e-6, chain_optimum=[0.70323591, 0.30027762])
    by_clock = fixed_point(LINEAR, rho=-50 * math.log(0.9))
    close(by_clock, discounted, atol=1e-9, per_step=fixed_point(LINEAR, rho=-math.log(0.9)))


def test_the_discount_counts_what_is_left():
    by_step, clock = learner(gamma=0.9), learner(discount_rate=-50 * math.log(0.9))
    s, left = time_grid(VP, 50)[1:], 49 - torch.arange(50)
    close(by_step.discount(s, left), 0.9 ** left.double(), done_so_far=0.9 ** (49 - left).double())
    close(clock.discount(s, left), by_step.discount(s, left), atol=1e-12, reversed_clock=clock.discount(1 - s, left))


@pytest.mark.parametrize("jitter", ["backward", "forward"])
def test_the_discount_of_a_step_does_not_move_with_its_grid(jitter):
    """On jittered grids too the state of step i has N - i steps left."""
    agent, seen = learner(gamma=0.5, steps=5, batch=16, updates=1, rows=64), []
    agent.gradient = lambda states, left: seen.append((states.t, left)) or (torch.zeros_like(states.x), states.x)
    seed = {"backward": 1, "forward": 0}[jitter]
    rollout = exactly(agent, 16, seed)
    moved = float(rollout.times[1] - 0.8)
    update_of(agent, rollout, 0)
    t, left = seen[0]
    truth = 5 - (t[:, None] == rollout.times[:-1]).double().argmax(1)
    by_time = (agent.sampler.times(VP) < t[:, None] - 1e-9).sum(1)  # off by one where the grid moved to more noise
    wrong = {"by_time": by_time} if moved > 0 else {"one_more": truth + 1}
    close(left, truth, atol=0, **wrong)
    assert (moved > 0) == (jitter == "forward")


def by_hand(agent, rollout, seed, *, weights, gamma=1.0, discounted_kl=False, kl=1.0, soft=True, steps=None):
    """`E[-gamma^k r(x0_hat(x_s)) + beta KL_step]` with the draws and the noise of that seed, as published; its gradient.

    `path`: the limit of short steps, x_s at x_t, both terms by the integral of g^2.
    """
    made, config, N = agent.model, agent.config, agent.sampler.steps
    generator = torch.Generator().manual_seed(seed)
    steps = N - 1 if weights == "chain" else N
    first, batch = int(torch.randint(rollout.size[1], (), generator=generator)), rollout.size[1]  # each trajectory in turn
    path = (first + torch.arange(config.rows)) % batch
    step = (torch.rand(config.rows, generator=generator, dtype=F64) * steps).long()
    x = rollout.x[step, path].float()  # what the buffer keeps
    t, s = rollout.times[step], rollout.times[step + 1]
    new, before = made.predict(x, t), made.reference(x, t)
    k2 = VP.sigma2(s) / VP.sigma2(t) * (VP.sigma2(t) - (VP.alpha(t) / VP.alpha(s)) ** 2 * VP.sigma2(s))
    down = (VP.sigma2(s) - k2).clamp(min=0).sqrt()[:, None]
    mean, base = (VP.alpha(s)[:, None] * p.x0 + down * p.eps for p in (new, before))
    z = RowNoise(drawn_seed(generator), torch.arange(config.rows)).normal(x.shape, x.dtype)
    x_s = mean + k2.clamp(min=0).sqrt()[:, None] * z
    place, at, left = (x_s, s, N - 1 - step) if weights == "chain" else (x.clone().requires_grad_(), t, N - step)
    clean = LAW.prediction(VP, place, at).x0 if soft else place
    discount = gamma ** left.double()
    value = discount * REWARD(clean)
    if weights == "chain":
        cost = ((mean - base) ** 2)[:, 0] / (2 * k2)
    else:  # 1/2 g^2 dt ||ds||^2, and the gain moved into the same weights
        scores = [-p.eps / VP.sigma(t)[:, None] for p in (new, before)]
        integral = (t - s) * VP.g2((t + s) / 2)
        cost = integral / 2 * ((scores[0] - scores[1]) ** 2)[:, 0]
        (slope,) = torch.autograd.grad(value.sum(), place)
        value = integral * (slope * scores[0])[:, 0]
    if discounted_kl:
        cost = cost * discount
    loss = (kl * BETA * cost - value).mean() * steps
    return torch.autograd.grad(loss, made.parameters["th"])[0].double()


@pytest.mark.parametrize("weights", ["chain", "path"])
def test_one_update_is_the_published_gradient(weights):
    """Reward, x0_hat, x_s, one policy step, minus gamma^k of it, plus beta KL that is not discounted."""
    agent = learner(steps=8, batch=32, weights=weights, gamma=0.8, updates=1, rows=400)
    rollout = exactly(agent, 32)
    if weights == "chain":  # its own grid, in whose last step the pretrained model acts
        rollout = exactly(agent, 32, times=agent.sampler.times(VP))
    update = update_of(agent, rollout, 3)
    written = {
        name: by_hand(agent, rollout, 3, weights=weights, **{"gamma": 0.8, **options})
        for name, options in {
            "right": {},
            "no_discount": {"gamma": 1.0},
            "kl_discounted": {"discounted_kl": True},
            "kl_without_half": {"kl": 2.0},
            "no_kl": {"kl": 0.0},
            "reward_of_x_s": {"soft": False},
        }.items()
    }
    right = written.pop("right")
    # a float32 network and buffer: 1e-5 of terms of size 1
    close(gradient(agent.model, iter_of(update)), right, rtol=1e-4, atol=2e-5, **written)
    assert [(count(term.rows), term.calls) for term in update.terms] == [(400, 1)]


def test_on_the_chain_what_a_row_draws_does_not_depend_on_the_rows_of_a_call():
    def values(size, seed=3):
        agent = learner(steps=8, batch=32, weights="chain", updates=1, rows=60)
        (term,) = update_of(agent, exactly(agent, 32, times=agent.sampler.times(VP)), seed).terms
        losses = [term.loss(rows)[0] for rows in torch.arange(60).split(size)]
        return torch.cat(losses).detach()

    close(values(7), values(60), atol=1e-5, other_noise=values(60, seed=4))


def iter_of(update):
    yield update


@pytest.mark.parametrize("options", [{"weights": "chain"}, {"weights": "path"}, {"priority": 1.0}], ids=str)
def test_the_loss_is_a_function_of_its_rows(options):
    """The same in parts, in any order and twice: its noise is drawn before, each row has its own."""
    agent = learner(steps=8, batch=32, updates=1, rows=60, **options)
    rollout = exactly(agent, 32)
    (term,) = update_of(agent, rollout, 3).terms
    values, rows = term.loss(torch.arange(60))[0].detach(), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    parts = torch.cat([term.loss(part)[0] for part in rows.split(7)]).detach()
    (other,) = update_of(agent, rollout, 4).terms
    close(parts, values[rows], atol=1e-5, in_order=values, other_draws=other.loss(rows)[0].detach())


def test_the_pretrained_prediction_is_the_soft_qs_own():
    """On the path its x0_hat was evaluated for the gradient: the KL is to it, and no network is evaluated again."""
    for config in ({}, {"x0_steps": 3}, {"weights": "chain"}):
        agent = learner(steps=8, batch=32, updates=1, rows=60, **config)
        agent.replay.add(exactly(agent, 32))
        agent.model.max_rows = 37  # all rows come back from parts
        generator = torch.Generator().manual_seed(0)
        drawn, rows = agent.replay.draw(agent.model, 60, torch.arange(7), generator)
        agent.model.evaluations.forward = 0
        steps, _ = agent._complete(drawn, rows, generator)
        assert agent.model.evaluations.forward == {"x0_steps": 4, "weights": 1}.get(next(iter(config), ""), 1) * 60
        truth = LAW.prediction(VP, drawn.x, drawn.t)
        for part, right, other in zip(steps.pretrained, truth, drawn.old, strict=True):
            close(part, right, atol=1e-4, the_policy_that_sampled=other)


def test_the_last_step():
    """`chain`: the pretrained model acts in a step without noise and it is not drawn; `path`: it is a step as any other."""
    chain, path = (learner(steps=4, batch=64, weights=w, updates=1, rows=300) for w in ("chain", "path"))
    rollout = chain.explore(none(64), chain.times(torch.Generator()), torch.Generator().manual_seed(0))
    with torch.no_grad():
        pretrained, policy = (f(rollout.x[3], rollout.times[3]).x0 for f in (chain.model.reference, chain.model.predict))
    close(rollout.old.x0[3], pretrained, atol=1e-6, policy=policy)
    for agent, last in ((chain, False), (path, True)):
        seen = []
        agent.gradient = lambda states, left, seen=seen: seen.append(states.t) or (torch.zeros_like(states.x), states.x)
        rollout = exactly(agent, 64)
        list(each(agent.updates(rollout, torch.Generator().manual_seed(0))))
        place = rollout.times[-2] if last else 0.0
        assert bool((seen[0] == place).any()) == last
    x = f64([[-1.0], [2.0]])
    grad = learner(gamma=0.5).gradient(points(x, [0.0, 0.0]), torch.tensor([0, 0]))[0]
    close(grad, 1.2 - x, discounted=0.5 * (1.2 - x))
    with pytest.raises(ValueError, match=r"sampler\.steps.*at least 2"):
        update_of(learner(steps=1, batch=4, weights="chain"), exactly(learner(steps=1, batch=4), 4), 0)
    flow = learner(steps=1, batch=4, process=sa.Flow())
    with pytest.raises(ValueError, match=r"sampler\.steps.*at least 2"):
        update_of(flow, exactly(flow, 4), 0)


def test_the_correction_is_a_residual_on_the_whole_soft_q():
    """Q = r(x0_hat) + c_out F: its skip is 1 at every t, its gradient that of both terms, and nothing at the data."""
    torch.manual_seed(0)
    agent = learner(correction=True)
    nn.init.normal_(agent.critic.net.last.weight)
    agent.critic.double()
    t, x = f64([0.0, 0.2, 0.6, 1.0]), f64([[-1.0], [0.5], [1.0], [2.0]])
    look, left = f64([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, dtype=torch.long)
    complete, without = (agent.critic(x, t, none(4), seen).detach() for seen in (look, None))
    close(complete - without, look, alpha2_skip=VP.alpha(t) ** 2 * look, no_skip=0 * look)
    leaf = x.clone().requires_grad_()
    look = REWARD(torch.cat([leaf[:1], LAW.prediction(VP, leaf[1:], t[1:]).x0]))
    (whole,) = torch.autograd.grad(agent.critic(leaf, t, none(4), look).sum(), leaf, retain_graph=True)
    (alone,) = torch.autograd.grad(look.sum(), leaf)
    grad, _ = agent.gradient(points(x, t), left)
    close(grad, whole, atol=1e-9, uncorrected=alone)
    close(grad[0], 1.2 - x[0], atol=1e-7, other=grad[1])


def chain_kl_to_go(rollout):
    """By the law of each step, (n, batch); the last has no noise."""
    costs = []
    for i, (t, s) in enumerate(zip(rollout.times[:-2], rollout.times[1:-1], strict=True)):
        here, there = (ddim_step(VP, Prediction(p.x0[i], p.eps[i]), t, s, 1.0) for p in (rollout.old, rollout.pretrained))
        costs.append(here.kl(there))
    costs.append(torch.zeros_like(costs[0]))
    return torch.stack([sum(costs[i:]) for i in range(len(costs))])


@pytest.mark.parametrize("weights", ["path", "chain"])
def test_the_corrections_target_is_reward_minus_the_kl_to_go(weights):
    """The KL that the policy's steps pay. Twins: none, without beta, that of the other form, the soft Q."""
    agent = learner(correction=True, steps=6, batch=50, critic_rows=200, critic_updates=1, updates=1, rows=8, weights=weights)
    rollout = exactly(agent, 50)
    agent.critic.scale.calibrate(rollout.rewards)
    agent.critic.double()
    ((_, value, _),) = each(agent._critic_updates(rollout, torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(5)
    order = ALONE.dealt(6, 50, 200, generator).own
    rows = order[torch.randint(200, (25,), generator=generator)]
    costs = {"path": kl_to_go(VP, 1.0, rollout), "chain": chain_kl_to_go(rollout)}
    cost, other = (costs[form].flatten()[rows] for form in (weights, {"path": "chain", "chain": "path"}[weights]))
    states = take(rollout.steps().states, rows)
    look = REWARD(LAW.prediction(VP, states.x, states.t).x0)
    reward = rollout.rewards.repeat(6)[rows]
    critic = agent.critic(*states, look).detach()

    def loss(target):
        return float((((critic - target) / agent.critic.scale.spread) ** 2).mean())

    wrong = {"no_kl": loss(reward), "beta_dropped": loss(reward - cost), "soft_q_itself": loss(look)}
    wrong["the_other_form"] = loss(reward - BETA * other)
    close(value.detach(), loss(reward - BETA * cost), rtol=1e-5, atol=0, **wrong)


@pytest.mark.parametrize("parts", [40, 7])
def test_priority_is_the_distance_to_where_the_row_would_go(parts):
    """`cost/2 ||x0_hat - minimiser||^2`, the nats of what is left to do, of each row where it was drawn from."""
    agent = learner(steps=6, batch=20, updates=1, rows=40, priority=1.0)
    rollout = exactly(agent, 20)
    drawn, draw = [], agent.replay.draw
    agent.replay.draw = lambda *options: drawn.append(draw(*options)) or drawn[-1]
    (term,) = update_of(agent, rollout, 0).terms
    for rows in torch.arange(40).split(parts):
        term.loss(rows)
    ((steps, _),) = drawn
    weights = StepWeights.of_path(VP, steps.t, steps.s, 1.0)
    with torch.no_grad():
        old, pretrained = (f(steps.x, steps.t).x0 for f in (agent.model.predict, agent.model.reference))
    grad = agent.gradient(steps.states, agent.sampler.steps - steps.step)[0]
    best = minimiser(weights, grad_value=grad, pretrained=pretrained, old=old, beta=BETA, trust=0.0)
    gap = weights.cost / 2 * (old - best)[:, 0].double() ** 2
    kept = agent.replay.weights[steps.path, steps.step]
    moved = weights.cost / 2 * (old - pretrained)[:, 0] ** 2
    close(kept, gap, rtol=1e-4, atol=1e-6, root=gap.sqrt(), so_far=moved)
    untouched = agent.replay.weights.clone()
    untouched[steps.path, steps.step] = 1.0
    assert bool((untouched == 1.0).all())


def test_a_buffer_is_off_policy_and_says_so():
    """Trajectories of three iterations are drawn, with the x0_hat of the policy that made each."""
    agent = learner(steps=4, batch=8, buffer=20, updates=1, rows=200)
    drawn, draw = [], agent.replay.draw
    agent.replay.draw = lambda *options: drawn.append(draw(*options)) or drawn[-1]
    rollouts = []
    for seed in range(3):
        with torch.no_grad():
            agent.model.parameters["th"].add_(0.1)
        rollouts.append(exactly(agent, 8, seed))
        updates = list(each(agent.updates(rollouts[-1], torch.Generator().manual_seed(seed))))
        assert [update.network for update, _, _ in updates] == ["policy"]
        assert agent.state.replay_pairs == 4 * min(20, 8 * (seed + 1))
    (steps, _), old = drawn[-1], torch.cat([rollout.old.x0 for rollout in rollouts], 1)
    path = torch.where(steps.path < 4, steps.path + 20, steps.path)  # the newest four lie over the oldest
    now = agent.model.predict(steps.x, steps.t).x0.detach()
    close(steps.old.x0, old[steps.step, path], atol=1e-6, policy_now=now, other_path=old[steps.step, steps.path])
    assert learner(batch=8, buffer=3).replay.x.shape[0] == 8  # never less than what was just seen


def test_what_a_choice_needs_is_refused_with_a_remedy():
    made = model(VP)
    cases = [
        (sa.SQDF(), {"differentiable": False}, r"reward: sqdf needs its gradient"),
        (sa.SQDF(), {"eta": 0.0}, r"sampler\.eta: .*set it above 0"),
        (sa.SQDF(weights="chain"), {"solver": "euler_maruyama"}, r"sampler\.solver: .*weights: path"),
        (sa.SQDF(x0_hat="consistency"), {}, r"algorithm\.x0_hat: .*x0_hat: reference"),
    ]
    for config, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            config.build(setting(made, **options))
        assert "\n" not in str(error.value)
        config.build(setting(made)) if config.x0_hat == "reference" else None
    for bad, message in (
        ({"discount_rate": 1.0, "gamma": 0.9}, "two ways to say one thing"),
        ({"correction": True, "gamma": 0.9}, "the bias that a discount hides"),
        ({"correction": True, "discount_rate": 1.0}, "the bias that a discount hides"),
        ({"gamma": 1.1}, "gamma"),
        ({"importance": 2.0}, "importance"),
    ):
        with pytest.raises(ValueError, match=message):
            sa.SQDF(**bad)


def test_it_reads_a_consistency_model():
    """x0_hat by the model's consistency function, and its gradient in x."""
    made = model(VP)
    made.add_consistency()
    with torch.no_grad():
        made.consistency_net.th.copy_(f64([0.1, 0.4]))
    agent = sa.SQDF(x0_hat="consistency").build(setting(made))
    x, t = f64([[-1.0], [0.5]]), f64([0.3, 0.7])
    value, grad, x0 = agent.soft_q(points(x, t), gradient=True)
    leaf = x.clone().requires_grad_()
    truth = REWARD(made.consistency(leaf, t))
    plain = sa.SQDF().build(setting(made)).soft_q(points(x, t), gradient=True)
    close(value, truth.detach(), atol=1e-9, reference=plain.value)
    close(grad, torch.autograd.grad(truth.sum(), leaf)[0], atol=1e-9, none=torch.zeros(2, 1))
    close(x0, made.consistency(x, t).detach(), atol=1e-9, reference=plain.x0)
    assert value.dtype == F64
