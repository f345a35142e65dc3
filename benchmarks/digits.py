"""Handwritten digits with a black-box `ink` reward: Score as Action against DDPO and DPOK at equal reward queries.

    python benchmarks/digits.py --stage tune    # results/digits_tune.json: learning rates and betas, one seed each
    python benchmarks/digits.py                 # results/digits.json: five seeds at the chosen settings; resumes

Ten sampling steps, guidance 2, one query a sample. Held-out legibility, diversity and KL are compared at equal reward: when the
mean reward of an iteration first reaches a level, the policy as it is then is measured on 300 samples.
"""

from __future__ import annotations

from typing import Any

from _harness import arguments, cell, run_jobs, step_grid, table

ITERATIONS, BATCH = 16, 64
LEVELS = (12.0, 13.0, 14.0)
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


def train(trainer: str, settings: list[str], seed: int, iterations: int, grid: bool) -> dict[str, Any]:
    """One run: its summary, the metrics of each iteration, and reward and legibility over samplers."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.sampling.rollout import Sampler
    from scoreaction.training.evaluation import measure

    fixed = [
        f"train.iterations={iterations}", f"train.batch={BATCH}", f"train.seed={seed}",
        "reward.differentiable=false", "evaluation.n=300", "evaluation.steps=20",
    ]  # fmt: skip
    tuner = build(load_recipe("digits", [*settings, *fixed]))
    curve, reached = [], {}
    for metrics in tuner:
        curve.append(metrics)
        for level in LEVELS:
            if metrics["reward_mean"] >= level and str(level) not in reached:
                reached[str(level)] = {**measured_now(tuner), "queries": metrics["reward_queries"],
                                       "evaluations": metrics["model_evaluations"]}  # fmt: skip
    out: dict[str, Any] = {"summary": tuner.summary(), "curve": curve, "reached": reached}
    if grid:
        out["grid"] = []
        for solver, eta, steps in GRID:
            sampler = Sampler(solver=solver, eta=eta, steps=steps, grid=tuner.sampler.grid, guidance=tuner.sampler.guidance)
            found, _ = measure(tuner.model, sampler, tuner.reward, tuner.held_out, n=100, prompts=tuner.prompts, seed=5)
            out["grid"].append({"solver": solver, "eta": eta, "steps": steps, **found})
    return out


def measured_now(tuner: Any) -> dict[str, float]:
    """The policy as it is, not averaged, under the training sampler."""
    from scoreaction.training.evaluation import measure, measure_kl

    average, tuner.model.average = tuner.model.average, None
    queries = tuner.reward.queries
    found, _ = measure(
        tuner.model, tuner.sampler, tuner.reward, tuner.held_out, n=300, prompts=tuner.prompts, seed=99, chunk=300
    )
    found |= measure_kl(tuner.model, tuner.sampler, 100, tuner.prompts, 99)
    tuner.model.average, tuner.reward.queries = average, queries
    return {key: value for key, value in found.items() if isinstance(value, float)}


def main() -> None:
    parser = arguments(__doc__ or "", "digits.json")
    parser.add_argument("--stage", choices=["tune", "main"], default="main")
    options = parser.parse_args()
    tune = options.stage == "tune"
    if tune:
        options.output = options.output.with_name("digits_tune.json")
        jobs = {
            f"{trainer}/{' '.join(settings)}": {
                "trainer": trainer, "settings": settings, "seed": 100, "iterations": 16, "grid": False,
            }
            for trainer, sweep in SWEEP.items()
            for settings in sweep
        }  # fmt: skip
    else:
        jobs = {
            f"{trainer}/seed{seed}": {
                "trainer": trainer, "settings": settings, "seed": seed, "iterations": ITERATIONS,
                "grid": seed == 0 and trainer != "dpok",
            }
            for seed in range(5)
            for trainer, settings in CHOSEN.items()
        }  # fmt: skip
    results = run_jobs(train, jobs, options)
    report(results, by_settings=tune)


def report(results: dict[str, dict[str, Any]], *, by_settings: bool) -> None:
    """Prints the end of each run and, over seeds, the figures at equal reward."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        groups.setdefault(name if by_settings else result["job"]["trainer"], []).append(result)
    header = ["trainer", "seeds", "reward", "base", "KL", "legibility", "base", "diversity", "base", "queries", "evaluations"]
    rows = []
    for name, runs in groups.items():
        found = [run["summary"] for run in runs]
        keys = ("reward_tuned", "reward_base", "kl_nats", "held_out.legibility_tuned", "held_out.legibility_base",
                "diversity_tuned", "diversity_base")  # fmt: skip
        cells = [cell([f[key] for f in found]) for key in keys]
        rows.append([name, str(len(runs)), *cells, str(found[0]["reward_queries"]), str(found[0]["model_evaluations"])])
    print(table(header, rows))
    if by_settings:
        return
    grids = {result["job"]["trainer"]: result["grid"] for result in results.values() if "grid" in result}
    print("\nTrained at 10 steps, seed 0: reward (legibility), evaluated at other step counts and solvers")
    print(step_grid(grids, "trained with", [5, 10, 25, 50], "reward", "held_out.legibility"))
    for level in map(str, LEVELS):
        print(f"\nWhen an iteration's mean reward first reaches {level}:")
        rows = []
        for name, runs in groups.items():
            at = [run["reached"][level] for run in runs if level in run["reached"]]
            keys = ("reward", "held_out.legibility", "diversity", "vendi", "kl_nats")
            if at:
                counts = [cell([f[key] for f in at], 0) for key in ("queries", "evaluations")]
                rows.append([name, str(len(at)), *(cell([f[key] for f in at]) for key in keys), *counts])
        header = ["trainer", "seeds there", "reward", "legibility", "diversity", "Vendi", "KL", "queries", "evaluations"]
        print(table(header, rows))


if __name__ == "__main__":
    main()
