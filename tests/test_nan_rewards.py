"""Truth: the run whose reward stays finite. One whose file gives NaN, at once or later, is one line in every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commanding import TINY, train
from twins import same

from scoreaction.cli import main
from scoreaction.training.run_folder import RunFolder

FILE = """
from pydantic import BaseModel

CALLS = []

class Config(BaseModel, extra="forbid"):
    after: int = 0

def build(config):
    def reward(samples, prompts):
        CALLS.append(1)
        return samples[:, 0] * (float("nan") if len(CALLS) > config.after else 1.0)
    return reward
"""
NAN = "values are NaN or infinite; return finite numbers"


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], str]:
    """The override that names a reward which is finite for so many calls; a module of its own for each."""
    folder = tmp_path / f"of_{tmp_path.name}"  # modules are imported once
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def override(after: int) -> str:
        name = f"{tmp_path.name}_{after}"
        (folder / f"{name}.py").write_text(FILE)
        return f"reward={{name: {folder.name}.{name}, after: {after}}}"

    return override


@pytest.mark.parametrize(
    ("after", "said", "last"),
    [(1, "iteration 1: reward: 8 of 8 " + NAN + "; nothing was saved yet", None), (4, "iteration 4: reward: 8 of 8 " + NAN, 3)],
)
def test_training_ends_with_one_line_and_what_was_learned(
    after: int, said: str, last: int | None, named: Callable[[int], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One call is the trial before the run. Twin: a reward that stays finite."""
    code, err = train(tmp_path / "run", named(after)), capsys.readouterr().err
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err
    newest = RunFolder(tmp_path / "run").newest_checkpoint()
    assert (None if newest is None else int(newest.name)) == last
    same(code, 1, finite=train(tmp_path / "twin", named(1000)))


@pytest.mark.parametrize("after", [1, 2])
def test_steering_ends_with_one_line(after: int, named: Callable[[int], str], refused: Callable[..., str]) -> None:
    """Twin: a reward that stays finite."""
    arguments = ["steer", "mixture", *TINY, "train.iterations=1", "steer.particles=2"]
    said = refused(*arguments, named(after), "--output", "steered", code=1)
    assert said.startswith("reward: ")
    assert said.endswith(NAN)
    assert main([*arguments, named(1000), "--output", "twin"]) == 0
