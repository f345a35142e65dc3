"""Truth: files of a user's own on the shelf are tried, refused and planned as ours are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from twins import close

from scoreaction.catalog import find
from scoreaction.cli import main
from scoreaction.errors import UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe


def own(folder: Path, body: str, *, name: str = "own") -> str:
    (folder / "shelf_of_mine").mkdir(exist_ok=True)
    (folder / "shelf_of_mine" / f"{name}.py").write_text(
        f"from pydantic import BaseModel\nimport scoreaction as sa\n"
        f"class Config(BaseModel, extra='forbid'):\n    axis: int = 0\n{body}\n"
    )
    return f"shelf_of_mine.{name}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in __import__("sys").modules if name.startswith("shelf_of_mine")]:
        monkeypatch.delitem(__import__("sys").modules, module)
    return tmp_path


MISFIT = r"\S+ does not fit the model gaussian_mixture: "
BODIES = {
    "raises": (
        "def build(config): return lambda x, p: x[:, 7]",
        MISFIT + "raised IndexError",
    ),
    "many": (
        "def build(config): return lambda x, p: x",
        MISFIT + "must return one number",
    ),
    "words": (
        "def build(config): return lambda x, p: ['a', 'b']",
        MISFIT + "must return one",
    ),
    "alone": ("def build(config): return lambda x: x.sum(1)", MISFIT + "raised TypeError"),
    "in_place": ("def build(config): return lambda x, p: x.mul_(2).sum(1)", r"\S+ does not fit .*changes its samples in place"),
}


@pytest.mark.parametrize("where", ["reward", "evaluation.held_out.0"])
@pytest.mark.parametrize("case", BODIES)
def test_a_users_reward_that_does_not_fit_is_refused_before_a_run(case: str, where: str, here: Path) -> None:
    """Twins: one that fits, and the same one where its file says PROBE = False."""
    body, why = BODIES[case]
    key = "reward" if where == "reward" else "evaluation.held_out"

    def recipe(name: str) -> Any:
        return load_recipe("mixture", [f"{key}={{name: {name}}}" if key == "reward" else f"{key}=[{{name: {name}}}]"])

    with pytest.raises(UserError, match=f"^{where}: {why}") as caught:
        build(recipe(own(here, body, name=case)))
    assert "\n" not in str(caught.value)
    build(recipe(own(here, "def build(config): return lambda x, p: x.sum(1)", name=f"{case}_right")))
    build(recipe(own(here, f"PROBE = False\n{body}", name=f"{case}_unasked")))


def test_a_users_refusal_that_names_a_setting_has_its_key(here: Path) -> None:
    body = (
        "def score(axis):\n    def reward(x, p):\n"
        "        if axis >= x.shape[1]: raise ValueError(f'axis: must be below {x.shape[1]}')\n"
        "        return x[:, axis]\n    return reward\ndef build(config): return score(config.axis)"
    )
    name = own(here, body)
    build(load_recipe("mixture", [f"reward={{name: {name}, axis: 1}}"]))
    with pytest.raises(UserError, match=r"^reward\.axis: must be below 2$"):
        build(load_recipe("mixture", [f"reward={{name: {name}, axis: 2}}"]))


def test_no_answer_that_costs_is_asked_for_before_a_run(here: Path) -> None:
    """Truth: the calls that a reward counts. An oracle is asked only where its file has PROBE = True, a server never."""
    counting = (
        "calls = []\n"
        "def score(x, p):\n    calls.append(len(x))\n    return x.sum(1)\n"
        "def build(config): return sa.Reward(score, differentiable=True)"
    )

    def calls(name: str, head: str, *more: str) -> list[int]:
        tuner = build(load_recipe("mixture", [f"reward={{name: {own(here, head + counting, name=name)}}}", *more]))
        assert tuner.reward.queries == 0, "a probe is no query"
        return find("reward", f"shelf_of_mine.{name}", key="reward").calls

    online = "online={rounds: [8, 8]}"
    assert calls("free", "") == [2]
    assert calls("costly", "PROBE = False\n") == []
    assert calls("oracle", "", online) == []
    assert calls("cheap_oracle", "PROBE = True\n", online) == [2]
    build(load_recipe("mixture", ["reward={name: http, url: 'http://127.0.0.1:9', retries: 0}"]))


def test_the_attributes_of_a_file_are_checked(here: Path) -> None:
    name = own(here, "PROBE = 'no'\ndef build(config): return lambda x, p: x.sum(1)", name="odd")
    with pytest.raises(UserError, match=r"^reward\.name: PROBE in shelf_of_mine\.odd must be a valid boolean"):
        load_recipe("mixture", [f"reward={{name: {name}}}"])
    name = own(here, "PARAMETERS = 0\ndef build(config): return lambda x, p: x.sum(1)", name="empty")
    with pytest.raises(UserError, match=r"^reward\.name: PARAMETERS in shelf_of_mine\.empty must be greater than 0"):
        load_recipe("mixture", [f"reward={{name: {name}}}"])


def test_a_users_scorer_is_planned_by_its_parameters_and_not_loaded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truth: 3e9 weights of 4 bytes. Twin: without PARAMETERS it is built, which here fails."""
    body = "def build(config): raise ValueError('axis: its weights are elsewhere')"
    heavy, light = own(here, f"PARAMETERS = 3_000_000_000\n{body}", name="heavy"), own(here, body, name="light")
    small = ["train.batch=4", "sampler.steps=2", "evaluation.n=4", "evaluation.steps=2"]
    assert main(["plan", "mixture", f"reward={{name: {heavy}}}", *small]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "scorers: shelf_of_mine.heavy" in line)
    close(float(line.split()[-2]), 3e9 * 4 / 2**30, atol=0.01, two_bytes=3e9 * 2 / 2**30)
    assert main(["plan", "mixture", f"reward={{name: {light}}}", *small]) == 2
    assert capsys.readouterr().err == "reward.axis: its weights are elsewhere\n"


