"""Truth: the run that nothing stopped, bit for bit. What stops a run, and what resuming it gives."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commanding import TINY, Stop, train, weights
from twins import same

from scoreaction.cli import main
from scoreaction.commands.signals import Signals
from scoreaction.commands.train import Stopper
from scoreaction.recipes.recipe import load_recipe
from scoreaction.training.run_folder import read_json_lines


def _raise() -> None:
    raise KeyboardInterrupt


def test_an_existing_run_is_refused_and_a_finished_one_is_left_alone(run: Path, refused: Callable[..., str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["train", "mixture", *TINY, "train.iterations=4", "--output", run]
    assert refused(*command).startswith(f"--output: {run} already holds a run")
    assert train(run, "--resume") == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    said = refused("train", "mixture", *TINY, "train.iterations=4", "train.lr=0.5", "--output", run, "--resume")
    assert said.startswith("train.lr: this run has 0.001, not 0.5")
    assert refused("train", "mixture", *TINY, "train.iterations=3", "--output", run, "--resume").startswith("train.iterations")


@pytest.mark.slow
def test_resume_starts_afresh_where_there_is_nothing(run: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "new", "--resume") == 0
    assert train(tmp_path / "other", "train.seed=5") == 0
    same(weights(tmp_path / "new"), weights(run), other_seed=weights(tmp_path / "other"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_between_iterations_and_resuming_equals_the_uninterrupted_run(
    number: signal.Signals, run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Stop(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    said = refused("train", "mixture", *TINY, "train.iterations=4", "--output", folder, code=130)
    assert "stopped after iteration 2, state saved; go on with: scoreaction train" in said
    assert signal.getsignal(number) == before
    assert not (folder / "summary.json").exists()
    (folder / ".lock").write_text("999999999")  # of a process that is dead
    assert train(folder, "--resume") == 0
    assert weights(folder) == weights(run)
    assert len(read_json_lines(folder / "metrics.jsonl")) == 4


def test_a_second_hangup_is_no_haste_and_an_ignored_one_none() -> None:
    """A lost terminal hangs up twice, and nohup lets it be ignored; the twin, a second SIGTERM, stops at once."""

    def twice(number: signal.Signals) -> bool:
        with Signals() as signals:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            return signals.requested

    assert twice(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        twice(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not twice(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_an_interrupt_within_an_iteration_goes_back_to_the_checkpoint(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Stop(monkeypatch, 2, _raise)
    folder = tmp_path / "run"
    command = ["train", "mixture", *TINY, "train.iterations=4", "train.checkpoint_every=1", "--output", folder]
    assert "the state after iteration 2 is saved" in refused(*command, code=130)
    assert main([str(part) for part in command] + ["--resume"]) == 0
    assert weights(folder) == weights(run)


@pytest.mark.slow
def test_a_longer_run_extends_a_finished_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, iterations=2) == 0
    assert train(folder, "--resume", iterations=3) == 0
    iterations = [record["iteration"] for record in read_json_lines(folder / "metrics.jsonl")]
    same(iterations, [1, 2, 3], left_alone=[1, 2], begun_again=[1, 2, 1, 2, 3])
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 3


def test_a_run_held_by_a_living_process_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    command = ["train", "mixture", *TINY, "train.iterations=1", "--output", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused(*command).startswith(f"--output: {tmp_path / 'run'} is in use by another process")
    assert main([str(part) for part in command]) == 0


def test_early_stop_waits_for_its_patience() -> None:
    def stops(rewards: list[float], patience: int = 2) -> list[bool]:
        stopper = Stopper(load_recipe("mixture", [f"early_stop={{metric: reward_mean, patience: {patience}}}"]).early_stop)
        return [stopper({"reward_mean": reward}) for reward in rewards]

    same(stops([1, 2, 2, 2]), [False, False, False, True], less=stops([1, 2, 2, 2], 1), more=stops([1, 2, 2, 2], 3))
    same(stops([1, 2, 2, 3]), [False] * 4, less=stops([1, 2, 2, 3], 1))


def test_early_stop_waits_where_diversity_is_not_known() -> None:
    stopper = Stopper(load_recipe("mixture", ["early_stop={metric: diversity, patience: 2}"]).early_stop)
    seen = [{}, {"diversity": 2.0}, {}, {"diversity": 1.0}, {}, {"diversity": 1.0}]
    found = [stopper(metrics) for metrics in seen]
    same(found, [False] * 5 + [True], where_it_is_not_known=[False] * 4 + [True] * 2, never=[False] * 6)


@pytest.mark.slow
def test_early_stop_ends_a_run_for_good(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "corrected"
    command = ["train", "mixture", *TINY, "train.iterations=1", "--output", folder]
    assert refused(*command, "early_stop={metric: reward_meen}").startswith("early_stop.metric: no metric 'reward_meen'")
    assert not folder.exists()
    assert main([*map(str, command), "early_stop={metric: reward_mean}"]) == 0
    level = "evaluation.held_out=[{name: linear, direction: [0.0, 0.0]}]"
    falling = [level, "early_stop={metric: held_out.linear, patience: 2}"]
    assert train(tmp_path / "flat", *falling) == 0
    assert len(read_json_lines(tmp_path / "flat" / "metrics.jsonl")) == 3
    assert train(tmp_path / "flat", *falling, "--resume") == 0
    assert len(read_json_lines(tmp_path / "flat" / "metrics.jsonl")) == 3
