"""Noise hypernetworks on the mixture and the digits, beside DRaFT, at equal queries and at equal evaluations.

    python -m benchmarks.hypernoise     # results/hypernoise.csv and its table; some ten minutes on one core

Mixture: 200 iterations of 256 queries; the generator is DDIM of 8 steps, DRaFT has a KL, eta 1 and all of its 8 steps
differentiated. Samples are measured by those 8 steps, and by 200. Digits: 20 iterations of 64 queries; the generator is the
shipped consistency model, and samples are measured by DDIM of 25 steps. Each method ends where its queries, or its evaluations,
are those of hypernoise with the exact (on digits the second-order) penalty. Three seeds.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, run_jobs, summary

NOISE = ["algorithm.name=hypernoise", "sampler.eta=0", "evaluation.eta=0"]
DRAFT = {"mixture": ["algorithm.name=draft", "algorithm.last=null"], "digits": ["algorithm.name=draft", "algorithm.last=1"]}
TASKS: dict[str, Any] = {  # settings, iterations, and evaluations of such a run of hypernoise
    "mixture": (["sampler.steps=8", "evaluation.steps=8", "train.lr=2e-3"], 200, 200 * 256 * 22),
    "digits": (["sampler.steps=10", "evaluation.steps=25", "evaluation.n=200"], 20, 20_480),
}
BETAS = {"mixture": 0.5, "digits": 0.1}


def trained(task: str, method: str, budget: str, seed: int, iterations: int) -> Figures:
    """A run of a method that ends with its queries or its evaluations, and what its samples come to."""
    settings, _, evaluations = TASKS[task]
    own = DRAFT[task] if method == "draft" else [*NOISE, f"algorithm.penalty={method}"]
    if task == "digits" and method != "draft":
        own = [*own, "model.consistency=shipped"]
    length = 10 * iterations if budget == "evaluations" else iterations
    more = [f"algorithm.beta={BETAS[task]}", f"train.seed={seed}", f"train.iterations={length}", "train.schedule=constant"]
    tuner = built(task, *own, *settings, *more)
    for metrics in tuner:
        if metrics["model_evaluations"] >= evaluations if budget == "evaluations" else metrics["iteration"] >= iterations:
            break
    figures = summary(tuner)
    if task == "mixture":
        steps = tuner.evaluation.sampler(tuner.sampler).model_copy(update={"steps": 200})
        figures["fine"] = _fine(tuner, steps, seed)
    return {**figures, "iterations_made": tuner.iteration}


def _fine(tuner: Any, sampler: Any, seed: int) -> Figures:
    """Reward and distance of samples by 200 steps."""
    from scoreaction.training.evaluation import ExactTask, measure

    task = ExactTask.of(tuner.model, tuner.reward.reward, tuner.beta)
    assert task is not None
    n = tuner.evaluation.n
    measured, _ = measure(tuner.model, sampler, tuner.reward, {}, n=n, prompts=None, seed=tuner.evaluation.seed)
    distance = task.distances(tuner.model, sampler, n, tuner.evaluation.seed)["distance_to_optimum"]
    return {"reward": measured["reward"], "distance": distance}


def jobs() -> dict[str, Figures]:
    out: dict[str, Figures] = {}
    methods = {"mixture": ("exact", "frobenius", "published"), "digits": ("frobenius",)}
    for task, (_, iterations, _) in TASKS.items():
        for method, budget in [*((name, "queries") for name in methods[task]), ("draft", "queries"), ("draft", "evaluations")]:
            for seed in range(3):
                job = {"task": task, "method": method, "budget": budget, "seed": seed, "iterations": iterations}
                out[f"{task}/{method}/{budget}/seed{seed}"] = job
    return out


if __name__ == "__main__":
    run_jobs(trained, jobs(), arguments(__doc__ or "", "hypernoise").parse_args())
