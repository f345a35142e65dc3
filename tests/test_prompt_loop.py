"""Truth: a linear Gaussian chain under four prompts: a choice, its best response and its soft value are closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from driving import each, total
from prompt_line import (
    AT,
    BETA,
    MEANS,
    MU,
    OWN,
    PROMPTS,
    VARIANCE,
    VP,
    affine,
    algorithm,
    biased,
    decided,
    model,
    q_values,
    soft,
    states,
    tuner,
)
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms.prompt_loop import group_advantages, returns
from scoreaction.diffusion.noise import RowNoise
from scoreaction.networks.prompt_chooser import Decisions

CERTAIN = 40.0


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_text_is_told_from_its_time_on(eta):
    """Mean and variance of samples whose third entry is certain: the own prompt's chain, then the third one's. Twins: from
    the start, and never."""
    made = biased(tuner(eta=eta).model, [0.0, 0.0, 0.0, CERTAIN])
    found = sa.sample(made, n=20_000, eta=eta, steps=24, seed=1).double()
    times, first = decided()

    def law(before, after):
        (a, b, v), (c, d, w) = affine(before, times[: first + 1], eta), affine(after, times[first:], eta)
        return c * b + d, c * c * (a * a + v) + w

    truth, start, never = law(OWN, 3), law(3, 3), law(OWN, OWN)
    close((found.mean(), found.var()), truth, atol=0.03, from_the_start=start, never=never)


@pytest.mark.slow
def test_the_worth_of_a_choice_goes_to_that_of_continuous_time():
    """`Q = -((m_c + K (x - alpha m_c) - mu)^2 + S)/2` at 600 steps. Twin: without the variance that is left."""
    steps = 600
    x, weight, t = states(steps=steps)
    alpha = VP.alpha(t)
    p = alpha**2 * VARIANCE + VP.sigma2(t)
    gain, left = alpha * VARIANCE / p, VARIANCE * VP.sigma2(t) / p
    means = f64(MEANS)
    mean = means + gain * (x[:, None] - alpha * means)
    truth = -0.5 * ((mean - MU) ** 2 + left)
    found = q_values(x, steps=steps)
    close(
        (weight[:, None] * found).sum(0),
        (weight[:, None] * truth).sum(0),
        atol=4e-3,
        certain=(weight[:, None] * (truth + left / 2)).sum(0),
    )
    seeing, blind = soft(found, weight)
    close((seeing, blind), (-0.7319, -0.8320), atol=8e-3, blind=(blind, blind))


class Table(nn.Module):
    """log pi of a table by decision and previous entry, in the place of a chooser's network."""

    def __init__(self, chooser, logits):
        super().__init__()
        self.chooser, self.logits = chooser, nn.Parameter(logits)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("chooser"), name)

    def forward(self, features, summary, t, previous):
        return self.logits[(t < 0.5).long(), previous].log_softmax(1)


def pull(logits, value, *, batch=4_000, scale=1.0, forget=False):
    """The gradient of the first update at a table, of a batch whose choices are as frequent as their probabilities."""
    found = tuner(algorithm=algorithm(at=[1.0, AT]), train={"batch": batch})
    learner = found.learner
    table = Table(learner.chooser, logits)
    learner.chooser = table
    pi = logits.softmax(-1)
    joint = pi[0, 4][:, None] * pi[1, :4]
    pairs = torch.cat([torch.tensor([[i, j]]).repeat(round(float(joint[i, j]) * batch), 1) for i in range(4) for j in range(4)])
    rows = len(pairs)
    previous = torch.stack([torch.full((rows,), 4), pairs[:, 0]])
    t = torch.stack([torch.ones(rows), torch.full((rows,), AT)]).double()
    log_prob = torch.stack([logits[0, 4].log_softmax(0).expand(rows, 4), logits[1].log_softmax(1)[pairs[:, 0]]])
    choices = Decisions(t, torch.zeros(2, rows, 1), previous, pairs.T, log_prob)
    rollout = learner.explore(torch.zeros(2, dtype=torch.long), learner.times(None), RowNoise(1, torch.arange(2)))
    rewards = value[pairs[:, 0], pairs[:, 1]] * scale
    prompt = torch.zeros(rows, dtype=torch.long)
    rollout = replace(rollout, rewards=rewards, prompt=prompt, decisions=choices)
    if forget:
        learner.state.beta = 0.0
        rollout = replace(rollout, rewards=rewards)
    update = next(learner.updates(rollout, torch.Generator()))
    return torch.autograd.grad(total(update), table.logits)[0]


