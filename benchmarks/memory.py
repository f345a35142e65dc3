"""Peak memory of an iteration on the digits at 10 and at 200 rollout steps, beside what the stored states take.

    python benchmarks/memory.py         # results/memory.json and a table; a few minutes

Counted tensor by tensor, as PyTorch asks for them: the most that is there at once in two iterations (batch 8, network calls of
at most 16 rows), beyond the built run.
"""

from __future__ import annotations

import json
from typing import Any

from _harness import arguments, table

TRAINERS = {  # one update of equal size at both step counts
    "score_action": ["algorithm.updates=1", "algorithm.rows=64"],
    "sqdf": ["algorithm.updates=1", "algorithm.rows=64"],
    "ddpo": ["algorithm.minibatches=1"],
    "draft": [],
}
STEPS = (10, 200)
BATCH, SHAPE = 8, 16 * 16


def peak(trainer: str, steps: int) -> float:
    """MiB."""
    import torch

    from scoreaction.commands._live_memory import LiveMemory
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    torch.set_num_threads(1)
    fixed = [
        f"algorithm.name={trainer}",
        *TRAINERS[trainer],
        f"sampler.steps={steps}",
        f"train.batch={BATCH}",
        "train.iterations=2",
    ]
    tuner = build(load_recipe("digits", [*fixed, "train.max_rows=16", "evaluation.held_out=[]"]))
    with LiveMemory() as memory:
        for _ in tuner:
            pass
    return memory.peak / 2**20


def main() -> None:
    options = arguments(__doc__ or "", "memory.json").parse_args()
    out: dict[str, Any] = {}
    for trainer in TRAINERS:
        out[trainer] = {str(steps): peak(trainer, steps) for steps in STEPS}
        # a state, the two halves of a prediction by policy and reference, in float32
        out[trainer]["states"] = (STEPS[1] - STEPS[0]) * BATCH * SHAPE * 4 * 5 / 2**20
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(out, indent=1) + "\n")
    rows = [[name, *(f"{found[key]:.1f}" for key in ("10", "200", "states"))] for name, found in out.items()]
    print(table(["trainer", "10 steps, MiB", "200 steps", "of which stored states"], rows))


if __name__ == "__main__":
    main()
