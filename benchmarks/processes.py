"""CPU seconds of a training iteration on one process and on several, by gloo on this machine's CPU.

    python -m benchmarks.processes        # results/processes.csv; efficiency is one process's seconds over those of all of N

CPU seconds and not wall time, which on a machine with as many cores as processes says more of what else it does; and those of
one process while as many of its kind run beside it, since cores share caches and more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _harness import Figures, arguments, built, run_jobs

WARM_UP, COUNTED = 1, 3
SETTINGS = {"digits": ["train.batch=64", "evaluation.held_out=[]"], "shapes": ["evaluation.held_out=[]"]}


def measured(task: str, algorithm: str, number: int) -> Figures:
    """CPU seconds an iteration of one process that has all rows, and of each of so many that share them."""
    alone, each = (workers(task, algorithm, number, together=together) for together in (False, True))
    return {"alone": alone, "each": each, "efficiency": alone / (number * each)}


def workers(task: str, algorithm: str, number: int, *, together: bool) -> float:
    """The mean CPU seconds of an iteration, of the slowest of so many processes: of one run, or each of a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)] if together else []
        commands = [
            [sys.executable, *launch, __file__, "--worker", task, algorithm, str(Path(folder) / f"{i}-")]
            for i in range(1 if together else number)
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for command in commands]
        if any(process.wait() for process in running):
            raise RuntimeError(f"{task}, {algorithm}: a process failed")
        return max(json.loads(path.read_text()) for path in Path(folder).iterdir())


def work(task: str, algorithm: str, path: str) -> None:
    """Runs a few iterations in this process, and writes what they cost it."""
    tuner = built(task, f"algorithm.name={algorithm}", f"train.iterations={WARM_UP + COUNTED}", *SETTINGS[task])
    began = 0.0
    for metrics in tuner:
        if metrics["iteration"] == WARM_UP:
            began = time.process_time()
    seconds = (time.process_time() - began) / COUNTED
    Path(f"{path}{tuner.world.rank}").write_text(json.dumps(seconds))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        parser = arguments(__doc__ or "", "processes")
        parser.set_defaults(processes=1)
        jobs = {
            f"{task}, {algorithm}": {"task": task, "algorithm": algorithm, "number": 2}
            for task in SETTINGS
            for algorithm in ("score_action", "ddpo")
        }
        run_jobs(measured, jobs, parser.parse_args())
