"""Every trainer on the exact tasks: distance to the optimum beside floor and oracle, over training step counts and seeds.

python benchmarks/exact.py            # results/exact.json and tables; resumes
python benchmarks/exact.py --only mixture/sqdf/
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
from _harness import arguments, cell, mean_and_error, run_jobs, step_grid, table

ITERATIONS = {10: 250, 25: 250, 50: 300}
FEWER = {"mixture16": 150, "linear_quadratic": 100}  # tasks that need fewer; Score as Action has as many as on the mixture
STEPS = (10, 25, 50)
TRAINERS: dict[str, list[str]] = {  # what a trainer's name in the tables means
    "score_action": ["algorithm.name=score_action"],
    "sqdf": ["algorithm.name=sqdf"],
    "sqdf, corrected": ["algorithm.name=sqdf", "algorithm.correction=true"],
    "sqdf, chain": ["algorithm.name=sqdf", "algorithm.weights=chain"],
    "vard": ["algorithm.name=vard"],
    "pi_ft": ["algorithm.name=pi_ft"],
    "adjoint_matching": [  # its adjoints have heavy tails: more paths, and no clipping, which would bias them
        "algorithm.name=adjoint_matching",
        "train.max_grad_norm=1e9",
        "train.batch=1024",
        "algorithm.rows=1000",
    ],
    "dpok": ["algorithm.name=dpok"],
    "draft, K = N, KL": ["algorithm.name=draft", "algorithm.last=null", "algorithm.beta=BETA"],
    "draft, K = N": ["algorithm.name=draft", "algorithm.last=null", "algorithm.beta=0"],
    "draft-1": ["algorithm.name=draft", "algorithm.beta=0"],
    "refl, KL": ["algorithm.name=refl", "algorithm.beta=BETA"],
    "ddpo": ["algorithm.name=ddpo"],
}
MAIN = ("score_action", "sqdf", "sqdf, corrected", "sqdf, chain")
PLAN = [  # task, trainer, training steps
    *[("mixture", trainer, steps) for trainer in (*MAIN, "ddpo", "dpok") for steps in STEPS],
    *[("mixture16", "score_action", steps) for steps in STEPS],
    *[(task, trainer, 25) for trainer in TRAINERS for task in ("mixture", "mixture16", "linear_quadratic")],
]
GRID_N = 4096
GRID = [(solver, eta, steps) for steps in (5, 10, 25, 50, 200) for solver, eta in
        (("ddim", 1.0), ("ddim", 0.0), ("heun", 0.0), ("dpmpp_2m", 0.0), ("sde_dpmpp", 1.0))]  # fmt: skip


def _drawn(model: Any, sampler: Any, seed: int) -> Any:
    from scoreaction.sampling.draw import draw_x0

    return draw_x0(model, sampler, GRID_N, None, seed)


def train(task: str, trainer: str, steps: int, seed: int, iterations: int, grid: bool) -> dict[str, Any]:
    """One run: its summary, how training went, and the distance and reward over samplers."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.rewards import RewardError
    from scoreaction.sampling.draw import draw_x0
    from scoreaction.sampling.rollout import Sampler
    from scoreaction.training.evaluation import ExactTask
    from scoreaction.training.optimizer import TrainingError

    beta = load_recipe(task).values()["algorithm"]["beta"]  # of the optimum that all are measured to
    settings = [setting.replace("BETA", str(beta)) for setting in TRAINERS[trainer]]
    settings += [f"sampler.steps={steps}", f"train.seed={seed}", f"train.iterations={iterations}"]
    settings.append(f"evaluation.beta={beta}")
    tuner = build(load_recipe(task, settings))
    history: list[dict[str, Any]] = []
    try:
        history.extend(tuner)
    except (TrainingError, RewardError) as error:  # without a KL the reward may grow until numbers end: measured as it then is
        print(f"{task}, {trainer}, {steps} steps, seed {seed}: {error}", flush=True)
    found = {key: value if math.isfinite(value) else math.inf for key, value in measured(tuner, task).items()}
    found["iterations"] = len(history)
    curve = [{key: m[key] for key in ("iteration", "reward_mean", "kl_nats", "model_evaluations")} for m in history[::20]]
    out: dict[str, Any] = {"summary": found, "curve": curve}
    if grid:
        exact = ExactTask.of(tuner.model, tuner.reward.reward, found["beta"])
        assert exact is not None
        out["grid"] = []
        for solver, eta, count in GRID:
            sampler = Sampler(solver=solver, eta=eta, steps=count, grid=tuner.sampler.grid)
            x = draw_x0(tuner.model, sampler, GRID_N, None, 77)
            out["grid"].append(
                {
                    "solver": solver, "eta": eta, "steps": count, "reward": float(tuner.reward.reward(x, None).mean()),
                    "distance": exact.distance(partial(_drawn, tuner.model, sampler), GRID_N, 77, repeats=1),
                }
            )  # fmt: skip
    return out


