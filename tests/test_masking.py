"""Truth: the masked process on 4 positions of 3 tokens, by enumeration: KL(p*||p) = .51315806 for every schedule and order."""

from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from token_laws import enumerated, even_chance, first, model_of, reward_of
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.diffusion.reveals import Reveal, chosen, position_kl, tokens_of
from scoreaction.diffusion.sequences import PolicyLaw, total_variation
from scoreaction.diffusion.solvers import SOLVERS
from scoreaction.diffusion.unmasking import path_kl_of_tokens
from scoreaction.sampling.sampler import act
from scoreaction.training.evaluation import measure_kl, standard_error
from scoreaction.training.token_task import TokenTask

KL, BETA = 0.51315806, 0.5
SCHEDULES = {"linear": sa.Masking(3), "cosine": sa.Masking(3, "cosine"), "power": sa.Masking(3, "power", rho=2.0)}
ZERO, ONE = f64(0.0), f64(1.0)


@pytest.fixture(scope="module")
def law():
    return enumerated(first()[0], 4)


@pytest.fixture(scope="module")
def best(law):
    return law.optimum(reward_of(first()[1], 3), BETA)


def step(process, solver, log_prob, x, t, s):
    return SOLVERS[solver].step(process, None, tokens_of(log_prob), x, f64(t), f64(s), 1.0, None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    """All is there at 0 and nothing at 1; chances compose; the rate is that of `-log(1 - alpha)`."""
    process, t = SCHEDULES[name], f64([0.2, 0.5, 0.9])
    close([process.alpha(ZERO), process.alpha(ONE)], [1.0, 0.0], atol=0, swapped=[0.0, 1.0])
    through = 1 - (1 - process.chance(f64(0.9), f64(0.6))) * (1 - process.chance(f64(0.6), f64(0.2)))
    close(process.chance(f64(0.9), f64(0.2)), through, atol=1e-12, one_step=process.chance(f64(0.9), f64(0.6)))
    h = 1e-6
    slope = (torch.log(1 - process.alpha(t + h)) - torch.log(1 - process.alpha(t - h))) / (2 * h)
    close(process.rate(t), slope, atol=1e-6, of_what_is_kept=-process.alpha_rate(t) / process.alpha(t))


def test_what_forward_masks():
    x0, t = torch.zeros(40_000, 2, dtype=torch.long), f64(0.3)
    kept = [
        (sa.Masking(3, schedule).forward(x0, t, torch.Generator().manual_seed(0)) == 0).double().mean()
        for schedule in SCHEDULES
    ]
    close(kept, [0.7, np.cos(np.pi * 0.15), 0.49], atol=0.008, masked=[1 - k for k in kept])
    times = f64([0.0, 1.0])
    ends = sa.Masking(3).forward(x0[:2], times, torch.Generator().manual_seed(0))
    same(ends, torch.tensor([[0, 0], [3, 3]]), swapped=ends.flip(0))


def test_chosen_is_the_inverse_distribution_function():
    weights, uniform = torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0]), torch.linspace(0, 0.999, 1000)
    truth = torch.where(uniform < 0.25, 1, 3)
    same(chosen(weights.expand(1000, -1), uniform), truth, without_norm=(weights.cumsum(0) <= uniform[:, None]).sum(1))


def test_a_step_draws_its_own_law():
    """Positions and tokens of a million steps, against the product of chances and probabilities."""
    n = 200_000
    log_prob = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]]).log().expand(n, -1, -1)
    x = torch.full((n, 2), 2)
    chance = torch.tensor([[0.25, 0.75]]).expand(n, -1)

    def law_of(single, chance=chance):
        drawn = Reveal(log_prob, x, 2, chance, single=single).sample(torch.Generator().manual_seed(3))
        return torch.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9) / n

    one = [0, 0, 0.2 * 0.25, 0, 0, 0.8 * 0.25, 0.6 * 0.75, 0.4 * 0.75, 0]
    a, b = np.array([0.2 * 0.25, 0.8 * 0.25, 0.75]), np.array([0.6 * 0.75, 0.4 * 0.75, 0.25])
    close(law_of(True), one, atol=0.005, even=law_of(True, torch.full((n, 2), 0.5)), independent=law_of(False))
    close(law_of(False), np.outer(a, b).flatten(), atol=0.005, single=law_of(True))
    shown = Reveal(log_prob[:2], torch.tensor([[0, 1], [1, 1]]), 2, torch.zeros(2, 2), single=True)
    same(shown.sample(torch.Generator()), shown.x, redrawn=1 - shown.x)  # nothing is masked: nothing is shown
    kept = Reveal(log_prob[:1], torch.tensor([[0, 1]]), 2, chance[:1], single=False).sample(torch.Generator())
    same(kept, torch.tensor([[0, 1]]), redrawn=torch.tensor([[1, 0]]))


