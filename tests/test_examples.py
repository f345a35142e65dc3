"""Truth: what a reader would do: run the examples as they are, for fewer iterations, and read what they print."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from twins import accepts

from scoreaction.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python examples/NAME.py ARGUMENTS` prints."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def before_and_after(text: str) -> tuple[float, float]:
    """The two numbers of the last line that has `before`."""
    line = [line for line in text.splitlines() if "before" in line][-1]
    first, second = re.findall(r"-?\d+(?:\.\d+)?", line)[:2]
    return float(first), float(second)


def rose(pair: tuple[float, float]) -> None:
    assert pair[1] > pair[0], pair


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it_and_how_long_it_takes(path: Path) -> None:
    def tells(text: str) -> None:
        assert re.search(rf"^python examples/{path.stem}\.py \[\w+\] +# .*(minute|second).* laptop's CPU$", text, re.M)

    text = path.read_text(encoding="utf-8")
    accepts(tells, text, another=text.replace(path.stem, "mine"), no_time=text.replace("minute", "while"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "iterations"),
    [
        ("own_network", 8),
        ("own_algorithm", 4),
        pytest.param("own_reward_on_stable_diffusion", 3, marks=pytest.mark.long),
        pytest.param("online_black_box", 3, marks=pytest.mark.long),
    ],
)
def test_an_example_raises_its_reward(
    name: str,
    iterations: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twin: the figures in the other order."""
    monkeypatch.chdir(tmp_path)
    before, after = before_and_after(output(name, [str(iterations)], monkeypatch, capsys))
    accepts(rose, (before, after), the_other_order=(after, before))


@pytest.mark.slow
def test_a_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The curve has a line an iteration, and the samples are the tuned model's. Twin: the base's mean for the tuned one's."""
    monkeypatch.chdir(tmp_path)
    small = ["sampler.steps=10", "train.iterations=4", "train.batch=128", "evaluation.n=256", "evaluation.steps=10"]
    assert main(["train", "mixture", *small, "--output", "run"]) == 0
    text = output("read_a_run", ["run"], monkeypatch, capsys)
    assert len(re.findall(r"^ +\d+  reward ", text, re.M)) == 4
    tuned, base = ([float(number) for number in part.split(",")] for part in re.findall(r"\[([^\]]*)\]", text))

    def moved(mean: list[float]) -> None:  # the reward is x + y/2
        assert mean[0] + mean[1] / 2 > base[0] + base[1] / 2 + 0.5

    accepts(moved, tuned, the_base=base)
