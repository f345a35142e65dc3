"""Runs of tasks with prompts, shapes and glyphs alike: jobs, figures on seen and unseen prompts, and the curve of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _harness import Figures, built

BATCH = 64
GUIDED = (1.0, 2.0, 3.0)
SEEDS = 3
PLAIN = "name: score_action, estimator: forward, each: 10"
"""Score as Action by forward, without averaging; `MEASURED` is what other benchmarks ran with."""
MEASURED = f"algorithm={{{PLAIN}, beta: 0.08}}"
POINTS = 2


@dataclass(frozen=True)
class Prompted:
    """A recipe whose prompts are a set of its name, with another of unseen ones.

    judge: the held-out reward whose mean is the accuracy. kept: what is kept of a measurement. fixed: settings of all runs.
    """

    recipe: str
    judge: str
    kept: tuple[str, ...]
    fixed: tuple[str, ...] = ()

    def built(self, settings: Sequence[str], iterations: int, seed: int, n: int) -> Any:
        """The run of these settings, unguided."""
        own = [
            f"train.batch={BATCH}",
            f"train.seed={seed}",
            f"evaluation.n={n}",
            "sampler.guidance=1",
            "train.held_out_rows=64",
        ]
        return built(self.recipe, *own, *self.fixed, *settings, f"train.iterations={max(1, iterations)}")

    def trained(self, settings: Sequence[str], iterations: int, seed: int, n: int) -> tuple[Any, Figures]:
        """A run to its end, and its figures: unguided on training and unseen prompts, with the curve of its training."""
        tuner, curve = self.built(settings, iterations, seed, n), []
        for metrics in tuner:
            if metrics["iteration"] % max(1, iterations // POINTS) == 0:
                done = {"iteration": metrics["iteration"], "pictures": metrics["iteration"] * BATCH}
                curve.append(done | self.accuracy_and_kl(tuner, n // 2))
        last = {key: curve[-1][key] for key in ("kl_nats", "kl_nats_se")}
        return tuner, {**tuner.counts(), **self.measured(tuner, n), **last, "curve": curve}

    def measured(self, tuner: Any, n: int, guidance: float = 1.0, *, reference: bool = False) -> Figures:
        """Figures of the tuned model or the base under this guidance, by set of prompts."""
        from scoreaction.recipes.prompts import prompt_list
        from scoreaction.training.evaluation import measure

        sampler = tuner.evaluation.sampler(tuner.sampler).model_copy(update={"guidance": guidance})
        out = {}
        for kind, name in (("seen", self.recipe), ("unseen", f"{self.recipe}_unseen")):
            figures, _ = measure(
                tuner.model, sampler, tuner.reward, tuner.held_out,
                n=n, prompts=prompt_list(name), seed=tuner.evaluation.seed, reference=reference,
            )  # fmt: skip
            out[kind] = {key: figures[key] for key in self.kept}
        return out

    def accuracy_and_kl(self, tuner: Any, n: int) -> Figures:
        """Accuracy on the training prompts and KL of the averaged weights as they are, at the evaluation's steps."""
        from scoreaction.training.evaluation import measure, measure_kl

        queries, seed, sampler = tuner.reward.queries, tuner.evaluation.seed, tuner.evaluation.sampler(tuner.sampler)
        figures, _ = measure(tuner.model, sampler, tuner.reward, tuner.held_out, n=n, prompts=tuner.prompts, seed=seed)
        tuner.reward.queries = queries
        return {"accuracy": figures[f"held_out.{self.judge}"], **measure_kl(tuner.model, sampler, n // 2, tuner.prompts, seed)}


def base_and_trainers(trainers: dict[str, tuple[int, list[str]]], n: int, *, seeds: int = SEEDS) -> dict[str, Figures]:
    """The base under each guidance, and each trainer with its iterations and settings from each seed, by name."""
    base: dict[str, tuple[Any, ...]] = {f"base, guidance {g:g}": (f"base, guidance {g:g}", [], 0, 0, g) for g in GUIDED}
    runs = {
        f"{trainer}/seed{seed}": (trainer, settings, iterations, seed, 1.0)
        for seed in range(seeds)
        for trainer, (iterations, settings) in trainers.items()
    }
    keys = ("trainer", "settings", "iterations", "seed", "guidance")
    return {name: dict(zip(keys, values, strict=True)) | {"n": n} for name, values in (base | runs).items()}


def shown(tuner: Any, count: int, seed: int) -> tuple[list[str], Any, Any]:
    """So many of the run's prompts, and samples of the base and of the tuned model for them from the same noise."""
    import scoreaction as sa

    prompts, sampler = tuner.prompts[:: len(tuner.prompts) // count][:count], tuner.evaluation.sampler(tuner.sampler)
    chosen = {
        "n": count, "steps": sampler.steps, "eta": sampler.eta, "solver": sampler.solver, "seed": seed, "prompts": prompts,
    }  # fmt: skip
    before, after = (sa.sample(tuner.model, **chosen, reference=reference) for reference in (True, False))
    return prompts, before, after
