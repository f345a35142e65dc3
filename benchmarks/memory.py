"""Peak memory of an iteration on the digits at 10 and at 200 rollout steps, beside what the stored states take.

    python -m benchmarks.memory         # results/memory.csv and a table; a few minutes

Counted tensor by tensor, as PyTorch asks for them: the most that is there at once in two iterations (batch 8, network calls of
at most 16 rows), beyond the built run.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, run_jobs

TRAINERS = {  # one update of equal size at both step counts
    "score_action": ["algorithm.updates=1", "algorithm.rows=64"],
    "sqdf": ["algorithm.updates=1", "algorithm.rows=64"],
    "ddpo": ["algorithm.minibatches=1"],
    "draft": [],
}
STEPS = (10, 200)
BATCH, SHAPE = 8, 16 * 16


def peak(algorithm: str, steps: int) -> float:
    """MiB."""
    from scoreaction.commands._live_memory import LiveMemory

    fixed = [
        f"sampler.steps={steps}",
        f"train.batch={BATCH}",
        "train.iterations=2",
        "train.max_rows=16",
        "evaluation.held_out=[]",
    ]
    tuner = built("digits", f"algorithm.name={algorithm}", *TRAINERS[algorithm], *fixed)
    with LiveMemory() as memory:
        for _ in tuner:
            pass
    return memory.peak / 2**20


def measured(algorithm: str) -> Figures:
    """Peaks at both step counts, and what the states of the further steps take."""
    # a state, the two halves of a prediction by policy and reference, in float32
    states = (STEPS[1] - STEPS[0]) * BATCH * SHAPE * 4 * 5 / 2**20
    return {**{f"mib_{steps}": peak(algorithm, steps) for steps in STEPS}, "states": states}


if __name__ == "__main__":
    jobs = {algorithm: {"algorithm": algorithm} for algorithm in TRAINERS}
    run_jobs(measured, jobs, arguments(__doc__ or "", "memory").parse_args())
