"""Peak memory of an iteration on the digits at 10 and at 200 rollout steps, beside what the stored states take.

    python benchmarks/memory.py         # results/memory.json and a table; a few minutes

Each figure is the peak of a process of its own (batch 8, two iterations, network calls of at most 16 rows), less that of one
that only builds the run.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

from _harness import arguments, table

TRAINERS = ("score_action", "sqdf", "ddpo", "draft")
STEPS = (10, 200)
BATCH, SHAPE = 8, 16 * 16


def peak(trainer: str, steps: int, *, train: bool) -> float:
    """MiB, of a process that builds the run and, with `train`, does two iterations."""
    code = f"import memory; memory.one({trainer!r}, {steps}, {train})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return float(out.stdout.split()[-1])


def one(trainer: str, steps: int, train: bool) -> None:
    import torch

    from scoreaction.config import build, load_recipe

    torch.set_num_threads(1)
    fixed = [f"algorithm.name={trainer}", f"sampler.steps={steps}", f"train.batch={BATCH}", "train.iterations=2"]
    tuner = build(load_recipe("digits", [*fixed, "train.max_rows=16", "evaluation.held_out=[]"]))
    if train:
        for _ in tuner:
            pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    options = arguments(__doc__ or "", "memory.json").parse_args()
    out: dict[str, Any] = {}
    for trainer in TRAINERS:
        built = peak(trainer, STEPS[0], train=False)
        out[trainer] = {str(steps): peak(trainer, steps, train=True) - built for steps in STEPS}
        # a state, the two halves of a prediction by policy and reference, in float32
        out[trainer]["states"] = (STEPS[1] - STEPS[0]) * BATCH * SHAPE * 4 * 5 / 2**20
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(out, indent=1) + "\n")
    rows = [[name, *(f"{found[key]:.0f}" for key in ("10", "200", "states"))] for name, found in out.items()]
    print(table(["trainer", "10 steps, MiB", "200 steps", "of which stored states"], rows))


if __name__ == "__main__":
    main()
