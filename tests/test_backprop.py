"""DRaFT and ReFL. Truth: the chain's exact moments, autograd through the chain written by hand, counting what is kept."""

import math
from dataclasses import replace

import pytest
import torch
from affine import BETA, LAW, OLD, REWARD, exactly, gradient, model, none, setting
from driving import count, each, total
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._setting import Objective
from scoreaction.diffusion.noise import RowNoise
from scoreaction.networks.conditions import take
from scoreaction.training.optimizer import Optimisation, Train
from scoreaction.world import ALONE

VP, FLOW = sa.VP(), sa.Flow()


def built(config, *, steps=6, batch=40, process=VP, **options):
    return config.build(setting(model(process), steps=steps, batch=batch, **options))


def objective(th, times, beta):
    """`E r - beta KL` of the affine policy's chain at eta 1 by exact moments; differentiable in th.

    The KL is the path's: `1/2 g^2 (t - s) E(th0 alpha^2 x + th1 alpha)^2` a step, g^2 at its midpoint.
    """
    mean, variance, cost = f64(0.0), f64(VP.prior_std**2), f64(0.0)
    for t, s in zip(times[:-1], times[1:], strict=True):
        a_t, a_s, v_t, v_s = VP.alpha(t), VP.alpha(s), VP.sigma2(t), VP.sigma2(s)
        k2 = v_s / v_t * (v_t - (a_t / a_s) ** 2 * v_s)
        slope, offset = th[0] * a_t**2, th[1] * a_t
        square = (slope * mean + offset) ** 2 + slope**2 * variance
        cost = cost + (t - s) * VP.g2((t + s) / 2) / 2 * square
        probe = f64([[0.0], [1.0]])
        base = LAW.prediction(VP, probe, t)
        move = slope * probe + offset
        x0, eps = base.x0 + v_t / a_t * move, base.eps - v_t.sqrt() * move
        step = (a_s * x0 + (v_s - k2).clamp(min=0).sqrt() * eps)[:, 0]
        A, b = step[1] - step[0], step[0]
        mean, variance = A * mean + b, A**2 * variance + k2
    return -(variance + (mean - 1) ** 2) / 2 + 0.2 * mean - beta * cost


def slope(times, beta):
    th = f64(torch.tensor(OLD)).requires_grad_()
    return torch.autograd.grad(objective(th, times, beta), th)[0]


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_through_all_steps_it_is_the_slope_of_the_chains_own_objective(beta):
    """Of the grid that was run, in standard errors over seeds; with beta the KL is paid with it, states included."""
    apart, means, plain = [], [], []
    for seed in range(6):
        learner = built(sa.DRaFT(last=None, beta=beta), steps=10, batch=4000)
        rollout = exactly(learner, 4000, seed)
        ascent = -gradient(learner.model, learner.updates(rollout, torch.Generator()))
        times = rollout.times
        apart.append(ascent - slope(times, beta))
        means.append(ascent)
        plain.append(slope(times, BETA - beta) - slope(times, beta))
    error = 4 * torch.stack(apart).std(0) / math.sqrt(6)
    assert float(error.max()) < 0.1 * float(torch.stack(means).norm(dim=1).mean())

    def zero(values):
        assert bool((torch.stack(values).mean(0).abs() < error).all())

    twice = [a + m for a, m in zip(apart, means, strict=True)]
    accepts(zero, apart, twice=twice, the_other_kl=[a + p for a, p in zip(apart, plain, strict=True)])