@cache
def yardstick(task: str) -> dict[str, float]:
    """Optimum, floor and oracle of a task: the same for every run on it."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.training.evaluation import ExactTask

    tuner = build(load_recipe(task))
    exact, chosen = ExactTask.of(tuner.model, tuner.reward.reward, tuner.learner.beta), tuner.evaluation
    assert exact is not None
    sampler = chosen.sampler(tuner.sampler)
    return {
        "beta": tuner.learner.beta,
        "optimum_reward": exact.optimum.reward,
        "optimum_kl_nats": exact.optimum.kl_nats,
        "distance_floor": exact.floor(chosen.n, chosen.seed),
        "distance_oracle": exact.oracle(tuner.model, sampler, chosen.n, chosen.seed),
    }


def measured(tuner: Any, task: str) -> dict[str, Any]:
    """A run's summary as `Finetuner.summary` has it, with the task's yardstick taken once a process."""
    from scoreaction.sampling.draw import draw_x0
    from scoreaction.training.evaluation import ExactTask, measure_kl

    yard, chosen = yardstick(task), tuner.evaluation
    exact, sampler = ExactTask.of(tuner.model, tuner.reward.reward, yard["beta"]), chosen.sampler(tuner.sampler)
    assert exact is not None
    draws = {seed: draw_x0(tuner.model, sampler, chosen.n, None, seed) for seed in range(chosen.seed, chosen.seed + 5)}
    return {
        **yard,
        "reward_tuned": float(tuner.reward.reward(torch.cat(list(draws.values())), None).mean()),
        "distance_to_optimum": exact.distance(draws.__getitem__, chosen.n, chosen.seed),
        **measure_kl(tuner.model, sampler, 4096, None, chosen.seed),
        **tuner.counts(),
    }


def jobs() -> dict[str, dict[str, Any]]:
    """All runs by name."""
    return {
        f"{task}/{trainer}/{steps}/seed{seed}": {
            "task": task, "trainer": trainer, "steps": steps, "seed": seed,
            "iterations": FEWER.get(task, ITERATIONS[steps]) if trainer != "score_action" else ITERATIONS[steps],
            "grid": task == "mixture" and seed == 0 and trainer in ("score_action", "dpok", "ddpo"),
        }
        for seed in range(5)
        for task, trainer, steps in dict.fromkeys(PLAN)
    }  # fmt: skip


def main() -> None:
    options = arguments(__doc__ or "", "exact.json").parse_args()
    results = run_jobs(train, jobs(), options)
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for result in results.values():
        job = result["job"]
        groups.setdefault((job["task"], job["trainer"], job["steps"]), []).append(result)
    rows = []
    for (task, trainer, steps), runs in groups.items():
        found = [run["summary"] for run in runs]
        bar = [max(s["distance_floor"], s["distance_oracle"]) for s in found]
        distance = [s["distance_to_optimum"] for s in found]
        rows.append(
            [
                task, trainer, str(steps), str(len(runs)), cell(distance), f"{mean_and_error(bar)[0]:.3f}",
                f"{mean_and_error(distance)[0] / mean_and_error(bar)[0]:.2f} x", cell([s["reward_tuned"] for s in found]),
                f"{found[0]['optimum_reward']:.3f}", cell([s["kl_nats"] for s in found]),
                f"{found[0]['optimum_kl_nats']:.3f}",
                f"{mean_and_error([s['model_evaluations'] for s in found])[0] / 1e6:.1f} M",
                f"{mean_and_error([s['seconds'] for s in found])[0]:.0f}",
            ]
        )  # fmt: skip
    header = ["task", "trainer", "steps", "seeds", "distance", "max(floor, oracle)", "ratio", "reward", "optimum",
              "KL", "optimum KL",              "evaluations", "seconds"]  # fmt: skip
    print(table(header, rows))
    grids = {f"{r['job']['trainer']}, {r['job']['steps']}": r["grid"] for r in results.values() if "grid" in r}
    print("\nThe mixture, seed 0: distance to the optimum (reward), evaluated at other step counts and solvers")
    print(step_grid(grids, "trained with, at", [5, 10, 25, 50, 200], "distance", "reward"))


if __name__ == "__main__":
    main()
