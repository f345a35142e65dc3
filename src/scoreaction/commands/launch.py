"""Starting a command on several processes of this machine, as torchrun does, and what is said of them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence

import torch

from scoreaction.errors import UserError
from scoreaction.world import World


def launch(processes: int, arguments: Sequence[str]) -> int:
    """`torchrun --standalone --nproc_per_node PROCESSES -m scoreaction ARGUMENTS`; the exit code of the first that failed.

    UserError where a launcher has started this process already, or there are too few accelerators.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--processes: a launcher started this process already; leave --processes out, or the launcher")
    devices = torch.accelerator.device_count()
    if 0 < devices < processes:
        raise UserError(
            f"--processes: there are {devices} accelerators; use {devices} at most, or torchrun with train.device=cpu"
        )
    if not devices:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process that failed has said why
    try:
        run(parse_args(["--standalone", "--nproc_per_node", str(processes), "-m", "scoreaction", *arguments]))
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException:
        return 130
    return 0


def described(world: World, device: torch.device) -> str:
    """Number and devices of a run's processes, in words.

    >>> described(World(), torch.device("cpu"))
    '1 process on cpu'
    """
    devices = world.every(str(device))
    counted = [name if count == 1 else f"{name} x {count}" for name, count in Counter(devices).items()]
    return f"{world.size} process{'es' * (world.size > 1)} on {', '.join(counted)}"
