"""Truth: networks pretrained by the losses of others; the page's lines make models of them that are in order."""

from __future__ import annotations

import re

import pytest
import torch
from foreign import LOSSES, PAGE, brought, two_moons
from parameters import with_long
from torch import Tensor
from twins import accepts

import scoreaction as sa

MISTAKES = {  # of the page's table, in its order
    "flow: clock turned": ("Flow", "-self.net(x, 1 - t)", "self.net(x, 1 - t)"),
    "flow: sign turned": ("Flow", "-self.net(x, 1 - t)", "-self.net(x, t)"),
    "flow: neither turned": ("Flow", "-self.net(x, 1 - t)", "self.net(x, t)"),
    "DDPM: time in [0, 1]": ("DDPM", "process.timestep(t.double()).round().long()", "t"),
    "DDPM: `predicts": ("DDPM", 'predicts="eps"', 'predicts="v"'),
    "EDM: the inner network": ("EDM", "return self.sigma_data", "return residual; self.sigma_data"),
    "score: half": ("Score", "beta_max=20.0", "beta_max=10.0"),
}


def alarms(model: sa.Model) -> list[str]:
    """What the doctor notes or calls wrong."""
    train = sa.Train(iterations=2, batch=64, device="cpu")
    action = sa.ScoreAction(beta=0.5, updates=2, critic_updates=2)
    sampler = sa.Sampler(steps=25)
    tuner = sa.Finetuner(model, reward=lambda x, _: x[:, 0], algorithm=action, sampler=sampler, train=train)
    return [f"{f.verdict}: {f.check}, {f.seen}" for f in sa.examine(tuner, iterations=2) if f.verdict != "ok"]


@pytest.mark.long
@pytest.mark.parametrize("kind", LOSSES)
def test_a_right_foreign_model_gives_no_alarm_and_each_mistake_of_the_page_does(kind: str) -> None:
    """Twins: the page's own mistakes with this kind of network; of what has none there, another kind of prediction."""
    mistakes = {name: brought(kind, *swap) for name, (of, *swap) in MISTAKES.items() if of == kind}
    mistakes |= {"other kind": brought(kind, 'predicts="v"', 'predicts="x0"')} if kind == "Log SNR" else {}

    def in_order(found: list[str]) -> None:
        assert not found, found

    found = {name: alarms(model) for name, model in mistakes.items()}
    for name, lines in found.items():  # by the check that is meant, and as the page says it
        verdict = "note" if name == "score: half" else "wrong"
        assert any(line.startswith(f"{verdict}: the network finds the noise") for line in lines), (name, lines)
    accepts(in_order, alarms(brought(kind)), **found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", with_long(LOSSES, "DDPM", "Flow"))
def test_it_samples_its_own_data(kind: str) -> None:
    """Samples lie by the moons, as wide as they are. Twins: samples of the prior, and half of the data."""
    torch.manual_seed(0)
    data, samples = two_moons(4000), sa.sample(brought(kind), n=1000, steps=100, eta=0.0, solver="heun")

    def of_the_data(x: Tensor) -> None:
        near = torch.cdist(x, data).min(1).values
        assert float(near.mean()) < 0.15, near.mean()
        assert bool(((x.std(0) / data.std(0) - 1).abs() < 0.15).all()), x.std(0)

    accepts(of_the_data, samples, noise=torch.randn(1000, 2), half=data[data[:, 0] < 0])


def test_every_mistake_of_the_page_is_tried_here() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if re.search(r"\| `(wrong|note)`", line)]

    def tried(names: list[str]) -> None:
        assert len(rows) == len(names)
        for row, name in zip(rows, names, strict=True):
            assert row.startswith(f"| {name}"), row

    accepts(tried, list(MISTAKES), one_less=list(MISTAKES)[:-1], other_order=list(MISTAKES)[::-1])
