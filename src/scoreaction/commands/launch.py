"""Starting a command on several processes of this machine, as torchrun does, and what is said of them."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence

import torch

from scoreaction.commands.signals import heard
from scoreaction.errors import UserError
from scoreaction.world import World

GRACE = 3600
"""Seconds that a run on several processes has, once it is asked to stop, to end its iteration and save."""
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables in which srun and mpirun say how many processes they started."""


def launch(processes: int, arguments: Sequence[str]) -> int:
    """`torchrun --standalone --nproc_per_node PROCESSES -m scoreaction ARGUMENTS`; the exit code of the first that failed.

    Signals that ask a run to stop are passed on, and it has `GRACE` seconds to end its iteration. UserError where a launcher
    has started this process already, or there are too few accelerators.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, parse_args, run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--processes: a launcher started this process already; leave --processes out, or the launcher")
    devices = torch.accelerator.device_count()
    if 0 < devices < processes:
        raise UserError(
            f"--processes: there are {devices} accelerators; use {devices} at most, or torchrun with train.device=cpu"
        )
    if not devices:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    for name in list(logging.root.manager.loggerDict):  # the process that failed, or was asked to stop, has said it
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        names = [signal.Signals(number).name for number in [*heard(), signal.SIGQUIT]]
        options = {"--signals-to-handle": ",".join(names), "--shutdown-timeout": str(GRACE)}
        known = get_args_parser()._option_string_actions  # an older torchrun has neither
        passed = [part for option, value in options.items() if option in known for part in (option, value)]
        run(parse_args(["--standalone", "--nproc_per_node", str(processes), *passed, "-m", "scoreaction", *arguments]))
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # by which the launcher ends the others
                name = signal.Signals(-failure.exitcode).name
                print(f"process {rank} of {processes} was ended by {name}; what it had saved stands", file=sys.stderr)
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException:
        return 130
    return 0


def described(world: World, device: str) -> str:
    """Number and devices of a run's processes, in words; with a word of those that srun started and nobody joined.

    >>> described(World(), "cpu")
    '1 process on cpu'
    """
    counted = [name if count == 1 else f"{name} x {count}" for name, count in Counter(world.every(device)).items()]
    text = f"{world.size} process{'es' * (world.size > 1)} on {', '.join(counted)}"
    started = max((int(os.environ[name]) for name in TASKS if os.environ.get(name, "").isdecimal()), default=1)
    if world.size == 1 < started:
        text += f"; {started} were started, each a run of its own: for one run on all start torchrun in one task a machine"
    return text
