"""Runs in folders that end: `torchrun --nproc_per_node N tests/many_ends.py FILE PLAN`, a JSON list of what `ended` takes."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from functools import wraps
from unittest.mock import patch

import torch
from many import CASES, linear, prompted

import scoreaction as sa
from scoreaction.world import World

WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def failing(left, own, rank=1):
    """A reward, which fails in one process once `left` has neither iterations nor calls left."""

    @wraps(own)
    def reward(samples, prompts):
        if World.current().rank == rank and left["iterations"] == 0:
            left["calls"] -= 1
            if left["calls"] < 0:
                raise OSError("no answer")
        return own(samples, prompts)

    return reward


class Awaited:
    """A reward that works in the background: it begins at once, and fails where it does when it is waited for."""

    differentiable, rows = False, 8

    def __init__(self, reward):
        self.reward, self.__name__ = reward, reward.__name__

    def __call__(self, samples, prompts):
        return self.reward(samples, prompts)

    def begin(self, samples, prompts):
        return lambda: self.reward(samples, prompts)


def ended(name, folder, until, fails=None, measured=False, iterations=6):
    """Goes on with a run, whatever is in its folder, to this one of its iterations; returns the error that ended it.

    fails: after how many iterations the reward of process 1 fails, and after how many calls in the one that follows.
    """
    left, other, every = {}, None, 2
    if fails is not None:
        left, every = dict(zip(("iterations", "calls"), fails, strict=True)), 100
        late = name.endswith("late rewards")
        reward = failing(left, prompted if late else linear)
        other = Awaited(reward) if late else sa.Reward(reward, differentiable=not name.startswith("ddpo"))
    tuner = CASES[name](folder, other, iterations=iterations, checkpoint_every=every)
    tuner.resume()
    try:
        for metrics in tuner:
            left["iterations"] = left.get("iterations", 0) - 1
            if metrics["iteration"] == until:
                break
        if measured:
            tuner.summary()
    except Exception as error:  # noqa: BLE001  each process reports its own
        return [type(error).__name__, str(error)]
    return None


def watched(folder, written):
    """Notes, from now on, every file and folder below this one that the process writes, by Python's own audit."""

    def audit(event, given):
        writes = event == "open" and isinstance(given[1], str) and given[1].strip("rbt") or event in WRITES
        if writes and isinstance(given[0], str | os.PathLike) and os.fspath(given[0]).startswith(folder):
            written.append(os.path.relpath(given[0], folder))

    sys.addaudithook(audit)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with patch("scoreaction.world.PATIENCE", timedelta(minutes=2)):  # where one waits for ever the test fails soon
        world = World.joined("cpu")
    file, plan = sys.argv[1], json.loads(sys.argv[2])
    written = []
    watched(os.path.dirname(file), written)
    errors = [ended(*arguments) for arguments in plan]
    seen = world.every({"errors": errors, "written": written})
    if world.leads:
        with open(file, "w", encoding="utf-8") as out:
            json.dump(seen, out)
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter is taken down, once in hundreds of runs