def test_a_ratio_is_of_what_was_shown(law, best):
    """`sum over positions shown`: the chance cancels, and what was there before does not count."""
    x, after = torch.tensor([[0, 3, 3, 3]]), torch.tensor([[0, 2, 3, 1]])
    p, q = best.law.log_conditionals(x), law.log_conditionals(x)
    chance = f64([[0.0, 0.3, 0.3, 0.3]])
    steps = [Reveal(log_prob, x, 3, chance, single=False) for log_prob in (p, q)]
    truth = (p - q)[0, 1, 2] + (p - q)[0, 3, 1]
    close(steps[0].log_ratio(steps[1], after), truth, atol=1e-12, with_the_first=truth + (p - q)[0, 0, 0])
    kl = (p.exp() * (p - q)).sum(-1)[0]
    close(steps[0].kl(steps[1]), 0.3 * kl[1:].sum(), atol=1e-12, without_chance=kl[1:].sum(), with_the_first=0.3 * kl.sum())


def test_path_kl_is_the_same_for_every_order(law, best):
    """Random order, left to right, surest first: KL(p*||p) = `E*r/beta - log Z`. Twin: the sum over positions without 1/m."""
    space = law.space
    p, q = (exact.log_conditionals(space.states) for exact in (best.law, law))
    masked = space.masked
    surest = torch.where(masked, q.max(-1).values, -torch.inf).argmax(1, keepdim=True)
    orders = {
        "random": even_chance(space),
        "left": (masked & (masked.cumsum(1) == 1)).double(),
        "confident": torch.zeros_like(q[..., 0]).scatter(1, surest, 1.0) * masked,
    }
    for chance in orders.values():
        exact = PolicyLaw.of(space, p, q, chance)
        close(exact.kl_nats, KL, atol=1e-8)
        close(total_variation(exact.law, best.law.law), 0.0, atol=1e-12, untilted=total_variation(law.law, best.law.law))
    wrong = float(space.visits(p, orders["random"]) @ (position_kl(p, q) * masked).sum(1))
    close(PolicyLaw.of(space, p, q, orders["random"]).kl_nats, KL, atol=1e-8, without_m=wrong)
    for solver, chance in zip(("one_by_one", "left_to_right", "confident"), orders.values(), strict=True):
        own = step(sa.Masking(3), solver, q, space.states, 1.0, 0.5).chance
        close(own, chance, atol=1e-12, other=orders["left" if solver == "one_by_one" else "random"])


@pytest.mark.parametrize("name", SCHEDULES)
def test_path_kl_is_the_same_for_every_schedule(name, law, best):
    """`E integral rate sum_i KL_i dt` by Gauss-Legendre quadrature over states whose positions are masked independently."""
    process, space = SCHEDULES[name], law.space
    nodes, weights = np.polynomial.legendre.leggauss(200)
    t, w = f64((nodes + 1) / 2), f64(weights / 2)
    cost = (position_kl(best.law.log_conditionals(space.states), law.log_conditionals(space.states)) * space.masked).sum(1)
    seen, m = (best.law.log_partial(space.states)).exp(), space.masked.sum(1)

    def integral(rate):
        alpha = process.alpha(t)[:, None]
        return float(((alpha ** (4 - m) * (1 - alpha) ** m * (seen * cost)).sum(1) * rate * w).sum())

    close(integral(process.rate(t)), KL, atol=1e-7, another_rate=integral(-process.alpha_rate(t) / process.alpha(t)))


def chain_matrix(log_prob, states, t, s):
    """Probabilities of one ancestral step between all states: those of what is shown, times those of what is not."""
    n = len(states)
    before, after = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    kernel = step(sa.Masking(3), "ancestral", log_prob[before], states[before], t, s)
    x = states[after]
    possible = ((kernel.x == x) | (kernel.x == 3)).all(1)
    masked, hidden = kernel.x == 3, x == 3
    waits = torch.where(masked, torch.where(hidden, 1 - kernel.chance, kernel.chance), 1.0).prod(1)
    return torch.where(possible, waits * kernel.log_prob_of(x).exp(), 0.0).reshape(n, n)


