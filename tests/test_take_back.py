"""Truth: a policy whose KL and gradient are known by hand, before and after each step; and the run that nothing stopped."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tuning import SMOOTH, lines, tune
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.algorithms._trust import TrustState, leaps
from scoreaction.algorithms._updates import Term, Update
from scoreaction.training.errors import TrainingError
from scoreaction.training.optimizer import Optimisation, Train
from scoreaction.training.take_back import TakeBack

LR, START = 1e-2, (0.5, -1.0)


class Weights(nn.Module):
    """`w x`."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START))

    def forward(self, x, t, cond):
        return self.w * x


class Case:
    """An optimisation of `w` with a slope in both numbers, another once they moved; its KL is `nats |w - start|^2/(2 lr^2)`.

    It is `nats` after Adam's first step, which is lr in each. A step of a critic comes first.
    """

    def __init__(self, nats, *, region=0.1, slope=1.0, later=1.0):
        model = sa.Model(Weights(), process=sa.VP(), predicts="eps", shape=(2,))
        self.critic = nn.Linear(2, 1)
        self.w, self.nats, self.slope, self.later, self.measured = model.net.w, nats, slope, later, []
        self.here = Optimisation(Train(lr=LR), model, {"critic": self.critic}, {"critic": 1e-3}, scaled=False)
        self.learner = SimpleNamespace(trust_region=region, state=TrustState())

    def update(self):
        start = torch.tensor(START)

        def loss(numbers):
            kl = self.nats * (self.w.detach() - start).square().sum() / (2 * LR**2)
            self.measured.append(float(kl))
            slope = self.later if float(kl) else self.slope
            return slope * self.w.sum().expand(len(numbers)), {"kl_to_old": kl.expand(len(numbers))}

        return Update("policy", [Term(4, loss)])

    def learn(self, count, iteration=0):
        """An iteration with so many updates of the policy; the moves of w in units of lr, and what the algorithm saw."""
        seen = []

        def updates():
            x = torch.ones(3, 2)
            yield Update("critic", [Term(3, lambda numbers: ((self.critic(x[numbers]).squeeze(1) - 5) ** 2, {}), 0)])
            for _ in range(count):
                seen.append((yield self.update())["kl_to_old"])

        figures = self.here.learn(updates(), iteration, equal=False, learner=self.learner)
        return (torch.tensor(START) - self.w.detach()) / LR, seen, figures


def test_a_step_that_leaves_the_region_is_taken_back_and_the_next_is_half_as_long():
    """Of three updates the second sees the leap and makes no step; the third begins where the first did, Adam too."""
    case = Case(nats=20.0)
    critic = case.critic.weight.detach().clone()
    moved, seen, figures = case.learn(3)
    close(moved, 0.5, atol=1e-4, kept=torch.full((2,), 3.0), whole_steps=1.0, nothing=0.0, moments_kept=0.67)
    close(seen, [0.0, 20.0, 0.0], atol=1e-4, not_taken_back=[0.0, 2.0, 8.0])
    same((case.learner.state.step_share, case.learner.state.taken_back), (0.5, 1.0), stays=(1.0, 0.0))
    close(case.here.optimisers["policy"].state[case.w]["step"], 1.0, counted=2.0)
    assert not torch.equal(critic, case.critic.weight), "the critic's step stays"
    close(figures["kl_to_old"], 0.0, atol=1e-4, with_what_was_taken_back=2 / 3)


def test_a_policy_within_its_region_and_one_without_a_region_go_on():
    """Twin: the one that leaves it."""

    def goes_on(case):
        moved, _, _ = case.learn(3)
        assert float((moved - 3).abs().max()) < 1e-3

    accepts(goes_on, Case(nats=0.1), leaves=Case(nats=20.0))
    accepts(goes_on, Case(nats=20.0, region=None), with_one=Case(nats=20.0))


def test_the_last_step_is_measured_too():
    """Without an update after it. Twin: the step that is small enough."""

    def taken_back(nats):
        case = Case(nats=nats)
        moved, _, _ = case.learn(1)
        assert float(moved.abs().max()) == 0.0
        assert case.measured == pytest.approx([0.0, nats], abs=1e-3)

    accepts(taken_back, 20.0, small=0.1)


