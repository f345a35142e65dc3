"""Truth: what a reader would do: run the snippets as printed, type the commands, follow the links."""

from __future__ import annotations

import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_pipelines import stable_diffusion
from twins import accepts

import scoreaction as sa
from scoreaction.cli import app, main
from scoreaction.commands.listing import listed
from scoreaction.commands.train import run
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.M | re.S)
RECIPES = {"train": 1, "plan": 1, "pretrain": 1, "distill": 1, "compare": 1, "doctor": 1, "steer": 1}


def snippets(page: Path, language: str) -> list[tuple[str, str]]:
    """What stands behind the language, and the text, of a page's blocks."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(head.removeprefix(language).strip(), body) for head, body in found if head.split(" ")[0] == language]


def commands(page: Path) -> list[list[str]]:
    """The scoreaction commands of a page's blocks and of its text, split as a shell does."""
    text = page.read_text(encoding="utf-8")
    lines = [line for head, body in FENCE.findall(text) if not head for line in body.splitlines()]
    lines += [" ".join(part.split()) for part in re.findall(r"`(scoreaction [^`]+)`", FENCE.sub("", text))]
    found = [shlex.split(line, comments=True) for line in lines if re.match(r"(\S*/)?scoreaction ", line)]
    return [parts[1:] for parts in found if "..." not in parts]


def meant(word: str) -> bool:
    """Whether a word stands for what readers put there."""
    return re.fullmatch(r"[A-Z_,]+", word) is not None


def check_command(parts: list[str]) -> None:
    """Parses it as the command line does, and reads recipe and overrides. UserError or a usage error where it is wrong."""
    group: Any = typer.main.get_command(app)
    name, *rest = parts
    if not rest:  # it is only named
        assert group.get_command(None, name) is not None
        return
    command = group.get_command(None, name)
    assert command is not None, f"no command {name}"
    command.make_context(name, [word for word in rest if not word.startswith("key=")])
    if name in RECIPES and not meant(rest[0]) and rest[0] in listed("recipes"):
        overrides = [word for word in rest[1:] if re.match(r"[a-z_.0-9]+=", word)]
        named = [word for word in overrides if "my_package" not in word and "=runs/" not in word]
        load_recipe(rest[0], named if len(named) == len(overrides) else [])
    if name == "list" and len(rest) == 2 and "." not in rest[1]:
        assert rest[1] in listed(rest[0])


WRONG = ["trian mixture", "train mixture --outptu x", "train mixture algorithm.bata=1", "list rewards jpg"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    def understood(found: list[list[str]]) -> None:
        for parts in found:
            try:
                check_command(parts)
            except (Exception, SystemExit) as error:  # typer brings its own copy of click's errors
                raise AssertionError(f"scoreaction {' '.join(parts)}: {error}") from error

    accepts(understood, commands(page), **{wrong: [wrong.split()] for wrong in WRONG})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    def leads(target: str) -> None:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target

    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            accepts(leads, target, no_file=f"nowhere/{path}", **({"no_title": f"{path}#no-{anchor}"} if anchor else {}))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")], ids=lambda page: page.stem)
def test_every_snippet_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, one after the other, but for the number of iterations; a hub's pipeline is a small one."""
    import diffusers

    def first(method: Any) -> Any:
        return lambda self, *rest: islice(method(self, *rest), 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sa.Finetuner, "_iterations", first(sa.Finetuner._iterations))
    monkeypatch.setattr(sa.Distiller, "__iter__", first(sa.Distiller.__iter__))
    small = stable_diffusion()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: small)
    monkeypatch.setattr(small, "load_lora_weights", lambda *_: None)
    names: dict[str, Any] = {"__name__": "snippet"}
    for head, body in snippets(page, "python"):
        if head:
            file = tmp_path / head.removeprefix("file=")
            file.parent.mkdir(exist_ok=True)
            file.write_text(body, encoding="utf-8")
        else:
            exec(compile(body, f"{page.name}", "exec"), names)


@pytest.mark.slow
def test_the_algorithm_of_the_pages_raises_the_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model and the algorithm that extending.md prints, in a recipe. Twin: it learns from rewards turned around."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for head, body in snippets(ROOT / "docs" / "extending.md", "python"):
        file = tmp_path / head.removeprefix("file=")
        file.parent.mkdir(exist_ok=True)
        file.write_text(body, encoding="utf-8")
    small = ["sampler.steps=8", "train.iterations=12", "train.batch=128", "train.lr=5e-3", "evaluation.n=512"]

    def rose(direction: str) -> float:
        chosen = ["algorithm.name=my_package.regression", f"reward.direction={direction}", "evaluation.steps=20"]
        figures = run(load_recipe("mixture", [*chosen, *small]), tmp_path / direction, resume=False)
        way = 1.0 if direction == "[1.0, 0.5]" else -1.0
        return way * (figures["reward_tuned"] - figures["reward_base"])

    def rises(gain: float) -> None:
        assert gain > 0.3

    accepts(rises, rose("[1.0, 0.5]"), turned_around=rose("[-1.0, -0.5]"))
    assert main(["list", "models", "my_package.two_moons"]) == 0
    recipe = load_recipe("mixture", ["model={name: my_package.two_moons, width: 8}", "algorithm.name=ddpo"])
    assert build(recipe).model.shape == (2,)
    assert recipe.sampler.steps == 50, "the recipe's own comes before the model's"
