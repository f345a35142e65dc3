"""Truth: a mark that the stranger's code leaves where it runs. It runs nowhere by surprise; twin: where the user allows it."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from parameters import with_slow
from servers import pretending
from twins import accepts, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.errors import UserError
from scoreaction.recipes.recipe import load_recipe

TINY = ["algorithm.name=ddpo", "train={iterations: 1, batch: 8}", "evaluation={n: 16, steps: 3}", "sampler.steps=3"]
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "run"
    assert main(["train", "mixture", *TINY, "model.hidden=8", "--output", str(folder)]) == 0
    return folder


def strangers(good: Path, here: Path) -> tuple[str, Path]:
    """A good run whose recipes name a module that lies in its folder; its name, and the mark that the module leaves."""
    name = f"stranger_{next(NUMBERS)}"
    folder, mark = here / name, here / f"{name}.ran"
    shutil.copytree(good, folder)
    (folder / "payload.py").write_text(f"open({str(mark)!r}, 'w')\nfrom scoreaction.models.gaussian_mixture import *\n")
    for file in ("recipe.yaml", "model/recipe.yaml"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("name: gaussian_mixture", f"name: {name}.payload"))
    (folder / "checkpoints" / "000001" / "run.json").unlink()  # so that it is of no other run
    return name, mark


COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
    "plan": lambda run, more: main(["plan", f"{run}/recipe.yaml", *more]),
    "doctor": lambda run, more: main(["doctor", f"{run}/recipe.yaml", "--iterations", "1", *more]),
    "train": lambda run, more: main(["train", f"{run}/recipe.yaml", "--output", f"{run}.out", *more]),
    "resume": lambda run, more: main(["train", f"{run}/recipe.yaml", "--output", run, "--resume", *more]),
    "compare": lambda run, more: main(["compare", f"{run}/recipe.yaml", "--algorithms", "ddpo", "--output", f"{run}.c", *more]),
    "distill": lambda run, more: main(
        ["distill", f"{run}/recipe.yaml", "distill={iterations: 1}", "--output", f"{run}.d", *more]
    ),
    "cluster": lambda run, more: main(
        ["cluster", f"{run}/recipe.yaml", "--n", "40", "--k", "2", "--output", f"{run}.npz", *more]
    ),
    "sample": lambda run, more: main(["sample", run, "--base", "--n", "4", *more]),
    "evaluate": lambda run, more: main(["evaluate", run, "--n", "4", *more]),
    "load": lambda run, more: sa.load(run, trust=bool(more)) is None,
}


@pytest.mark.parametrize("command", with_slow(COMMANDS, "compare"))
def test_a_strangers_code_runs_only_where_it_is_allowed(
    command: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run, mark = strangers(good, tmp_path)
    try:
        code = COMMANDS[command](run, [])
        said = capsys.readouterr().err
    except UserError as error:
        code, said = 2, str(error)
    assert (code, mark.exists()) == (2, False)
    assert f"model.name: {run}/" in said
    assert "names the module" in said
    assert "--trust, or trust=True in Python, allows it" in said
    COMMANDS[command](run, ["--trust"])
    same(mark.exists(), True, without=False)


def test_a_model_is_loaded_where_the_rewards_that_tuned_it_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its card says, sa.load(folder) alone. Twin: all of the recipe, whose rewards cannot be imported."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    reward = (
        "from pydantic import BaseModel\n\nclass Config(BaseModel): pass\n\ndef build(config): return lambda x, c: x[:, 0]\n"
    )
    Path("lab").mkdir()
    Path("lab/score.py").write_text(reward)
    own = ["reward=[{name: lab.score}]", "evaluation.held_out=[{name: lab.score}]", "train.select=held_out.lab.score"]
    assert main(["train", "mixture", *TINY, *own, "model.hidden=8", "--output", "run"]) == 0
    drawn = ["--n", "4", "--output"]
    assert main(["sample", "run", *drawn, str(tmp_path / "before")]) == 0
    shutil.rmtree("lab")
    for name in ("lab", "lab.score"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "run"

    def opens(load: Callable[[], object]) -> None:
        try:
            load()
        except UserError as error:
            raise AssertionError from error

    accepts(opens, lambda: sa.load(folder), all_of_it=lambda: load_recipe(str(folder / "recipe.yaml"), trust=True))
    accepts(opens, lambda: sa.load(folder / "model"), untrusted=lambda: load_recipe(str(folder / "model" / "recipe.yaml")))
    assert main(["sample", str(folder), *drawn, str(tmp_path / "after")]) == 0
    assert main(["sample", str(folder), "--base", *drawn, str(tmp_path / "base")]) == 0
    before, after, base = (np.load(tmp_path / name / "samples.npz")["samples"] for name in ("before", "after", "base"))
    same(torch.from_numpy(after), torch.from_numpy(before), pretrained=torch.from_numpy(base))
    assert main(["evaluate", str(folder), "--n", "4"]) == 2, "which scores"


def test_a_report_imports_nothing(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: the very values, built."""
    monkeypatch.chdir(tmp_path)
    run, mark = strangers(good, tmp_path)
    assert main(["report", run]) == 0
    ran = mark.exists()
    load_recipe(f"{run}/recipe.yaml", trust=True)
    same(ran, False, built=mark.exists())


