"""Students of four steps of a policy that was tuned on shapes, beside plain solvers at four and eight steps.

    python -m benchmarks.students       # results/students.csv and its table; some ten minutes a seed

Score as Action tunes with 1,280 pictures, at beta 0.08 without averaging, and `scoreaction distill --steps 4` makes the
student, of 400 iterations of 32 paths of 16 steps. Each is measured on 480 pictures of the training prompts; the teacher, which
is the policy in 50 steps of DPM-Solver++, and all others draw without noise on the way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _harness import Figures, arguments, run_jobs
from _prompted import MEASURED

STEPS = 4
STUDENT = ["student.iterations=400", "student.paths=32", "student.teacher_steps=16"]
KEPT = ("reward", "held_out.shapes", "diversity", "evaluations", "rms")


def distilled(seed: int) -> Figures:
    """What the student and the others came to: a point each."""
    from scoreaction.commands.students import distill_run
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        run, student = Path(folder) / "run", Path(folder) / "student"
        tuner = build(
            load_recipe("shapes", [MEASURED, f"train.seed={seed}", "evaluation.n=480", "evaluation.steps=12"]), output=run
        )
        for _ in tuner:
            pass
        tuner.checkpoint()
        tuner.summary()
        figures = distill_run(run, student, steps=STEPS, overrides=[*STUDENT, f"student.seed={seed}"], trust=False)
    points = [{"model": row["model"], "solver": row["solver"], "steps": row["steps"], **_kept(row)} for row in figures["rows"]]
    return {"curve": points}


def _kept(row: Figures) -> Figures:
    return {key: row.get(key) for key in KEPT}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {f"shapes/seed{seed}": {"seed": seed} for seed in range(2)}
    run_jobs(distilled, jobs, arguments(__doc__ or "", "students").parse_args())
