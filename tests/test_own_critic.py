"""Truth: the critic that a recipe names is the one that is trained; what has none, or is not there, is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twins import accepts

from scoreaction.errors import UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import dump, load_recipe, resolve
from scoreaction.yaml_text import parse_yaml

FILE = """
import torch
from pydantic import BaseModel
from torch import nn

class Config(BaseModel, extra="forbid"):
    hidden: int = 8

class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, x, t, condition):
        return self.body(torch.cat([x, t.to(x)[:, None]], 1))

def build(config):
    return lambda width: Net(config.hidden)
"""
SMALL = ["sampler.steps=3", "train.iterations=1", "train.batch=8", "algorithm.critic_updates=2"]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "critics_here").mkdir()
    (tmp_path / "critics_here" / "points.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_critic_of_a_recipe_is_what_is_trained() -> None:
    """With its settings, and after the recipe was written and read. Twins: ours, and the default of its setting."""
    named = load_recipe("mixture", [*SMALL, "critic={name: critics_here.points, hidden: 5}"])

    def right(recipe: Any) -> None:
        net: Any = build(recipe).learner.networks["critic"].net
        assert type(net).__name__ == "Net"
        assert net.body[0].out_features == 5

    again = resolve(parse_yaml(dump(named), where="here"))
    accepts(
        right, again, ours=load_recipe("mixture", SMALL), default=load_recipe("mixture", [*SMALL, "critic=critics_here.points"])
    )
    tuner = build(named)
    before = [p.detach().clone() for p in tuner.learner.networks["critic"].net.parameters()]
    next(iter(tuner))
    assert any(not (a == b).all() for a, b in zip(before, tuner.learner.networks["critic"].net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["critic=points"], "critic.name: unknown critic 'points'; (one of your own goes by its file: my_package.points is"),
        (["critic={hidden: 5}"], "critic: must be a mapping with a name, for example {name: my_package.critics}"),
        (["critic={name: critics_here.points, hiden: 5}"], "critic.hiden: unknown key; did you mean hidden?"),
        (["critic=critics_here.points", "algorithm={name: ddpo}"], "critic: ddpo has none here; leave it out"),
        (["critic=critics_here.points", "model={name: linear_quadratic, mean: [1, 1, 1]}"], "critic: its network fails on x"),
        (["reward.name=mine"], "reward.name: unknown reward 'mine'; did you mean linear? (one of your own goes by its file"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_one_line(more: list[str], said: str) -> None:
    """The right twins are above."""
    small = SMALL[:3] if "algorithm={name: ddpo}" in more else SMALL
    reward = ["reward.direction=[1, 0, 0]"] if any("linear_quadratic" in text for text in more) else []
    with pytest.raises(UserError) as caught:
        build(load_recipe("mixture", [*small, *reward, *more]))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value).partition(": its network fails")[0]


def test_a_recipe_from_elsewhere_does_not_import_a_critic(tmp_path: Path) -> None:
    """Twin: with trust."""
    away = tmp_path / "away"
    away.mkdir()
    path = away / "recipe.yaml"
    path.write_text(dump(load_recipe("mixture", ["critic=critics_here.points"])))
    with pytest.raises(UserError, match=r"^critic\.name: .* names the module critics_here\.points, whose code would run"):
        load_recipe(str(path))
    assert load_recipe(str(path), trust=True).critic is not None
