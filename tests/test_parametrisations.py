"""Truth: a trainer's distance to the known optimum on a v network; on networks of other kinds it is within twice of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from twins import accepts

from scoreaction.algorithms import nft
from scoreaction.sampling.sampler import Sampler

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from parametrisations import run_of  # noqa: E402


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


@pytest.mark.long
def test_sqdf_learns_from_x0_networks_as_from_v_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of flow, by default. Twin: the policy acts at all times, those next to the data too."""
    truth, held = distance("sqdf", "flow", "v"), distance("sqdf", "flow", "x0")
    monkeypatch.setattr(Sampler, "settled", lambda self, model, ratio: self.model_copy(update={"off_below": 0.0}))

    def within(other: float) -> None:
        assert other < 2 * truth, (other, truth)

    accepts(within, held, at_all_times=distance("sqdf", "flow", "x0"))
