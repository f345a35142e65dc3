"""Truth: every command that reads a folder or a recipe, each given what is not there, a file, and a folder without any."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commanding import TINY
from twins import accepts, same

from scoreaction.cli import main
from scoreaction.commands import train
from scoreaction.commands.arguments import is_run
from scoreaction.errors import UserError
from scoreaction.yaml_text import read_text

RUNS = [["sample"], ["sample", "--base"], ["evaluate"], ["evaluate", "--steer", "smc"], ["watch"], ["report"], ["runs"]]
RECIPES = [["train"], ["compare", "--algorithms", "ddpo"], ["pairs"], ["plan"], ["doctor"], ["pretrain"]]
EITHER = [["distill"], ["distill", "--steps", "4"], ["steer"]]
KINDS = {"run": RUNS, "recipe": RECIPES, "either": EITHER}
SAID = {
    ("run", "nowhere"): "nowhere: no such folder; give",
    ("run", "file/below"): "file/below: no such folder; give",
    ("run", "file"): "file: is a file; give",
    ("run", "empty"): "empty: n",
    ("recipe", "nowhere"): "nowhere: no such recipe; choose from",
    ("recipe", "file/below"): "file/below: no such recipe; give a shipped name or a YAML file",
    ("recipe", "empty"): "empty: is a folder; give a shipped name or a YAML file",
    ("recipe", "old"): "old: is a folder; give old/recipe.yaml",
    ("either", "nowhere"): "nowhere: no such run, and no such recipe; give the folder of a run, a shipped recipe",
    ("either", "mixtrue"): "mixtrue: no such run, and no such recipe; did you mean mixture?",
    ("either", "empty"): "empty: not a run folder (no recipe.yaml in it); give what train printed",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "place", "said"),
    [(command, place, said) for (kind, place), said in SAID.items() for command in KINDS[kind]],
)
def test_what_is_not_there_is_said_in_a_line(
    command: list[str], place: str, said: str, here: Path, refused: Callable[..., str]
) -> None:
    """Twins: the lines about the other places. Nothing is made."""
    before = sorted(here.rglob("*"))
    line = refused(command[0], place, *command[1:])

    def check(text: str) -> None:
        assert text.startswith(said)
        assert "; " in text  # the remedy

    others = {other for other in SAID.values() if not other.startswith(said) and not said.startswith(other)}
    accepts(check, line, **{f"line_{i}": other for i, other in enumerate(sorted(others))}, no_remedy=line.partition(";")[0])
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("command", ["sample", "report", "watch", "runs", "train", "plan", "distill", "steer"])
def test_an_empty_name_is_not_the_working_folder(command: str, here: Path, refused: Callable[..., str]) -> None:
    """A variable of a shell that is not set; twin: the working folder by its name."""
    same("is empty; " in refused(command, ""), True, working_folder="is empty; " in refused(command, "."))


@pytest.mark.parametrize("arguments", [["train", "mixture", "--output", "a\0b"], ["report", "a\0b"], ["plan", "a\0b"]])
def test_a_null_character_is_in_no_name(arguments: list[str], here: Path, refused: Callable[..., str]) -> None:
    """Twin: the name without it, which is another fault or none."""
    line = refused(*arguments)
    same("has a null character in it; choose another name" in line, True, without="null" in refused("report", "ab"))


def test_a_shipped_recipe_is_one_beside_a_folder_of_its_name(here: Path) -> None:
    """Twin: a folder of another name."""
    for name in ("mixture", "mine"):
        (here / name).mkdir()
    same(is_run("mixture"), False, another_name=is_run("mine"))


def test_outputs_of_the_wrong_kind_are_refused_before_any_work(here: Path, refused: Callable[..., str]) -> None:
    """Twin: a run that starts in an empty folder, also with --resume."""
    (here / "x.npz").mkdir()
    assert refused("pairs", "mixture", "--output", "x.npz") == "--output: x.npz is a folder; name a file"
    np.savez(here / "rows.npz", rows=np.random.default_rng(0).normal(size=(200, 2)))
    said = refused("pretrain", "moons", "pretrain.data=rows.npz", "--resume", "--output", "nowhere")
    assert said == "--resume: there is no checkpoint in nowhere; leave it out to begin"
    assert not (here / "nowhere").exists()
    assert refused("train", "mixture", "--resume", "--output", "file") == "--output: file is a file; name a folder"
    assert main(["train", "mixture", *TINY, "train.iterations=1", "--resume", "--output", "empty"]) == 0


def test_a_folder_that_may_not_be_written_to_is_refused_before_a_model_is_built(
    here: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: one that may be, where the model is built."""
    built = []
    monkeypatch.setattr(train, "build", lambda *arguments, **options: built.append(1) or 1 / 0)
    assert main(["train", "mixture", "--output", "new/run"]) == 1
    open_folder = len(built)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused("train", "mixture", "--output", "new/run")
    assert line == f"--output: new/run cannot be written to (no right to write in {here}); name another folder"
    same(len(built) - open_folder, 0, where_it_may_be=open_folder)
    assert not (here / "new").exists()


def test_a_file_that_is_no_text_is_named_with_what_to_do(here: Path) -> None:
    """Twin: a text."""
    (here / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"bytes: is not UTF-8 text \(byte 2\); save it as UTF-8, or name another file"):
        read_text(here / "bytes")
    with pytest.raises(UserError, match=r"empty: cannot be read \(Is a directory\); name a file that can be"):
        read_text(here / "empty")
    same(read_text(here / "file"), "hello", another="ab")