def test_a_users_model_decodes_images_into_the_one_range(here: Path) -> None:
    """Twin: it clamps them to [0, 1]."""
    body = (
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.w = torch.nn.Linear(4, 4)\n    def forward(self, x, t, cond): return self.w(x)\n"
        "def build(config): return sa.Model(Net(), process=sa.VP(), predicts='v', shape=(1, 4, 4), decode=DECODE)"
    )
    reward = "reward=ink"

    def made(decode: str, name: str) -> Any:
        return build(
            load_recipe("mixture", [f"model={{name: {own(here, body.replace('DECODE', decode), name=name)}}}", reward])
        )

    with pytest.raises(UserError, match=r"^model: the decode= of shelf_of_mine\.raw: images must have values in \[0, 1\]"):
        made("None", "raw")
    assert made("lambda x0: ((x0 + 1) / 2).clamp(0, 1)", "clamped").model.shape == (1, 4, 4)


def test_a_users_model_has_its_own_card(here: Path) -> None:
    """Twin: without `card` the page loads it with this package."""
    body = "from scoreaction.models.gaussian_mixture import build, Config\n"
    card = (
        "def card(config, folder, off_below):\n"
        "    return sa.models.Card({'library_name': 'moons'}, ['toy'], ['import moons', 'moons.load()'])"
    )
    small = ["train.iterations=1", "train.batch=4", "sampler.steps=2", "evaluation.n=4", "evaluation.steps=2"]

    def page(name: str, text: str) -> str:
        model = f"model={{name: {own(here, text, name=name)}}}"
        assert main(["train", "mixture", model, "algorithm.name=ddpo", *small, "--output", name]) == 0
        return (here / name / "model" / "README.md").read_text()

    with_card, without = page("with_card", body + card), page("without", body)
    assert "library_name: moons" in with_card
    assert "moons.load()" in with_card
    assert "tags: [scoreaction, ddpo, toy]" in with_card or "- toy" in with_card
    assert "moons" not in without
    assert "sa.load" in without
