"""Truth: a trainer's distance to the known optimum on a v network; on networks of other kinds it is within twice of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from twins import accepts

import scoreaction as sa
from scoreaction.algorithms import nft
from scoreaction.networks.critic import Critic
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.sampling.sampler import Sampler

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from parametrisations import BETA, LAW, REWARD, model_of, run_of  # noqa: E402


def distance(trainer: str, schedule: str, kind: str) -> float:
    """The distance to the optimum that a trainer ends at."""
    return run_of(trainer, schedule, kind, 0.0, 0, 20)["distance"]


@pytest.mark.long
@pytest.mark.parametrize(("schedule", "kind"), [("ddpm", "eps"), ("ve", "x0")])
def test_nft_learns_from_eps_and_x0_networks_as_from_v_networks(
    monkeypatch: pytest.MonkeyPatch, schedule: str, kind: str
) -> None:
    """DDPM's betas, alpha 0.006 at the end, and VE. Twin: rows as they are, most of them near pure noise or near the data."""
    truth, weighted = distance("nft", schedule, "v"), distance("nft", schedule, kind)
    monkeypatch.setattr(nft, "sureness", lambda _, t: torch.ones_like(t))

    def within(other: float) -> None:
        assert other < 2 * truth, (other, truth)

    accepts(within, weighted, as_they_are=distance("nft", schedule, kind))


def test_the_value_of_vard_is_flat_at_pure_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut cosine table, alpha 0.006 at its end: after an iteration its slope there is the exact value's, 0.006, in size.

    Twin: a critic that sees x as it is.
    """

    def slope() -> float:
        model = model_of("cosine, cut", "eps", 0.0, 0)
        train, sampler = sa.Train(iterations=1, batch=128, lr=4e-3, seed=0, device="cpu"), sa.Sampler(steps=12)
        tuner = sa.Finetuner(model, reward=QuadraticReward(REWARD), algorithm=sa.VARD(beta=BETA), sampler=sampler, train=train)
        next(iter(tuner))
        x, t = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)), torch.ones((), dtype=torch.float64)
        old, best = (law.prediction(model.process, x, t).eps for law in (LAW, LAW.optimum(REWARD, BETA).law))
        exact = BETA * (old - best) / model.process.sigma(t).to(x)
        found = tuner.learner.networks["critic"].gradient(x, t.expand(256), torch.zeros(256, dtype=torch.long))
        return float((found - exact).norm() / exact.norm())

    def near(error: float) -> None:
        assert error < 1, error

    truth = slope()
    monkeypatch.setattr(Critic, "inputs", lambda self, x, t: x)
    accepts(near, truth, as_it_is=slope())


@pytest.mark.long
def test_sqdf_learns_from_x0_networks_as_from_v_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of flow, by default. Twin: the policy acts at all times, those next to the data too."""
    truth, held = distance("sqdf", "flow", "v"), distance("sqdf", "flow", "x0")
    monkeypatch.setattr(Sampler, "settled", lambda self, model, ratio: self.model_copy(update={"off_below": 0.0}))

    def within(other: float) -> None:
        assert other < 2 * truth, (other, truth)

    accepts(within, held, at_all_times=distance("sqdf", "flow", "x0"))