def by_hand(learner, rollout, last, *, beta=0.0):
    """Minus the mean reward (plus beta KL) of the last steps run again with the same noise, autograd through all of it."""
    made, process = learner.model, learner.process
    N = len(rollout.times) - 1
    x, cost = rollout.x[N - last], 0.0
    for i in range(N - last, N):
        t, s = rollout.times[i], rollout.times[i + 1]
        k2 = (
            process.sigma2(s)
            / process.sigma2(t)
            * (process.sigma2(t) - (process.alpha(t) / process.alpha(s)) ** 2 * process.sigma2(s))
        )
        down = (process.sigma2(s) - k2).clamp(min=0).sqrt()
        with torch.no_grad():
            old = made.predict(rollout.x[i], t)
            noise = rollout.x[i + 1] - process.alpha(s) * old.x0 - down * old.eps
        new, base = made.predict(x, t), made.reference(x, t)
        cost = cost + (t - s) * process.g2((t + s) / 2) / 2 * ((new.eps - base.eps) / process.sigma(t))[:, 0] ** 2
        x = process.alpha(s) * new.x0 + down * new.eps + noise
    loss = (beta * cost - REWARD(x)).mean()
    return torch.autograd.grad(loss, made.parameters["th"])[0]


@pytest.mark.slow
@pytest.mark.parametrize("process", [VP, FLOW], ids=["VP", "Flow"])
@pytest.mark.parametrize("last", [1, 3, None])
def test_the_last_steps_by_hand(process, last):
    """Whatever the parts and with or without checkpoints; another number of steps is another gradient."""
    for options in ({}, {"gradient_checkpointing": True}):
        learner = built(sa.DRaFT(last=last, **options), process=process)
        rollout = exactly(learner, 40)
        truth = by_hand(learner, rollout, last or 6)
        wrong = {"other": by_hand(learner, rollout, 4), "sign": -truth}
        (update,) = learner.updates(rollout, torch.Generator())
        held = 1 if options else last or 6  # with checkpoints one evaluation's activations are there at a time
        assert [(count(term.rows), term.calls) for term in update.terms] == [(40, held)]
        close(torch.autograd.grad(total(update), learner.model.parameters["th"])[0], truth, rtol=1e-6, **wrong)
        close(in_parts(learner, update), truth, rtol=1e-6, **wrong)


def in_parts(learner, update, max_rows=7):
    """The gradient as the loop accumulates it."""
    learner.model.max_rows = max_rows
    th = learner.model.parameters["th"]
    th.grad = None
    Optimisation(Train(), learner.model, {}, {}, scaled=False)._backward(update, 0)
    return th.grad.double()


def test_the_kl_of_steps_before_is_local_and_counts_them_all():
    """`before * mean over drawn steps of beta cost/2 ||x0 - x0_pre||^2`, plus the exact one of the last steps."""
    learner = built(sa.DRaFT(last=2, beta=BETA, rows=50))
    rollout = exactly(learner, 40)
    (update,) = learner.updates(rollout, torch.Generator().manual_seed(4))
    assert [(count(term.rows), term.calls) for term in update.terms] == [(50, 1), (40, 3)]
    chosen = ALONE.dealt(4, 40, 50, torch.Generator().manual_seed(4)).own
    truth = by_hand(learner, rollout, 2, beta=BETA)
    local = visited(learner, rollout, chosen)
    wrong = {
        "none_before": truth,
        "all_steps": truth + 6 * local,
        "mean": truth + local,
        "no_kl_last": by_hand(learner, rollout, 2) + 4 * local,
    }
    close(in_parts(learner, update), truth + 4 * local, rtol=1e-6, **wrong)


def visited(learner, rollout, chosen):
    """The gradient of the mean over these visited steps of `beta g^2 dt/2 ||s - s_pre||^2`, the state held fixed."""
    made, at = learner.model, take(rollout.steps(), chosen)
    apart = (made.predict(at.x, at.t).eps - made.reference(at.x, at.t).eps)[:, 0] / VP.sigma(at.t)
    loss = BETA * ((at.t - at.s) * VP.g2((at.t + at.s) / 2) / 2 * apart**2).mean()
    return torch.autograd.grad(loss, made.parameters["th"])[0]


