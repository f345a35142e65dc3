"""Truth: the run's own metrics.jsonl; wandb and trackio are stand-ins with the interface of those packages."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from commanding import train
from test_recipe import fault
from tuning import SCORE_ACTION, tune
from twins import accepts, close, same

from scoreaction.training.trackers import Board, open_trackers


class Package(types.ModuleType):
    """`init` gives a run whose `log` is noted; `Image` keeps its pixels."""

    def __init__(self, name):
        super().__init__(name)
        self.opened, self.logged, self.Image = [], [], lambda pixels: pixels

    def init(self, **settings):
        self.opened.append(settings)
        return types.SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=lambda: None)


@pytest.fixture
def packages(monkeypatch):
    found = {name: Package(name) for name in ("wandb", "trackio")}
    for name, package in found.items():
        monkeypatch.setitem(sys.modules, name, package)
    return found


def test_a_tracker_gets_what_metrics_jsonl_has(packages, tmp_path):
    out = tmp_path / "run"
    assert train(out, "train.trackers=[wandb, trackio]", iterations=3) == 0
    own = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, package in packages.items():
        (opened,) = package.opened
        assert (opened["name"], opened["config"]["train"]["iterations"]) == ("run", 3), name
        right = [(row["iteration"], row) for row in own]
        same(package.logged, right, one_step_late=[(step + 1, row) for step, row in right], the_last_only=right[-1:])
    assert not (out / "tensorboard").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_goes_on_in_its_tracker(packages, tmp_path):
    for place, iterations in (("one", 2), ("one", 4), ("other", 2)):
        tuner = tune(SCORE_ACTION, iterations=iterations, output=tmp_path / place, trackers=("wandb",))
        tuner.resume()
        list(tuner)
    first, again, other = [opened["id"] for opened in packages["wandb"].opened]
    same(again, first, of_another_folder=other)
    assert {opened["resume"] for opened in packages["wandb"].opened} == {"allow"}
    assert [step for step, _ in packages["wandb"].logged] == [1, 2, 3, 4, 1, 2]


def test_what_is_not_finite_is_left_out(packages, tmp_path):
    board = Board("trackio", tmp_path, {})
    board.log({"iteration": 3, "reward_mean": 0.5, "kl_nats": math.inf})
    same(packages["trackio"].logged, [(3, {"iteration": 3, "reward_mean": 0.5})], as_it_was=[(3, {"kl_nats": math.inf})])


def test_pictures_are_shown_upright_in_eight_bits(packages, tmp_path):
    board = Board("wandb", tmp_path, {})
    picture = np.zeros((1, 3, 2, 4), np.float32)
    picture[0, 0, 1] = 1.0  # the lower row is red
    board.show(picture, 5)
    (step, shown), red = packages["wandb"].logged[0], [[[0] * 3] * 4, [[255, 0, 0]] * 4]
    assert step == 5
    assert shown["samples"][0].dtype == np.uint8
    close(shown["samples"][0].tolist(), red, upside_down=red[::-1])


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "trackio", None)
    out = tmp_path / "run"
    same(train(out, "train.trackers=[trackio]"), 2, as_if_it_ran=0)
    said = capsys.readouterr().err
    assert "train.trackers: trackio needs the package trackio: pip install trackio" in said
    assert not out.exists()
    assert "train.trackers" in fault("train.trackers=[wand]")


def test_by_default_there_is_tensorboard_and_none_is_none(tmp_path):
    def kinds(names):
        return [type(tracker).__name__ for tracker in open_trackers(names, Path(tmp_path), dict, 1)]

    accepts(lambda names: same(kinds(names), ["TensorBoard"]), None, without=())
