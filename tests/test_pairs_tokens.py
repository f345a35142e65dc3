"""Truth: the laws that pairs of tokens ask for, enumerated: 2 positions of 3 tokens, all pairs of their 9 sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from affine import none
from scipy.special import expit
from test_pairs import learner_of, stepped, update
from token_laws import enumerated, model_of, potts
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms._pairs import PathRatio
from scoreaction.algorithms._setting import Setting
from scoreaction.diffusion.sequences import total_variation
from scoreaction.networks.conditions import take

LENGTH, TOKENS = 2, 3


class Task:
    """A law, a reward, and all pairs of sequences with their weights."""

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.law = enumerated(potts(rng, LENGTH, TOKENS, pair=0.8), LENGTH)
        self.rewards, self.drawn = rng.standard_normal(9), rng.dirichlet(2 * np.ones(9))
        self.data = rng.dirichlet(2 * np.ones(9))
        x = self.law.space.sequences
        winner, loser = (part.flatten() for part in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
        self.pairs = torch.stack([x[winner], x[loser]])

    def weighted(self, winners, losers, chance=None):
        table = np.outer(winners, losers) * (1.0 if chance is None else chance)
        return f64(table / table.sum()).flatten()

    def preferred(self):
        return self.weighted(self.drawn, self.drawn, expit(self.rewards[:, None] - self.rewards[None]))

    def at_rest(self, weight, scale, *, ratio=None, sign=1.0, reference="pretrained"):
        """The law from left to right at the minimum of the loss over tables, by L-BFGS on the two-pass gradient."""
        model = model_of(self.law)
        model.net.double()
        model.double = True
        learner = learner_of(model)
        asked = learner.pretrained if reference == "pretrained" else learner.policy
        stop = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
        optimiser = torch.optim.LBFGS(model.net.parameters(), max_iter=150, history_size=30, **stop)

        def closure():
            optimiser.zero_grad()
            found = update(learner, ratio or PathRatio(True), self.pairs, scale=sign * scale, reference=asked)
            return torch.tensor(stepped(found, weight), dtype=F64)

        optimiser.step(closure)
        loss = float(closure())
        with torch.no_grad():
            space = self.law.space
            log_q = model.predict(space.states, torch.tensor(0.5)).log_prob
            first = (space.masked & (space.masked.cumsum(1) == 1)).double()
            return space.visits(log_q, first)[~space.masked.any(1)], loss


@dataclass(frozen=True)
class OneMask(PathRatio):
    """Twin: one random state of the path, in place of the others."""

    def probes(self, learner, x0, prompt, total, generator):
        right, own = super().probes(learner, x0, prompt, total, generator), x0.shape[1]
        rows = torch.arange(len(right.t)).reshape(2, LENGTH, own)
        kept = torch.randint(LENGTH, (own,), generator=generator)
        return take(right, rows[:, kept, torch.arange(own)][:, None].expand(-1, LENGTH, -1).flatten())


@pytest.mark.slow
def test_dpo_of_tokens_comes_to_the_tilted_law():
    """TV below 1e-5 to p_pre exp(r/beta)/Z, whatever law the pairs are of. Twins: sign, one mask, half of beta."""
    task, beta = Task(), 0.4
    truth = task.law.law * torch.exp(f64(task.rewards / beta))
    weight = task.preferred()

    def away(**settings):
        return total_variation(task.at_rest(weight, **{"scale": beta} | settings)[0], truth / truth.sum())

    wrong = {"sign": away(sign=-1.0), "one_mask": away(ratio=OneMask(True)), "half_of_beta": away(scale=beta / 2)}
    close(away(), 0.0, atol=1e-5, untrained=total_variation(task.law.law, truth / truth.sum()), **wrong)
    stuck, loss = task.at_rest(weight, beta, reference="policy")
    close(loss, math.log(2), atol=1e-9, right=task.at_rest(weight, beta)[1])
    close(stuck, task.law.law, atol=1e-6, tilted=truth / truth.sum())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_round_of_spin_is_a_geometric_mean(scale):
    """p_k^(1 - 1/scale) p_data^(1/scale), TV below 1e-5. Twins: the scales' reciprocal, winners and losers exchanged."""
    task = Task()
    base, data = task.law.law, f64(task.data)

    def mean(power):
        law = base ** (1 - power) * data**power
        return law / law.sum()

    found, _ = task.at_rest(task.weighted(task.data, base.numpy()), scale)
    wrong = task.at_rest(task.weighted(base.numpy(), task.data), scale)[0]
    close(found, mean(1 / scale), atol=1e-5, twice=mean(2 / scale), exchanged=wrong, base=base)


def test_at_the_law_of_the_data_nothing_moves():
    """The loss is log 2 and the population's gradient 0. Twin: another law's samples."""
    task = Task()
    model = model_of(task.law)
    learner, law = learner_of(model), task.law.law.numpy()

    def gradient(data):
        model.net.zero_grad()
        loss = stepped(update(learner, PathRatio(True), task.pairs, scale=1.0), task.weighted(data, law))
        return loss, float(model.net.change.grad.abs().max())

    loss, still = gradient(law)
    close(loss, math.log(2), atol=1e-6, off=0.68)
    close(still, 0.0, atol=1e-6, other_law=gradient(task.data)[1])


def test_left_to_right_is_the_order_of_its_solver():
    """The states of a path have a masked tail. Twin: a random order."""
    task = Task()
    learner = learner_of(model_of(task.law))

    def check(left_to_right):
        probes = PathRatio(left_to_right).probes(learner, task.pairs, none(81), 81, torch.Generator().manual_seed(0))
        masked = probes.x == TOKENS
        assert bool((masked.int().diff(dim=1) >= 0).all())
        assert bool(((probes.target >= 0) & masked).sum(1).eq(1).all()), "one masked position is asked for"

    accepts(check, True, random=False)
    assert sa.DPO().build_on_tokens(replace_solver(learner, "left_to_right")).ratio == PathRatio(True)
    assert sa.SPIN().build_on_tokens(replace_solver(learner, "one_by_one")).ratio == PathRatio(False)


@pytest.mark.parametrize("left_to_right", [True, False])
def test_the_log_ratio_of_a_path_is_that_of_the_sequence(left_to_right):
    """Conditionals of two laws, any order: their ratio telescopes. Twin: without the last token."""
    task = Task()
    best = task.law.optimum(lambda x, prompts: f64(task.rewards), 0.4).law
    base, other = model_of(task.law), model_of(best)
    ratio, x0 = PathRatio(left_to_right), task.law.space.sequences[None]
    probes = ratio.probes(learner_of(base), x0, none(9), 9, torch.Generator().manual_seed(0))
    terms = ratio.term(other.reference(probes.x, probes.t), base.reference(probes.x, probes.t), probes).reshape(LENGTH, 9)
    close(terms.sum(0), best.log_law - task.law.log_law, atol=1e-5, one_short=terms[0])


def replace_solver(learner, solver):
    sampler = learner.sampler.model_copy(update={"solver": solver})
    return Setting(learner.model, sampler, learner.reward, 4, None)
