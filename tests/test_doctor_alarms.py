"""Truth: shipped recipes, which are in order, and faults that were put into them: the doctor calls wrong the latter alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import accepts, same

import scoreaction as sa
from scoreaction import catalog
from scoreaction.commands.doctor.finding import Finding
from scoreaction.errors import UserError
from scoreaction.models import digits, gaussian_mixture
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import ink

SHORTER = {
    "ctrl": ["sampler.steps=20"],
    "digits": ["train.batch=32"],
    "digits_online": ["online.rounds=[64, 64]", "train.batch=32"],
    "linear_quadratic": [],
    "mixture": ["sampler.steps=20"],
    "mixture16": ["sampler.steps=20"],
    "moons": ["sampler.steps=20"],
    "pretrained": ["sampler.steps=20"],
    "prompt_loop": ["train.batch=32"],
    "shapes": ["train.batch=32"],
    "sqdf_published": ["sampler.steps=20", "train.batch=32"],
}
ELSEWHERE = {"sd15", "sdxl", "sd3", "flux", "glyphs"}
"""Recipes whose weights, or those of their reward, are not shipped."""
OF_TOKENS = {"markov_chain", "peptides", "pixels"}


def test_every_shipped_recipe_is_here() -> None:
    same(set(catalog.recipes()), {*SHORTER, *ELSEWHERE, *OF_TOKENS}, without_those_of_hubs={*SHORTER, *OF_TOKENS})


def no_alarm(found: list[Finding]) -> None:
    wrong = [f"{finding.check}: {finding.seen}" for finding in found if finding.verdict == "wrong"]
    assert not wrong, wrong


@pytest.mark.long
@pytest.mark.parametrize("name", SHORTER)
def test_a_shipped_recipe_gives_no_alarm(name: str) -> None:
    """Twin: the same recipe with steps that are lost in rounding."""
    tuner, broken = (build(load_recipe(name, [*SHORTER[name], *more])) for more in ([], ["train.lr=1e-13"]))
    accepts(no_alarm, list(sa.examine(tuner, iterations=2)), no_steps=list(sa.examine(broken, iterations=1)))


def test_a_recipe_of_tokens_is_refused() -> None:
    """The right twins are above."""
    with pytest.raises(UserError, match="doctor is for models of Gaussian states"):
        list(sa.examine(build(load_recipe("markov_chain"))))


class Classes(nn.Module):
    """The mixture's network with classes, and a fault."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = gaussian_mixture.build(gaussian_mixture.Config()).net, how
        self.head, self.unused, self.drop = nn.Linear(2, 2), nn.Linear(2, 2), nn.Dropout(0.2)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(2))
            self.head.bias.zero_()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        y = self.head(self.inner(x, 1 - t if self.how == "backwards" else t, None))
        y = self.drop(y) if self.how == "dropout" else y
        return y + 0.02 * cond[:, None] * t[:, None] ** 2


def in_train_mode(tuner: sa.Finetuner) -> sa.Finetuner:
    tuner.model.net.train()
    return tuner


def linear(x: Tensor, _: Any) -> Tensor:
    return x[:, 0] + 0.5 * x[:, 1]


def classes(how: str = "", *, reward: Any = linear, algorithm: Any = None, lr: float = 1e-3, **model: Any) -> sa.Finetuner:
    kind = {"process": sa.VP(), "predicts": "v", **model}
    encode = lambda names: torch.tensor([float(name) for name in names])  # noqa: E731
    return sa.Finetuner(
        sa.Model(Classes(how), shape=(2,), encode=encode, **kind), reward=reward, algorithm=algorithm or sa.DPOK(beta=0.5),
        prompts=["0", "1"], sampler=sa.Sampler(steps=20), train=sa.Train(iterations=4, batch=64, lr=lr, device="cpu"),
    )  # fmt: skip


def pictures(change: Callable[[sa.Model], None]) -> sa.Finetuner:
    model = digits.build(digits.Config())
    change(model)
    return sa.Finetuner(
        model, reward=ink.build(ink.Config()), algorithm=sa.ScoreAction(beta=0.1, updates=2, rows=16), prompts=["1", "7"],
        sampler=sa.Sampler(steps=10, guidance=2.0), train=sa.Train(iterations=4, batch=32, lr=1e-4, device="cpu"),
    )  # fmt: skip


def forgotten(model: sa.Model) -> None:
    torch.manual_seed(0)
    for module in model.net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
    model.reference_net.load_state_dict(model.net.state_dict())


def scaled(model: sa.Model, factor: float, shift: float) -> None:
    decode = model.decode
    model.decode = lambda x0: factor * decode(x0) + shift


NOISE = "the network finds the noise"
SEEDED: dict[str, tuple[Callable[[], sa.Finetuner], str, str]] = {
    "dropout in train mode": (lambda: in_train_mode(classes("dropout")), "the network answers the same twice", "wrong"),
    "flow for VP": (lambda: classes(process=sa.Flow(), predicts="velocity"), NOISE, "wrong"),
    "x0 for v": (lambda: classes(predicts="x0"), NOISE, "wrong"),
    "clock backwards": (lambda: classes("backwards"), NOISE, "wrong"),
    "LoRA on what is not used": (lambda: classes(lora_rank=2, lora_targets=["unused"]), "training runs", "wrong"),
    "rows in reverse": (lambda: classes(reward=lambda x, _: linear(x, _).flip(0)), "a sample's reward is its own", "wrong"),
    "rows shuffled": (
        lambda: classes(reward=lambda x, _: linear(x, _)[torch.randperm(len(x))]), "the reward answers the same twice", "note",
    ),
    "a thousand times the reward": (
        lambda: classes(reward=lambda x, _: 1000 * linear(x, _)), "beta suits the reward's scale", "note",
    ),
    "a learning rate of 1": (lambda: classes(lr=1.0, algorithm=sa.DDPO()), "training runs", "wrong"),
    "pictures in [-1, 1]": (lambda: pictures(lambda model: scaled(model, 2.0, -1.0)), "the reward answers", "wrong"),
    "pictures in [0, 255]": (lambda: pictures(lambda model: scaled(model, 255.0, 0.0)), "the reward answers", "wrong"),
    "cosine for digits": (lambda: pictures(lambda model: setattr(model, "process", sa.CosineVP())), NOISE, "wrong"),
    "flow for digits": (lambda: pictures(lambda model: setattr(model, "process", sa.Flow())), NOISE, "wrong"),
    "eps for digits": (lambda: pictures(lambda model: setattr(model, "predicts", "eps")), NOISE, "wrong"),
    "digits forgotten": (lambda: pictures(forgotten), NOISE, "wrong"),
}  # fmt: skip
"""Faults that test_doctor.py has not."""


@pytest.mark.long
@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_fault_is_named(name: str) -> None:
    """Twins: the same runs without it, which give no alarm."""
    make, check, verdict = SEEDED[name]
    found = {finding.check: finding for finding in sa.examine(make(), iterations=3)}
    assert check in found, found
    same(found[check].verdict, verdict, in_order="right")


@pytest.mark.long
@pytest.mark.parametrize("make", [classes, lambda: pictures(lambda model: None)], ids=["classes", "digits"])
def test_the_runs_that_the_faults_are_put_into_are_in_order(make: Callable[[], sa.Finetuner]) -> None:
    """The faults above are its twins, and one of them is tried here."""
    faulty = list(sa.examine(SEEDED["eps for digits"][0](), iterations=1))
    accepts(no_alarm, list(sa.examine(make(), iterations=3)), faulty=faulty)