def kept(last, *, steps=8, beta=0.0, checkpointing=False):
    """How many numbers the graph of an iteration's loss keeps."""
    learner = built(sa.DRaFT(last=last, beta=beta, rows=1, gradient_checkpointing=checkpointing), steps=steps)
    rollout, count = exactly(learner, 40), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: count.append(x.numel()) or x, lambda x: x):
        list(each(learner.updates(rollout, torch.Generator().manual_seed(0))))
    return sum(count)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"last": 3}, [3]),
        ({"last": 1, "beta": BETA}, [1, 1]),  # the local KL of steps before, and the last step
        ({"last": 3, "beta": BETA}, [1, 5]),  # the reference's graph begins where the policy's has
        ({"last": 1, "low_variance": 2}, [1, 1, 1]),
    ],
)
def test_a_term_has_as_many_calls_as_its_loss_evaluates_with_a_graph(options, right):
    """Of policy and reference, counted as they leave a graph: by these the loop splits rows into what memory holds."""
    learner, graphs = built(sa.DRaFT(**options, rows=20)), []
    rollout = exactly(learner, 40)

    def watched(predict):
        def call(x, t, prompt):
            prediction = predict(x, t, prompt)
            graphs.append(prediction.x0.requires_grad)
            return prediction

        return call

    learner.policy, learner.pretrained = watched(learner.policy), watched(learner.pretrained)
    (update,) = learner.updates(rollout, torch.Generator().manual_seed(0))
    counted = []
    for term in update.terms:
        graphs.clear()
        term.loss(torch.arange(3))
        counted.append(sum(graphs))

    def same(calls):
        assert calls == counted == right

    accepts(
        same, [term.calls for term in update.terms], steps_alone=[*right[:-1], (options["last"] or 6) + 1], one_more=[0, *right]
    )


@pytest.mark.parametrize("options", [{"last": 1}, {"last": None}, {"last": 2, "beta": BETA}, {"low_variance": 2, "beta": BETA}])
@pytest.mark.parametrize("off_below", [0.0, 0.3])
@pytest.mark.slow
def test_the_last_steps_are_evaluated_once(options, off_below):
    """At once or again from the stored states: one trajectory, one gradient; N evaluations a sample, and K more for again."""
    steps, batch, found = 6, 40, []
    for at_once in (True, False):
        made = model(VP)
        where = setting(made, steps=steps, batch=batch, max_rows=7, off_below=off_below)
        learner = sa.DRaFT(**options).build(
            where._replace(reward=where.reward._replace(at_once=lambda at_once=at_once: at_once))
        )
        times = sa.Sampler(steps=steps).times(VP)
        rollout = learner.explore(none(batch), times, RowNoise(3, torch.arange(batch)))
        assert len(rollout.rewards) == batch * at_once
        score, slope = learner._scored(rollout.x0, rollout.prompt)
        rollout = replace(rollout, rewards=score, reward_gradient=slope)
        assert rollout.x.shape == (steps + 1, batch, 1)
        rollout = learner.prepare(rollout, torch.Generator())
        (update,) = learner.updates(rollout, torch.Generator().manual_seed(1))
        found.append((rollout, in_parts(learner, update), made.evaluations.forward, steps - learner._first(times)))
    (once, slope, count, last), (again, truth, more, _) = found
    same(once.x, again.x, other=again.x.flip(1))
    same(once.old.eps, again.old.eps, other=again.old.eps.flip(1))
    close(slope, truth, rtol=1e-5, atol=1e-9, twice=2 * slope, sign=-slope)
    close(more - count, batch * last, atol=0, none=0)


def test_a_policy_that_diverged_is_not_scored():
    """Its samples are the loop's to judge; of a reward that scored them nothing could be said."""
    asked = []

    def score(x0, prompt):
        asked.append(bool(torch.isfinite(x0).all()))
        return REWARD(x0)

    for parameters in ([math.inf, 0.0], [0.1, 0.2]):
        made = model(VP)
        with torch.no_grad():
            made.parameters["th"].copy_(torch.tensor(parameters))
        learner = sa.DRaFT().build(setting(made, steps=3, batch=4)._replace(reward=Objective(score, True)))
        learner.explore(none(4), sa.Sampler(steps=3).times(VP), RowNoise(0, torch.arange(4)))
    same(asked, [True], scored=[False, True])