def table_at_rest(value, beta):
    """`pi_2 ~ exp(r/beta)` and `pi_1 ~ exp(V/beta)`, V the soft value of the second choice, for equal prior weights."""
    logits = torch.zeros(2, 5, 4)
    logits[1, :4] = value / beta
    logits[0, 4] = torch.logsumexp(value / beta, 1)
    return logits


def test_the_gradient_is_zero_at_the_soft_best_response_of_two_choices():
    """Twins: the first choice does not know of the second's KL; the std of the rewards weighs beta, as GRPO's."""
    value = torch.tensor([[0.0, 0.3, 0.1, 0.2], [0.4, 0.1, 0.0, 0.1], [0.2, 0.2, 0.5, 0.1], [0.3, 0.0, 0.2, 0.4]])
    right = table_at_rest(value, BETA)
    near_sighted = right.clone()
    near_sighted[0, 4] = (value * (value / BETA).softmax(1)).sum(1) / BETA  # of the reward alone
    published = table_at_rest(value, BETA * float(value.std()))
    close(
        pull(right, value), 0.0, atol=4e-3, near_sighted=pull(near_sighted, value), published=pull(published, value),
        uniform=pull(torch.zeros(2, 5, 4), value),
    )  # fmt: skip


def test_a_return_counts_the_kls_that_come_later():
    """By hand. Twins: with the own one; without any."""
    rewards, nats = f64([1.0, 2.0]), f64([[0.1, 0.2, 0.3], [0.0, 0.5, 1.0]])
    truth = f64([[0.75, 0.85, 1.0], [1.25, 1.5, 2.0]])
    close(returns(rewards, nats, 0.5), truth, own=truth - 0.5 * nats, none=rewards[:, None].expand(2, 3))


def test_an_advantage_leaves_its_own_sample_out():
    """Its covariance with the score is that of the reward. Twins: less the mean of all; over another prompt's."""
    values, groups = f64([[1.0], [2.0], [6.0], [5.0], [9.0]]), torch.tensor([3, 3, 3, 0, 0])
    truth = f64([[1 - 4.0], [2 - 3.5], [6 - 1.5], [-4.0], [4.0]])
    mean = f64([[-2.0], [-1.0], [3.0], [-2.0], [2.0]])
    close(group_advantages(values, groups), truth, mean=mean, one_group=group_advantages(values, 0 * groups))


def worth(made, x, weight, t, steps):
    """`E[r] - beta KL` of a model's chooser on the chain, by quadrature."""
    chooser = made.chooser
    with torch.no_grad(), made.averaged():
        features = made.reference(x[:, None].float(), t, torch.tensor([MEANS[OWN]]), prompt=torch.zeros(len(x)).long()).x0
        summary = chooser.summary(torch.tensor([MEANS[OWN]])).expand(len(x), -1)
        log_prob = chooser(features, summary, t.expand(len(x)), torch.full((len(x),), 4)).double()
    q = q_values(x, steps=steps)
    return float((weight * ((log_prob.exp() * q).sum(1) - BETA * chooser.kl(log_prob))).sum())


