"""Truth: what a recipe's key says of the same mistake. Settings in Python are refused in one line, with the nearest key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from twins import accepts, same

import scoreaction as sa
from scoreaction.errors import UserError
from scoreaction.models import gaussian_mixture
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import linear
from scoreaction.settings import Settings

MISTAKES: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "Sampler.step: unknown key; did you mean steps?": (sa.Sampler, {"step": 3}, "sampler.step=3"),
    "Sampler.eta: must be less than or equal to 1 (got 2)": (sa.Sampler, {"eta": 2}, "sampler.eta=2"),
    "Train.iterations: must be greater than or equal to 1 (got 0)": (sa.Train, {"iterations": 0}, "train.iterations=0"),
    "ScoreAction.bata: unknown key; did you mean beta?": (sa.ScoreAction, {"bata": 1.0}, "algorithm.bata=1.0"),
    "SQDF: discount_rate and gamma are two ways": (sa.SQDF, {"gamma": 0.9, "discount_rate": 1.0}, None),
    "Evaluation.n: must be greater than or equal to 2 (got 1)": (sa.Evaluation, {"n": 1}, "evaluation.n=1"),
    "Online.round: unknown key; did you mean rounds?": (sa.Online, {"round": 1}, None),
    "Steering.metod: unknown key; did you mean method?": (sa.Steering, {"metod": "svdd"}, None),
    "Distill.rnk: unknown key; did you mean rank?": (sa.Distill, {"rnk": 1}, None),
    "Config.mens: unknown key; did you mean means?": (gaussian_mixture.Config, {"mens": 1}, "model.mens=1"),
    "Config.direction: is required": (linear.Config, {}, None),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_in_python_is_the_line_of_a_recipe(said: str) -> None:
    """Twin: a plain class of pydantic, whose error has several lines."""
    kind, values, override = MISTAKES[said]

    def one_line(make: Any) -> None:
        with pytest.raises((UserError, ValidationError)) as caught:
            make(**values)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(said)

    class Plain(BaseModel, extra="forbid"):
        x: int

    accepts(one_line, kind, plain=Plain)
    if override is not None:
        with pytest.raises(UserError) as caught:
            load_recipe("mixture", [override])
        assert str(caught.value).partition(".")[2] == said.partition(".")[2]


def test_a_loop_takes_its_settings_and_a_fault_has_one_line() -> None:
    """Twins: the settings' own class, and what has several lines as a text."""
    model = gaussian_mixture.build(gaussian_mixture.Config(hidden=8))

    def said(make: Any) -> str:
        with pytest.raises(UserError) as caught:
            make()
        return str(caught.value)

    for make, key in (
        (lambda: sa.Pretrainer("table.csv"), "settings: must be an object such as sa.Pretrain("),  # type: ignore[arg-type]
        (lambda: sa.Distiller(model, {"rank": 8}), "settings: must be an object such as sa.Distill("),  # type: ignore[arg-type]
    ):
        same(said(make).startswith(key), True, another=said(lambda: sa.Train(lr=-1)).startswith(key))
    table = torch.zeros(3, 2)
    same("\n" in said(lambda: sa.Pretrain(data=table)), False, as_a_text="\n" in repr(table))  # type: ignore[arg-type]


def test_right_settings_are_taken_and_copied() -> None:
    """Those of a class of one's own too. The wrong twins are above."""

    class Own(Settings, extra="forbid", frozen=True):
        x: int = 1

    same(Own(x=2).model_copy(update={"x": 3}).x, 3, not_updated=2)
    same(Own.model_validate({"x": 4}).x, 4, default=1)
    same(sa.Sampler(steps=3).steps, 3, default=sa.Sampler().steps)