def test_the_working_folders_own_recipe_and_what_is_typed_are_trusted(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twins: the same recipe in another folder, and in the folder of a run."""
    monkeypatch.chdir(tmp_path)
    run, mark = strangers(good, tmp_path)
    shutil.copy(f"{run}/recipe.yaml", "mine.yaml")
    (tmp_path / "below").mkdir()
    shutil.copy(f"{run}/recipe.yaml", "below/mine.yaml")
    with pytest.raises(UserError, match="would run"):
        load_recipe("below/mine.yaml")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="would run"):
        load_recipe("mine.yaml")
    assert not mark.exists()
    (tmp_path / "metrics.jsonl").unlink()
    load_recipe("mine.yaml")
    assert mark.exists()
    other, typed = strangers(good, tmp_path)
    assert main(["plan", "mixture", *TINY, f"model.name={other}.payload"]) == 0
    assert typed.exists()
    moved, mark = strangers(good, tmp_path)
    monkeypatch.chdir(tmp_path / moved)
    with pytest.raises(UserError, match="would run"):
        load_recipe("recipe.yaml")


@pytest.mark.parametrize("where", ["reward", "reward.0", "algorithm", "evaluation.held_out.0"])
def test_every_part_of_a_recipe_is_looked_at(where: str, tmp_path: Path) -> None:
    block = "{name: some.module}"
    parts = {"model": "digits", "reward": "ink", "algorithm": "ddpo", "evaluation": "{}"}
    parts |= {
        "reward": {"reward": block}, "reward.0": {"reward": f"[{block}]"}, "algorithm": {"algorithm": "some.module"},
        "evaluation.held_out.0": {"evaluation": f"{{held_out: [{block}]}}"},
    }[where]  # fmt: skip
    (tmp_path / "r.yaml").write_text("".join(f"{key}: {value}\n" for key, value in parts.items()))
    with pytest.raises(UserError, match=rf"^{where}\.name: .*r\.yaml names the module some\.module, whose code would run"):
        load_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(UserError, match="no module 'some'"):
        load_recipe(str(tmp_path / "r.yaml"), trust=True)


RECIPE = "model: shapes\nreward: {reward}\nalgorithm: ddpo\ntrain: {{iterations: 1, batch: 4}}\nprompts: {prompts}\n"


def test_prompts_are_no_file_of_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link and a way up are elsewhere too; twins: beside the recipe, in the working folder, and typed."""
    own, work = tmp_path / "recipes", tmp_path / "work"
    own.mkdir()
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "secret.txt").write_text("red circle\n")
    (own / "near.txt").write_text("red circle\n")
    (work / "here.txt").write_text("red circle\n")
    (own / "link.txt").symlink_to(tmp_path / "secret.txt")

    def read(prompts: object, *typed: str, trust: bool | None = None) -> object:
        (own / "r.yaml").write_text(RECIPE.format(reward="jpeg", prompts=prompts))
        return load_recipe(str(own / "r.yaml"), typed, trust=trust).prompts

    for prompts in (tmp_path / "secret.txt", "../secret.txt", "link.txt", own / "near.txt"):
        with pytest.raises(UserError, match=r"^prompts: .*r\.yaml may name a file below its own or the working folder"):
            read(prompts)
        assert read(prompts, trust=True) == ["red circle"]
    same([read("near.txt"), read("here.txt")], [["red circle"]] * 2, nothing=[])
    assert read("near.txt", f"prompts={tmp_path / 'secret.txt'}") == ["red circle"]


def test_a_token_is_sent_to_no_server_that_a_stranger_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twins: a server of this machine, no token, and one that the user allows."""

    def read(url: str, *, trust: bool | None = None) -> str:
        (tmp_path / "r.yaml").write_text(RECIPE.format(reward=f"{{name: http, url: '{url}'}}", prompts="null"))
        reward = load_recipe(str(tmp_path / "r.yaml"), trust=trust).reward
        return reward.name  # type: ignore[union-attr]

    assert read("http://evil.example") == "http"
    monkeypatch.setenv("SCOREACTION_TOKEN", "secret")
    with pytest.raises(UserError, match="would have the token in SCOREACTION_TOKEN sent to http://evil.example; --trust"):
        read("http://evil.example")
    with pretending(lambda i, body: (200, b"")) as here:
        same([read(here), read("http://evil.example", trust=True)], ["http"] * 2, refused=[])
    text = RECIPE.format(reward="{name: http, url: 'http://e', token_variable: HOME}", prompts="null")
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match="token_variable"):
        load_recipe(str(tmp_path / "r.yaml"), trust=True)
