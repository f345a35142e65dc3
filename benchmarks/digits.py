"""Handwritten digits with a black-box `ink` reward: Score as Action against DDPO and DPOK at equal reward queries.

    python -m benchmarks.digits --stage tune    # results/digits_tune.csv: learning rates and betas, one seed each
    python -m benchmarks.digits                 # results/digits.csv: five seeds at the chosen settings; resumes

Ten sampling steps, guidance 2, one query a sample. Held-out legibility, diversity and KL are compared at equal reward: when the
mean reward of an iteration first reaches a level, the policy as it is then is measured on 300 samples.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, in_stage, run_jobs, summary

ITERATIONS, BATCH = 16, 64
LEVELS = (12, 13, 14)
MEASURED = ("reward", "reward_se", "held_out.legibility", "held_out.legibility_se", "diversity", "vendi")
CHOSEN: dict[str, list[str]] = {  # the best of its sweep; DDPO at two rates: the careful one and the fast one
    "score_action": ["algorithm.name=score_action", "train.lr=1e-4", "algorithm.beta=0.05", "algorithm.trust_region=1"],
    "ddpo, lr 1e-4": ["algorithm.name=ddpo", "train.lr=1e-4"],
    "ddpo, lr 3e-4": ["algorithm.name=ddpo", "train.lr=3e-4"],
    "dpok": ["algorithm.name=dpok", "train.lr=3e-4", "algorithm.beta=0.03"],
}
SWEEP: dict[str, list[list[str]]] = {  # the same rates for all, and betas where there is one
    "score_action": [
        ["algorithm.name=score_action", f"train.lr={lr}", f"algorithm.beta={beta}", "algorithm.trust=1"]
        for lr in ("1e-4", "3e-4", "1e-3")
        for beta in (0.1, 0.3)
    ]
    + [
        ["algorithm.name=score_action", f"train.lr={lr}", f"algorithm.beta={beta}", "algorithm.trust_region=1"]
        for lr, beta in (("1e-4", 0.05), ("2e-4", 0.05), ("2e-4", 0.1))
    ],
    "ddpo": [["algorithm.name=ddpo", f"train.lr={lr}"] for lr in ("1e-4", "3e-4", "1e-3")],
    "dpok": [
        ["algorithm.name=dpok", f"train.lr={lr}", f"algorithm.beta={beta}"]
        for lr in ("1e-4", "3e-4", "1e-3")
        for beta in (0.03, 0.1)
    ],
}
GRID = [(solver, eta, steps) for steps in (5, 10, 25, 50) for solver, eta in (("ddim", 1.0), ("ddim", 0.0), ("dpmpp_2m", 0.0))]


def train(trainer: str, settings: list[str], seed: int, iterations: int) -> Figures:
    """One run: its summary, the policy as it first reaches each level, and with seed 0 reward and legibility over samplers."""
    fixed = [
        f"train.iterations={iterations}", f"train.batch={BATCH}", f"train.seed={seed}",
        "reward.differentiable=false", "evaluation.n=300", "evaluation.steps=20",
    ]  # fmt: skip
    tuner = built("digits", *settings, *fixed)
    reached: dict[str, Figures] = {}
    for metrics in tuner:
        for level in LEVELS:
            if metrics["reward_mean"] >= level and str(level) not in reached:
                spent = {"queries": metrics["reward_queries"], "evaluations": metrics["model_evaluations"]}
                reached[str(level)] = measured_now(tuner) | spent
    shown = seed == 0 and trainer != "dpok"
    return summary(tuner) | {"reached": reached, "curve": over_samplers(tuner) if shown else []}


def over_samplers(tuner: Any) -> list[Figures]:
    """Reward, legibility and diversity of the policy under other solvers and step counts."""
    from scoreaction.training.evaluation import measure

    out = []
    for solver, eta, steps in GRID:
        sampler = tuner.sampler.model_copy(update={"solver": solver, "eta": eta, "steps": steps})
        figures, _ = measure(tuner.model, sampler, tuner.reward, tuner.held_out, n=100, prompts=tuner.prompts, seed=5)
        out.append({"solver": solver, "eta": eta, "steps": steps, **{key: figures[key] for key in MEASURED}})
    return out


def measured_now(tuner: Any) -> Figures:
    """The policy as it is, not averaged, under the training sampler."""
    from scoreaction.training.evaluation import measure, measure_kl

    average, tuner.model.average = tuner.model.average, None
    queries = tuner.reward.queries
    figures, _ = measure(
        tuner.model, tuner.sampler, tuner.reward, tuner.held_out, n=300, prompts=tuner.prompts, seed=99, chunk=300
    )
    kl = measure_kl(tuner.model, tuner.sampler, 100, tuner.prompts, 99)
    tuner.model.average, tuner.reward.queries = average, queries
    return {key: figures[key] for key in MEASURED} | kl


def main() -> None:
    parser = arguments(__doc__ or "", "digits")
    parser.add_argument("--stage", choices=["tune", "main"], default="main")
    options = parser.parse_args()
    if options.stage == "tune":
        in_stage(options)
        jobs = {
            f"{trainer}/{' '.join(settings)}": {"trainer": trainer, "settings": settings, "seed": 100, "iterations": ITERATIONS}
            for trainer, sweep in SWEEP.items()
            for settings in sweep
        }
    else:
        jobs = {
            f"{trainer}/seed{seed}": {"trainer": trainer, "settings": settings, "seed": seed, "iterations": ITERATIONS}
            for seed in range(5)
            for trainer, settings in CHOSEN.items()
        }
    run_jobs(train, jobs, options)


if __name__ == "__main__":
    main()
