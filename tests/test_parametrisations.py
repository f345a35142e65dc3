"""Truth: a trainer's distance to the known optimum on a v network; on networks of other kinds it is within twice of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from twins import accepts

from scoreaction.algorithms import nft

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from parametrisations import run_of  # noqa: E402


@pytest.mark.long
def test_nft_learns_from_eps_networks_as_from_v_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDPM's betas, alpha 0.006 at the end. Twin: rows near pure noise as they are, which are then all that is learned."""

    def distance(predicts: str) -> float:
        return run_of("nft", "ddpm", predicts, 0.0, 0, 20)["distance"]

    truth, weighted = distance("v"), distance("eps")
    monkeypatch.setattr(nft, "sureness", lambda _, t: torch.ones_like(t))

    def within(other: float) -> None:
        assert other < 2 * truth, (other, truth)

    accepts(within, weighted, as_they_are=distance("eps"))
