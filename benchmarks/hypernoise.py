"""Noise hypernetworks on the mixture and the digits, beside DRaFT, at equal queries and at equal evaluations.

    python -m benchmarks.hypernoise     # results/hypernoise.csv and its table; some five minutes on one core

Mixture: 100 iterations of 256 queries; the generator is DDIM of 8 steps, DRaFT has a KL, eta 1 and all of its 8 steps
differentiated. 2,048 samples are measured by those 8 steps, and by 200. Digits: 20 iterations of 64 queries; the generator is
the shipped consistency model, DRaFT differentiates the last of 10 steps, and 200 samples are measured by DDIM of 25. Each
method ends with as many queries, or evaluations, as the first of its task. Three seeds.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, run_jobs

NOISE = ["algorithm.name=hypernoise", "sampler.eta=0", "evaluation.eta=0"]
SETTINGS = {
    "mixture": ["sampler.steps=8", "train.lr=5e-3", "algorithm.beta=0.5", "evaluation.n=2048", "evaluation.steps=200"],
    "digits": ["sampler.steps=10", "algorithm.beta=0.1", "evaluation.n=200", "evaluation.steps=25"],
}
METHODS: dict[str, dict[str, list[str]]] = {  # a task's methods, and their settings
    "mixture": {
        **{
            f"hypernoise, {penalty}": [*NOISE, f"algorithm.penalty={penalty}"]
            for penalty in ("exact", "frobenius", "published")
        },
        "draft": ["algorithm.name=draft", "algorithm.last=null"],
    },
    "digits": {
        "hypernoise, frobenius": [*NOISE, "model.consistency=shipped"],
        "draft": ["algorithm.name=draft", "algorithm.last=1"],
    },
}
ITERATIONS = {"mixture": 100, "digits": 20}


def trained(task: str, seed: int) -> Figures:
    """Every method of a task at one seed; a point each, and a second one of `draft` where its evaluations are equal."""
    points: list[Figures] = []
    for method, own in METHODS[task].items():
        for equal in ("queries", "evaluations") if method == "draft" else ("queries",):
            more = [f"train.seed={seed}", f"train.iterations={ITERATIONS[task]}"]
            tuner = built(task, *own, *SETTINGS[task], *more)
            for metrics in tuner:
                if equal == "evaluations" and metrics["model_evaluations"] >= points[0]["evaluations"]:
                    break
            costs = {"queries": metrics["reward_queries"], "evaluations": metrics["model_evaluations"]}
            name = method if equal == "queries" else f"{method}, as many evaluations"
            points.append({"method": name, **costs, "seconds": metrics["seconds"], **_measured(tuner)})
    return {"curve": points}


def _measured(tuner: Any) -> Figures:
    """Reward and distance of samples by the steps of training and by those of the evaluation, KL, and held-out rewards."""
    from scoreaction.training.evaluation import ExactTask, measure, measure_kl

    chosen, model = tuner.evaluation, tuner.model
    task, many = ExactTask.of(model, tuner.reward.reward, tuner.beta), chosen.sampler(tuner.sampler)
    own = {"n": chosen.n, "prompts": tuner.prompts, "seed": chosen.seed}
    figures: Figures = {"kl_nats": measure_kl(model, many, **own)["kl_nats"]}
    for name, sampler in (("", many), ("few_", tuner.sampler)) if task else (("", many),):
        found, _ = measure(model, sampler, tuner.reward, tuner.held_out, **own)
        figures |= {f"{name}{key}": found.get(key) for key in ("reward", "diversity", "held_out.legibility") if key in found}
        if task is not None:
            figures |= {f"{name}distance": task.distances(model, sampler, chosen.n, chosen.seed)["distance_to_optimum"]}
    return figures


if __name__ == "__main__":
    run_jobs(
        trained,
        {f"{task}/seed{seed}": {"task": task, "seed": seed} for task in METHODS for seed in range(3)},
        arguments(__doc__ or "", "hypernoise").parse_args(),
    )