def chain(law, best, steps):
    """(TV of the base's law, TV of the tilted policy's, chain KL, trapezoid) of `steps` ancestral steps, exactly."""
    space, times = law.space, torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    p, q = (exact.log_conditionals(space.states) for exact in (best.law, law))
    ends, nats = [], [0.0, 0.0]
    for log_prob in (q, p):
        mass = torch.zeros(len(space.states), dtype=torch.float64)
        mass[-1] = 1
        for i in range(steps):
            if log_prob is p:
                kernels = [step(sa.Masking(3), "ancestral", part, space.states, times[i], times[i + 1]) for part in (p, q)]
                nats[0] += float(mass @ kernels[0].kl(kernels[1]))
                alone = q.expand(steps, -1, -1, -1).clone()
                alone[i] = p  # the KL of this step only: the path's is linear in them
                every = space.states.expand(steps, -1, -1)
                nats[1] += float(
                    mass @ path_kl_of_tokens(sa.Masking(3), times, every, tokens_of(alone), tokens_of(q.expand_as(alone)))
                )
            mass = mass @ chain_matrix(log_prob, space.states, times[i], times[i + 1])
        ends.append(mass[~space.masked.any(1)])
    return total_variation(ends[0], law.law), total_variation(ends[1], best.law.law), *nats


@pytest.mark.slow
def test_ancestral_is_of_first_order_in_law(law, best):
    """TV to the law halves with each doubling; the chain's KL and the trapezoid's, on 1 to 8 steps."""
    found = [chain(law, best, steps) for steps in (1, 2, 4, 8)]
    close([row[0] for row in found], [0.3372, 0.1719, 0.0879, 0.0449], atol=5e-5, tilted=[row[1] for row in found])
    order = np.log2(found[2][0] / found[3][0])
    close([order, np.log2(found[2][1] / found[3][1])], [1.0, 1.0], atol=0.06, second=[2.0, 2.0])
    close([row[2] for row in found[2:]], [0.5259, 0.5191], atol=5e-5, trapezoid=[row[3] for row in found[2:]])
    close([row[3] for row in found[2:]], [0.51269, 0.51303], atol=5e-6, chain=[row[2] for row in found[2:]])


@pytest.mark.slow
def test_a_run_measures_these_figures(law, best):
    """Samples and the KL of a run of the tilted policy: from one at a time and from a few at a time."""
    model = model_of(law)
    with torch.no_grad():
        change = best.law.log_conditionals(law.space.states) - law.log_conditionals(law.space.states)
        model.net.change.copy_(change)

    def frequencies(**sampler):
        drawn = sa.sample(model, n=40_000, seed=1, **sampler)
        return torch.bincount((drawn * 3 ** torch.arange(3, -1, -1)).sum(1), minlength=81) / len(drawn)

    def fits(law_of):
        assert total_variation(law_of, best.law.law) < 0.03

    few = {"solver": "ancestral", "steps": 2}
    accepts(fits, frequencies(), two_steps=frequencies(**few), the_base=law.law)
    accepts(fits, frequencies(solver="left_to_right"), two_steps=frequencies(**few))
    singles = measure_kl(model, sa.Sampler(**model.sampling), 4096, None, 0)
    several = measure_kl(model, sa.Sampler(solver="ancestral", steps=4, grid="uniform"), 4096, None, 0)
    close(singles["kl_nats"], KL, atol=4 * singles["kl_nats_se"], without_m=4 * KL)
    close(singles["kl_chain_nats"], singles["kl_nats"], atol=0)
    close(several["kl_nats"], 0.51269, atol=0.01, without_rate=4 * 0.51269)
    close(several["kl_chain_nats"], 0.5259, atol=0.01, path=0.5)