def test_memory_grows_with_the_differentiated_steps_only():
    one, two, four = kept(1), kept(2), kept(4)
    close(four - two, 2 * (two - one), atol=0.1 * two, as_two=two - one)
    close(kept(2, steps=16), two, atol=0, as_four=four)
    for beta in (0.0, BETA):
        whole, again = kept(4, beta=beta), kept(4, beta=beta, checkpointing=True)

        def small(value, whole=whole):
            assert value < 0.5 * whole

        accepts(small, again, without=whole)


@pytest.mark.long
def test_low_variance_adds_the_mean_gradient_of_the_last_step():
    """Sums over n noises of x0: n times the expectation, which three nodes integrate exactly; n queries more a sample."""
    queries, n = [], 4000
    score = lambda x0, prompt: queries.append(len(x0)) or REWARD(x0)  # noqa: E731
    fixed = setting(model(VP), steps=6, batch=5)._replace(reward=Objective(score, True))
    learner = sa.DRaFT(low_variance=n).build(fixed)
    rollout = exactly(learner, 5)
    made, t = learner.model, rollout.times[-2]
    with_noise, without = (drawn_through(learner, rollout, lv) for lv in (n, 0))
    grad = 5 * (with_noise - without)
    assert queries == [5] * n
    nodes, weights = f64([-math.sqrt(3), 0.0, math.sqrt(3)]), f64([1 / 6, 2 / 3, 1 / 6])
    x = VP.alpha(t) * rollout.x0 + VP.sigma(t) * nodes
    value = REWARD(made.predict(x.reshape(-1, 1), t).x0).reshape(5, 3) @ weights
    (truth,) = torch.autograd.grad(-value.sum(), made.parameters["th"])
    at_state = -REWARD(made.predict(rollout.x[-2], t).x0).sum()
    (other,) = torch.autograd.grad(at_state, made.parameters["th"])
    assert float((truth - other).abs().max()) > 0.1 * float(truth.abs().max())
    close(grad / n, truth, rtol=0.06, atol=0, not_summed=grad / n**2, sign=-grad / n)
    close(without, by_hand(learner, rollout, 1), rtol=1e-6, extra_alone=grad / 5, both=with_noise)


def test_beta_is_worth_the_same_beside_more_rewards():
    """Of 1 + n rewards the KL is paid as often, in the last step and in those before. Twin: once, a third of beta."""

    def kl(n):
        """The KL's gradient: what one more beta adds, all else drawn alike."""
        slopes = []
        for beta in (BETA, 2 * BETA):
            learner = built(sa.DRaFT(low_variance=n, beta=beta, rows=10**4))
            updates = learner.updates(exactly(learner, 40), torch.Generator().manual_seed(0))
            slopes.append(gradient(learner.model, updates))
        return slopes[1] - slopes[0]

    close(kl(2), 3 * kl(0), rtol=1e-5, atol=1e-9, once=kl(0))


def drawn_through(learner, rollout, low_variance):
    """The gradient of its update with so many noises."""
    learner.config = learner.config.model_copy(update={"low_variance": low_variance})
    return gradient(learner.model, learner.updates(rollout, torch.Generator().manual_seed(0)))