def test_the_last_step_is_not_measured_where_it_cannot_leap():
    """That would be an evaluation for nothing. Twin: a policy that was outside its region already."""

    def within(nats):
        case = Case(nats=nats)
        case.learn(3)
        assert len(case.measured) == 3

    accepts(within, 0.02, outside=0.1)


def test_steps_grow_again_up_to_those_of_the_rate():
    case = Case(nats=20.0)
    case.learn(3)
    case.nats = 0.0
    steps = []
    for i in range(9):
        case.learn(1, iteration=i + 1)
        steps.append(case.learner.state.step_share)
    close(
        steps, [min(1.0, 0.5 * 1.1 ** (i + 1)) for i in range(9)], atol=1e-9, for_ever=[0.5 * 1.1 ** (i + 1) for i in range(9)]
    )


def test_the_next_iteration_has_the_shorter_steps():
    """The first ends half a rate away, and the second begins with half of it. Twin: the whole rate."""
    case = Case(nats=20.0)
    case.learn(3)
    case.nats = 0.0
    close(case.learn(1, iteration=1)[0], 1.0, atol=2e-3, whole=1.5)


def test_a_gradient_that_is_not_finite_is_taken_back_where_a_step_caused_it():
    """Before any step it is an error, whose cause is another one."""
    case = Case(nats=0.01, later=math.nan)
    moved, _, _ = case.learn(3)
    close(moved, 0.5, atol=1e-4, kept=1.0)
    broken = Case(nats=0.01, slope=math.nan)
    with pytest.raises(TrainingError, match="iteration 1: the gradient of the policy is not finite; lower train.lr"):
        broken.learn(3)


def test_what_is_replayed_may_be_far_from_the_beginning():
    """The KL to an older policy is not what this iteration moved. Twin: the same KL of a policy that sampled."""
    same(
        [leaps(TrustState(), kl, first=first, region=0.1) for kl, first in ((12.0, 0.3), (31.0, 0.3), (math.nan, 0.3))],
        [False, True, True], by_the_region_alone=[True, True, True],
    )  # fmt: skip
    same(
        leaps(TrustState(kl_floor=1.0), 150.0, first=0.0, region=0.1),
        False,
        of_fp32=leaps(TrustState(), 150.0, first=0.0, region=0.1),
    )


def test_the_log_says_it_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        Case(nats=0.01).learn(3)
        assert caplog.messages == []
        Case(nats=20.0).learn(3, iteration=6)
    said = "iteration 7: the policy left its trust region of 0.1 nats by far: taken back, steps are now 0.5 of train.lr"
    same(caplog.messages, [said], nothing=[])


FAST = sa.ScoreAction(updates=3, rows=32, critic_updates=2)


@pytest.mark.parametrize(
    ("algorithm", "most"), [(FAST, 100.0), (sa.SQDF(updates=3, rows=32), 100.0)], ids=["score_action", "sqdf"]
)
def test_a_rate_a_thousand_times_too_large_does_not_diverge(algorithm, most, monkeypatch):
    """The path KL to the pretrained model stays in nats. Twin: the run whose steps all stay, at hundreds and more."""

    def stays(takes_back):
        if not takes_back:
            monkeypatch.setattr(TakeBack, "of", lambda *parts: None)
        assert max(metrics["kl_nats"] for metrics in tune(algorithm, reward=SMOOTH, iterations=8, lr=2.0)) < most

    accepts(stays, True, steps_stay=False)


@pytest.mark.parametrize("algorithm", [FAST, sa.SQDF(updates=3, rows=32)], ids=["score_action", "sqdf"])
@pytest.mark.slow
def test_a_run_that_is_taken_back_resumes_bit_for_bit(algorithm, tmp_path):
    """At a rate with which every iteration leaps; twin: the steps forgotten."""

    def run(folder, stop=None):
        tuner = tune(algorithm, reward=SMOOTH, iterations=6, output=folder, lr=0.5, checkpoint_every=3)
        if stop is None:
            tuner.resume()
        for metrics in tuner:
            if metrics["iteration"] == stop:
                break
        return lines(folder)

    whole = run(tmp_path / "whole", stop=6)
    run(tmp_path / "parts", stop=3)
    resumed = run(tmp_path / "parts")
    assert sum(record["taken_back"] for record in whole) > 0
    assert all(math.isfinite(record["kl_nats"]) for record in whole)
    same(resumed, whole, at_the_whole_rate=[record | {"step_share": 1.0} for record in whole])
