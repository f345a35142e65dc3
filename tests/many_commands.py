"""Commands of several processes: `torchrun --nproc_per_node N tests/many_commands.py COMMANDS`, JSON of what `main` takes."""

from __future__ import annotations

import json
import os
import sys

import torch

from scoreaction.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for command in json.loads(sys.argv[1]):
        code = main(command)
        if code:
            os._exit(code)
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter is taken down, once in hundreds of runs
