"""Truth: the operating system's own lock, files byte by byte, and what JSON can hold: a run's folder is one run's."""

import fcntl
import json
import math
import re
import threading

import pytest
from tuning import black_box, tune
from twins import accepts, same

import scoreaction as sa
from scoreaction.rewards import RewardError
from scoreaction.training.run_folder import Journal, RunFolder


def test_a_second_run_is_kept_out_of_the_folder_of_the_first(tmp_path):
    running = iter(tune(sa.DDPO(), output=tmp_path, iterations=2))
    second = tune(sa.DDPO(), output=tmp_path, iterations=2)
    next(running)
    with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    list(running)
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="output: .* is in use by another process"):
            list(second)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"output: .* already holds a run; go on with it by resume\(\)"):
        list(second)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    longer = tune(sa.DDPO(), output=tmp_path, iterations=3)
    assert longer.resume()
    assert [metrics["iteration"] for metrics in longer] == [3]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    """A file in its place, and a way through a file. Twin: a folder that is not there yet."""
    (tmp_path / "file").touch()

    def begins(output):
        try:
            list(tune(sa.DDPO(), output=output, iterations=1))
        except ValueError as error:
            if re.fullmatch(r"output: .* cannot be written to \(.*\); name another folder", str(error)) is None:
                raise
            raise AssertionError from error

    accepts(begins, tmp_path / "new", file=tmp_path / "file", below=tmp_path / "file" / "below")


def test_nothing_of_another_run_is_touched(tmp_path):
    """What resuming cuts, and what measuring and checkpoints replace, belongs to who holds the folder."""
    list(tune(sa.DDPO(), output=tmp_path, iterations=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    for forbidden in (sa.Finetuner.summary, sa.Finetuner.checkpoint):
        with pytest.raises(ValueError, match="already holds a run"):
            forbidden(tune(sa.DDPO(), output=tmp_path))
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match="in use by another process"):
            tune(sa.DDPO(), output=tmp_path).resume()
    assert before == {path: path.read_bytes() for path in before}
    assert tune(sa.DDPO(), output=tmp_path, iterations=3).resume(), "the twin: its own"


def test_a_run_is_driven_from_any_thread_and_tried_again(tmp_path):
    asked = []

    def down_at_first(samples, conditions):
        asked.append(len(samples))
        if len(asked) == 1:
            raise OSError("server down")
        return black_box(samples, conditions)

    tuner = tune(sa.DDPO(), output=tmp_path, iterations=2, reward=down_at_first)
    tuner.checkpoint()
    with pytest.raises(RewardError, match="server down"):
        next(iter(tuner))
    steps, found = iter(tuner), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(next(steps)["iteration"]))
        thread.start()
        thread.join()
    assert next(steps, None) is None
    assert found == [1, 2]
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is free again


def test_what_is_not_finite_is_null_in_the_log(tmp_path):
    Journal(RunFolder(tmp_path), ()).log({"iteration": 1, "kl_nats": math.inf, "reward_mean": math.nan, "grad_norm": 2.0})

    def refuse(constant):
        raise ValueError(constant)

    found = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert found == {"iteration": 1, "kl_nats": None, "reward_mean": None, "grad_norm": 2.0}
    with pytest.raises(ValueError, match="Infinity"):  # the twin: JSON as Python writes it
        json.loads(json.dumps(math.inf), parse_constant=refuse)


def test_a_log_that_was_removed_is_named(tmp_path, caplog):
    """Twin: the log that is there."""
    journal, told = Journal(RunFolder(tmp_path), []), []
    for iteration in (1, 2, 3):
        journal.log({"iteration": iteration})
        told.append(len(caplog.records))
        if iteration == 2:
            (tmp_path / "metrics.jsonl").unlink()
    same(told, [0, 0, 1], always=[0, 1, 2])
    assert caplog.records[0].getMessage().endswith("metrics.jsonl: was removed; its lines before iteration 3 are lost")
