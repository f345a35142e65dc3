"""The error of measuring a distance: one policy of Score as Action on the mixture, measured with several sets of samples.

python -m benchmarks.measurement      # results/measurement.csv and its table; three minutes on one core
"""

from __future__ import annotations

from _harness import Figures, arguments, built, run_jobs

SETS, ITERATIONS = 8, 250


def measured(seed: int, iterations: int) -> Figures:
    """Distance and floor of the policy of a seed, with every set of samples."""
    from scoreaction.training.exact_task import ExactTask

    tuner = built("mixture", "sampler.steps=25", f"train.seed={seed}", f"train.iterations={iterations}")
    for _ in tuner:
        pass
    task = ExactTask.of(tuner.model, tuner.reward.reward, tuner.learner.beta)
    assert task is not None
    sampler, n = tuner.evaluation.sampler(tuner.sampler), tuner.evaluation.n
    return {"curve": [{"seed": 1234 + 100 * i, **task.distances(tuner.model, sampler, n, 1234 + 100 * i)} for i in range(SETS)]}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {"score_action/seed0": {"seed": 0, "iterations": ITERATIONS}}
    run_jobs(measured, jobs, arguments(__doc__ or "", "measurement").parse_args())