def test_low_variance_in_parts_is_as_a_whole():
    """Each trajectory keeps its own noises, whatever the parts."""
    learner = built(sa.DRaFT(low_variance=2))
    rollout = exactly(learner, 40)
    (update,) = learner.updates(rollout, torch.Generator().manual_seed(1))
    truth = torch.autograd.grad(total(update), learner.model.parameters["th"])[0]
    (other,) = learner.updates(rollout, torch.Generator().manual_seed(2))
    close(in_parts(learner, update), truth, rtol=1e-6, other_noise=in_parts(learner, other))


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_refl_by_hand(beta):
    """`-r(x0_hat_theta(x_t))` at one random late step of every path, the state held fixed."""
    learner = built(sa.ReFL(beta=beta, late=0.5, rows=70), steps=8)
    rollout, made = exactly(learner, 40), learner.model
    (update,) = learner.updates(rollout, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    chosen = ALONE.dealt(8, 40, 70, generator).own if beta else None

    def reward(step):
        x, t = rollout.x[step, torch.arange(40)], rollout.times[step]
        return torch.autograd.grad(-REWARD(made.predict(x, t).x0).mean(), made.parameters["th"])[0]

    step = torch.randint(4, 8, (40,), generator=generator)
    truth, wrong = reward(step), {"early": reward(step - 4), "sign": -reward(step)}
    if beta:
        local = visited(learner, rollout, chosen)
        wrong = {"no_kl": truth, "kl_mean": truth + local}
        truth = truth + 8 * local
    close(in_parts(learner, update, 15), truth, rtol=1e-6, **wrong)


def test_refls_late_steps_are_those_as_published():
    """Of 40 steps those numbered 30 to 39; of few at least one."""
    for steps, late, first in ((40, 0.25, 30), (3, 0.1, 2), (4, 1.0, 0)):
        learner = built(sa.ReFL(late=late), steps=steps, batch=400)
        rollout, seen = exactly(learner, 400), []
        learner.policy = lambda x, t, prompt, seen=seen, made=learner.model: seen.append(t) or made.predict(x, t)
        list(each(learner.updates(rollout, torch.Generator().manual_seed(0))))
        number = (seen[0][:, None] == rollout.times).double().argmax(1)

        def late_only(numbers, first=first, steps=steps):
            assert set(numbers.tolist()) == set(range(first, steps))

        accepts(late_only, number, one_earlier=number - 1)


@pytest.mark.parametrize("config", [sa.DRaFT(), sa.ReFL()], ids=["draft", "refl"])
def test_what_they_need_is_refused_with_a_remedy(config):
    made, name = model(VP), config.name
    for options, changed, message in (
        ({"differentiable": False}, {}, f"reward: {name} needs its gradient"),
        ({"solver": "euler_maruyama"}, {}, rf"sampler\.solver: {name} is written for ddim"),
        ({"eta": 0.0}, {"beta": 0.1}, r"sampler\.eta: .*set it above 0, or algorithm\.beta to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            config.model_copy(update=changed).build(setting(made, **options))
    config.build(setting(made, eta=0.0))  # a deterministic chain is differentiated as well


def test_drafts_numbers_of_steps_are_checked():
    with pytest.raises(ValueError, match=r"algorithm\.last: there are 6 steps; lower it, or null"):
        built(sa.DRaFT(last=7))
    with pytest.raises(ValueError, match=r"algorithm\.low_variance: .*set algorithm\.last to 1"):
        built(sa.DRaFT(last=2, low_variance=1))
    assert built(sa.DRaFT(last=None)).last == 6


def test_with_checkpoints_calls_have_as_many_rows_as_memory_holds():
    """`max_rows` rows go through all steps at once: only one step's activations are kept; without checkpoints a third."""
    sizes = {}
    for checkpointing in (True, False):
        learner = built(sa.DRaFT(last=3, gradient_checkpointing=checkpointing), steps=3, max_rows=8)
        rows, predict = [], learner.policy
        learner.policy = lambda x, t, prompt, rows=rows, predict=predict: rows.append(len(x)) or predict(x, t, prompt)
        learner.explore(none(24), sa.Sampler(steps=3).times(VP), RowNoise(0, torch.arange(24)))
        sizes[checkpointing] = max(rows)
    same(sizes, {True: 8, False: 2}, by_steps={True: 2, False: 2})