@pytest.mark.slow
def test_a_run_ends_at_the_value_of_seeing_what_is_drawn():
    """The soft value with feedback, -.73 in continuous time. Twin: a policy that does not see x0_hat has at most the other."""
    steps = 12

    def trained(**more):
        found = tuner(
            steps=steps, train={"batch": 256, "iterations": 60, "lr": 0.03, "schedule": "cosine", "max_grad_norm": 10.0}
        )
        if more:
            found.model.features = lambda samples: 0 * samples
        list(found)
        return found.model

    x, weight, t = states(steps=steps)
    seeing, blind = soft(q_values(x, steps=steps), weight)
    assert seeing > blind + 0.05
    found = worth(trained(), x, weight, t, steps)
    close(found, seeing, atol=0.02, blind=blind, untrained=worth(tuner().model, x, weight, t, steps))
    closed = trained(closed=True)
    closed.features = lambda samples: 0 * samples
    x0 = closed.reference
    closed.reference = lambda *args, **more: x0(*args, **more)._replace(x0=torch.zeros(len(x), 1))
    accepts(lambda value: _below(value, blind + 1e-3), worth(closed, x, weight, t, steps), seeing=found)


def _below(value, limit):
    assert value < limit, value


def test_a_menu_of_the_prompt_itself_changes_no_sample():
    """To the bit, over more steps than noise is drawn ahead, for choices have noise of their own. Twin: another text."""
    own, other = (
        sa.sample(tuner(algorithm=algorithm(menu={PROMPTS[OWN]: [PROMPTS[i]] * 2}, at=[1.0])).model, n=8, steps=100, seed=3)
        for i in (OWN, 3)
    )
    same(own, sa.sample(model(), n=8, steps=100, seed=3, prompts=[PROMPTS[OWN]]), other=other)


def test_each_prompt_has_its_own_texts():
    """From noise on it is as if the texts had been the prompts. Twin: one prompt's texts for both."""
    menu = {"-0.5": ["1.5", "1.5"], "0.5": ["-1.5", "-1.5"]}
    found = tuner(prompts=list(menu), algorithm=algorithm(menu=menu, at=[1.0]))
    draw = partial(sa.sample, n=8, steps=6, seed=3)
    truth, one = (draw(model(), prompts=prompts) for prompts in (["1.5", "-1.5"], ["1.5", "1.5"]))
    same(draw(found.model), truth, of_one=one)


def test_each_step_costs_one_evaluation_and_those_that_change_another():
    """64 paths of 24 steps, all of which change once, and 2 states a step of the reference. Twin: none again."""
    found = tuner()
    biased(found.model, [0.0, 0.0, 0.0, CERTAIN])
    metrics = next(iter(found))
    rows = 64 * 24 + 2 * 24
    same(metrics["model_evaluations"], rows + 64, none=rows)
    same(metrics["reward_queries"], 64, every_decision=128)
    close(metrics["switches"], 1.0, never=0.0)


def test_the_kl_of_choices_is_logged_and_the_first_ratio_is_one():
    """`log C` of a certain one. Twin: none."""
    found = tuner()
    biased(found.model, [0.0, 0.0, 0.0, CERTAIN])
    rollout = found.collector.rollout(found.learner, found.generator, 0)
    (_, _, figures), (_, _, again), *_ = each(found.learner.updates(rollout, found.generator))
    close(figures["kl_choice_nats"], torch.log(f64(4.0)), none=0.0)
    same(figures["log_ratio_first"], 0.0, other=1.0)
    assert "log_ratio_first" not in again


def test_choices_follow_their_probabilities_and_rows_their_own_noise():
    """Shares of a prior, and the same choice of a row in whatever part it is. Twin: equal shares."""
    found = tuner(algorithm=algorithm(weights=[1.0, 2.0, 3.0, 4.0]), train={"batch": 8})
    learner = found.learner

    def entries(rows):
        rows = torch.arange(*rows)
        return learner.explore(torch.zeros_like(rows), learner.times(None), RowNoise(5, rows)).decisions.entry[0]

    every = entries((0, 4000))
    shares = torch.bincount(every, minlength=4) / 4000
    close(shares, [0.1, 0.2, 0.3, 0.4], atol=0.03, equal=[0.25] * 4)
    same(entries((7, 20)), every[7:20], shifted=every[8:21])