def test_the_objective_of_samples_is_that_of_enumeration(law, best):
    """Of a policy half way to the optimum, which is what longer sequences are measured by. Twins: no KL, and twice of it."""
    model, reward = model_of(law), reward_of(first()[1], 3)
    with torch.no_grad():
        change = best.law.log_conditionals(law.space.states) - law.log_conditionals(law.space.states)
        model.net.change.copy_(0.5 * change)
    task, sampler = TokenTask(law, best, reward), sa.Sampler(**model.sampling)
    policy, rewards, _ = task.exact(model, sampler)
    mean, price = float(policy.law @ rewards), BETA * policy.kl_nats
    values = task.objectives(model, sampler, 4096, 0)
    close(values.mean(), mean - price, atol=4 * standard_error(values), no_kl=mean, twice=mean - 2 * price)


def test_the_order_of_confidence_is_the_pretrained_models(law):
    """Positions of a policy that is another law, in rollouts and wherever it is asked. Twin: its own confidence."""
    made = model_of(law)
    with torch.no_grad():
        made.net.change += 2 * torch.randn(made.net.change.shape, generator=torch.Generator().manual_seed(0))
    sampler = sa.Sampler(solver="confident", steps=4)
    x = law.space.states[law.space.masked.any(1)]
    policy = act(made, sampler, x, f64(0.5))
    places = [
        SOLVERS["confident"].step(made.process, None, one, x, f64(0.5), f64(0.25), 1.0, None).chance
        for one in (policy, made.reference(x, f64(0.5)), made.predict(x, f64(0.5)))
    ]
    same(places[0], places[1], its_own=places[2])
    close(policy.log_prob, made.predict(x, f64(0.5)).log_prob, atol=0, of_the_reference=made.reference(x, f64(0.5)).log_prob)


@pytest.mark.parametrize("algorithm", [sa.DPOK(beta=BETA, minibatches=2), sa.ScoreAction(beta=BETA, updates=2, rows=64)])
def test_an_update_takes_the_order_of_its_steps(algorithm, law):
    """Metrics of asking the pretrained model again, by fewer evaluations. Twin: the order by the policy's own confidence."""

    def trained(again=None):
        made = model_of(law)
        with torch.no_grad():
            made.net.change += torch.randn(made.net.change.shape, generator=torch.Generator().manual_seed(0))
        tuner = sa.Finetuner(
            made, reward=reward_of(first()[1], 3), algorithm=algorithm, sampler=sa.Sampler(solver="confident", steps=4),
            train=sa.Train(iterations=2, batch=32, lr=0.05),
        )  # fmt: skip
        if again is not None:
            tuner.learner.policy = partial(again, tuner)
        figures = list(tuner)[-1]
        return f64([figures[name] for name in ("reward_mean", "kl_nats")]), made.evaluations.forward

    def asked(tuner, x, t, prompt):
        return act(tuner.model, tuner.sampler, x, t, prompt=prompt)

    def own(learner, prediction, steps):
        sampler = learner.sampler
        return sampler.find().step(learner.process, None, prediction, steps.x, steps.t, steps.s, 1.0, None)

    found, cost = trained()
    homes = [patch(f"scoreaction.algorithms.{home}.transition", own) for home in ("_likelihood_ratio", "_tokens")]
    with homes[0], homes[1]:  # the order is what is asked
        truth, more = trained(asked)
        wrong, _ = trained()
    advantage = isinstance(algorithm, sa.ScoreAction)  # whose order is that of the old policy's prediction
    close(found, truth, atol=1e-6, **{"none": 0 * truth} if advantage else {"own_order": wrong})
    assert cost < more, (cost, more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", [sa.DPOK(beta=BETA), pytest.param(sa.ScoreAction(beta=BETA, updates=8, rows=64), marks=pytest.mark.long)]
)
def test_algorithms_learn_in_the_order_of_confidence(algorithm, law):
    """The gap by enumeration falls from .51, and the recorded KL is that of the exact path. Twin: the reward's sign."""
    gaps = []
    for sign in (1, -1):
        tuner = sa.Finetuner(
            model_of(law),
            reward=lambda x, p, sign=sign: sign * reward_of(first()[1], 3)(x, p),
            algorithm=algorithm,
            sampler=sa.Sampler(solver="confident", steps=4),
            train=sa.Train(iterations=12, batch=96, lr=0.05),
        )
        list(tuner)
        task = TokenTask(law, law.optimum(reward_of(first()[1], 3), BETA), reward_of(first()[1], 3))
        gaps.append(task.distances(tuner.model, tuner.sampler, 64, 0)["objective_gap"])

    def falls(gap):
        assert 0 <= gap < 0.25, gap

    accepts(falls, gaps[0], flipped=gaps[1])
