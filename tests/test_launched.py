"""Truth: one process that nothing stopped. Commands that a launcher starts, what a signal or a kill leaves, one word of it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commanding import TINY
from test_many_ends import like, lines, numbers, state
from test_many_processes import launched
from twins import accepts, same

from scoreaction.cli import main
from scoreaction.commands.launch import TASKS, described
from scoreaction.world import ALONE, World

COMMANDS = Path(__file__).with_name("many_commands.py")
RUN = ["train", "mixture", *TINY, "train.checkpoint_every=1", "train.schedule=constant", "train.iterations=2000"]


def begun(folder: Path, *more: str, command: tuple[str, ...] = ("-m", "scoreaction")) -> subprocess.Popen[str]:
    """The command on two processes, which has started; what it says is in a file beside the folder."""
    with folder.with_suffix(".log").open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command, *RUN, *more, "--output", str(folder)],
            stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        )  # fmt: skip


def said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


def until(ready: Any, seconds: float = 120) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def saved(folder: Path) -> list[int]:
    """The iterations of the run's checkpoints."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*") if path.name.isdecimal())


def process(rank: int, folder: Path) -> int:
    """The process of this rank that trains in the folder."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            told, words = (place / "environ").read_text().split("\0"), (place / "cmdline").read_text().split("\0")
        except OSError:  # it ended meanwhile, or is another user's
            continue
        if f"RANK={rank}" in told and str(folder) in words:
            return int(place.name)
    raise AssertionError(f"no process {rank} for {folder}")


def went_on_as_one(folder: Path, at: int, tmp_path: Path) -> None:
    """A run that ended there goes on by one process to what one process makes without a break."""
    last = at + 2
    assert main(["train", *RUN[1:-1], f"train.iterations={last}", "--output", str(tmp_path / f"whole{last}")]) == 0
    whole = tmp_path / f"whole{last}"
    before = state(folder, at)
    settings = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(settings.replace("iterations: 2000", f"iterations: {last}"))
    assert main(["train", *RUN[1:-1], f"train.iterations={last}", "--output", str(folder), "--resume"]) == 0
    accepts(like(state(whole, last)), state(folder, last), not_resumed=before)
    accepts(like(numbers(lines(whole))), numbers(lines(folder)), a_line_less=numbers(lines(folder)[:-1]))


def test_a_group_of_gpus_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray makes one by default; twin: a group with a backend for both."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(World, "current", classmethod(lambda cls: ALONE))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert World.joined("cpu") == ALONE
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ValueError, match=r"has the backend cuda:nccl.* make it with backend cpu:gloo,cuda:nccl"):
        World.joined("cpu")


@pytest.mark.parametrize("name", TASKS)
def test_processes_that_were_started_and_do_not_meet_are_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (*TASKS, "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    alone = described(ALONE, "cpu")
    monkeypatch.setenv(name, "8")
    word = "1 process on cpu; 8 were started, each a run of its own: for one run on all start torchrun in one task a machine"
    same(described(ALONE, "cpu"), word, silent=alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)])
def test_a_signal_to_the_launcher_ends_all_after_the_iteration_with_one_word(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = begun(folder, "--processes", "2")
    until(lambda: saved(folder))
    launcher.send_signal(number)
    assert launcher.wait(60) == 130
    text = said(folder)
    begins = ["mixture  starting 2 processes", "mixture  loading", "run  2 processes on cpu x 2"]
    same(text.splitlines()[:3], begins, without_the_last=begins[:2])
    last = saved(folder)[-1]

    def one_word(text: str) -> None:
        first, second = text.splitlines()[-2:]
        stopping = re.fullmatch(rf"{number.name}: stopping after iteration (\d+) of 2000, which is then saved", first)
        assert stopping is not None
        assert int(stopping[1]) in (last, last - 1)  # one process may hear of it an iteration before another
        assert second.startswith(f"stopped after iteration {last}, state saved; go on with: scoreaction train")
        assert second.endswith("--resume --processes 2")
        assert text.count("stopping") + text.count("stopped") == 2

    another = text.replace(f"iteration {last},", f"iteration {last + 3},")
    accepts(one_word, text, one_said_twice=f"{text}{text.splitlines()[-1]}\n", another_iteration=another)
    assert len(lines(folder)) == last


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_and_its_last_checkpoint_stands(tmp_path: Path) -> None:
    killed_at_a_moment(tmp_path, rank=1, seconds=0.0)


@pytest.mark.long
def test_nothing_is_lost_whenever_a_process_is_killed(tmp_path: Path) -> None:
    """Ten moments: in samples, updates and writing of checkpoints, of the process that writes and of the other."""
    moments = random.Random(0)
    for i in range(10):
        killed_at_a_moment(tmp_path / str(i), rank=i % 2, seconds=moments.uniform(0, 1))


def killed_at_a_moment(tmp_path: Path, *, rank: int, seconds: float) -> None:
    tmp_path.mkdir(exist_ok=True)
    folder = tmp_path / "run"
    launcher = begun(folder, "--processes", "2")
    until(lambda: saved(folder))
    time.sleep(seconds)
    os.kill(process(rank, folder), signal.SIGKILL)
    assert launcher.wait(60) == 1
    text, last = said(folder), saved(folder)[-1]

    def one_line_each(text: str) -> None:
        assert text.splitlines()[-1] == f"process {rank} of 2 was ended by SIGKILL; what it had saved stands"
        failures = [line for line in text.splitlines() if line.startswith("iteration ")]
        assert len(failures) == (1 if rank else 0)
        for line in failures:
            assert re.fullmatch(r"iteration \d+: another process ended; the state after iteration \d+ is saved", line)
        assert "Traceback" not in text

    accepts(one_line_each, text, silent="\n".join(text.splitlines()[:-1]), a_traceback=f"Traceback\n{text}")
    went_on_as_one(folder, last, tmp_path)


@pytest.mark.long
def test_measuring_is_stopped_at_once_on_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = begun(folder, "--processes", "2", "train.iterations=2", "evaluation.n=2000000", "evaluation.steps=50")
    until(lambda: "measuring: base" in said(folder))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(30) == 130
    last, before = said(folder).splitlines()[-1], said(folder).splitlines()[-2]

    def stopped(line: str) -> None:
        assert line.startswith("stopped while measuring; training is done and saved; go on with: scoreaction train")

    accepts(stopped, last, the_line_before=before)


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "first"),
    [
        (["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], "2 processes on cpu x 2"),
        (["accelerate.commands.launch", "--cpu", "--num_processes", "2"], "1 process on cpu"),
    ],
    ids=["torchrun", "accelerate"],
)
def test_the_first_line_says_what_a_launcher_started(launcher: list[str], first: str, tmp_path: Path) -> None:
    """accelerate starts one process where it sees no GPU, without a word of its own."""
    folder = tmp_path / "run"
    run = begun(folder, "train.iterations=1", command=("-m", *launcher, "-m", "scoreaction"))
    assert run.wait(120) == 0, said(folder)
    words = [line for line in said(folder).splitlines() if line.startswith("run  ")]
    same(words[0], f"run  {first}", another=words[1])


def files(folder: Path) -> dict[str, Any]:
    """All numbers in the JSON and npz files of a folder, by file and name, but for seconds."""

    def flat(array: Any) -> torch.Tensor:
        return torch.as_tensor(array).double().flatten()

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("evaluation.json", "comparison.json", "summary.json"):
            found |= numbers(json.loads(path.read_text()), f"{path.relative_to(folder)}")
    for path in sorted(folder.rglob("samples.npz")):
        with np.load(path) as arrays:
            known = [name for name in arrays if arrays[name].dtype.kind in "fi"]
            found |= {f"{path.relative_to(folder)}/{name}": flat(arrays[name]) for name in known}
    return {name: value for name, value in found.items() if not name.endswith(("seconds", "per_second"))}


@pytest.mark.long
def test_every_command_shares_its_work_and_says_what_one_process_says(tmp_path: Path) -> None:
    """Files and exit codes of evaluate, sample, compare, steer, distill and doctor, with numbers that three do not divide."""

    small = [*TINY, "train.batch=12", "train.iterations=2"]

    def commands(folder: Path) -> list[list[str]]:
        run = str(folder / "run")
        return [
            ["train", "mixture", *small, "--output", run],
            ["evaluate", run, "--steps", "3,5", "--n", "20"],
            ["sample", run, "--n", "7", "--output", str(folder / "drawn")],
            ["steer", run, "--method", "best_of", "--particles", "4", "--n", "6", "--output", str(folder / "steered")],
            ["steer", run, "--method", "smc", "--particles", "4", "--n", "6", "--output", str(folder / "smc")],
            ["compare", "mixture", *small[1:], "--algorithms", "ddpo,dpok", "--output", str(folder / "compared")],
            ["distill", "mixture", *TINY, "distill.iterations=2", "distill.paths=66", "--output", str(folder / "student")],
            ["doctor", "mixture", *TINY, "train.batch=12", "--iterations", "1"],
        ]  # fmt: skip

    one, three = tmp_path / "one", tmp_path / "three"
    for command in commands(one):
        assert main(command) == 0, command
    launched(3, COMMANDS, json.dumps(commands(three)))
    truth = files(one)
    assert len(truth) > 40, truth.keys()
    accepts(like(truth), files(three), elsewhere={name: value + 1 for name, value in truth.items()})
    drawn = [{path.relative_to(folder) for path in folder.rglob("*.npz")} for folder in (one, three)]
    same(drawn[1], drawn[0], none=set())
