"""The summary of a run: base and tuned model measured from the same noise, and the files that hold it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from scoreaction.algorithms._learner import Algorithm, Learner
from scoreaction.networks.model import Model
from scoreaction.rewards import CountedReward, Reward
from scoreaction.sampling.rollout import Sampler
from scoreaction.training.best_weights import Selection
from scoreaction.training.evaluation import Evaluation, ExactTask, measure, measure_kl
from scoreaction.training.export import described
from scoreaction.training.online import Online
from scoreaction.training.optimizer import Train
from scoreaction.training.run_folder import RunFolder, write_whole
from scoreaction.types import RewardFunction
from scoreaction.yaml_text import dump_yaml


class Run(Protocol):
    """Parts of a `Finetuner` that its summary is made of."""

    model: Model
    algorithm: Algorithm
    sampler: Sampler
    train: Train
    evaluation: Evaluation
    reward: CountedReward
    held_out: dict[str, CountedReward]
    prompts: list[Any] | None
    learner: Learner
    selection: Selection | None
    folder: RunFolder | None
    online: Online | None
    iteration: int

    def counts(self) -> dict[str, Any]: ...

    def write_recipe(self) -> None: ...

    def save(self, path: str | Path) -> Path: ...


def summarise(run: Run) -> dict[str, Any]:
    """Measures base and tuned model from the same noise; with a folder also writes summary.json, samples/ and model/."""
    chosen = run.evaluation
    chunk = max(16, min(8192, 2**21 // math.prod(run.model.shape)))  # samples at a time: as many as fit a modest memory
    sampler = chosen.sampler(run.sampler)
    counts, queries = run.counts(), run.reward.queries
    figures: dict[str, Any] = {"iterations": run.iteration}
    if run.selection is not None and run.model.selected is not None:
        figures["selected_iteration"] = run.selection.iteration
    prompted: dict[str, dict[str, float]] = {}
    for kind in ("base", "tuned"):
        measured, samples = measure(
            run.model, sampler, run.reward, run.held_out,
            n=chosen.n, prompts=run.prompts, seed=chosen.seed, reference=kind == "base", chunk=chunk,
        )  # fmt: skip
        for prompt, mean in measured.pop("by_prompt", {}).items():
            prompted.setdefault(prompt, {})[f"reward_{kind}"] = mean
        figures |= {_named(name, kind): value for name, value in measured.items()}
        if run.folder is not None:
            _save_samples(run, kind, samples)
    run.reward.queries = queries  # measuring is not training
    figures |= measure_kl(run.model, sampler, chosen.n, run.prompts, chosen.seed)
    beta = optimum_beta(run)
    task = ExactTask.of(run.model, run.reward.reward, beta)
    if task is not None:
        figures |= task.figures(run.model, sampler, chosen.n, chosen.seed)
    figures |= {"beta": beta, **counts}
    if prompted:
        figures["prompts"] = [{"prompt": prompt, **means} for prompt, means in prompted.items()]
    if run.folder is not None:
        run.write_recipe()
        write_whole(run.folder.summary_path, json.dumps(figures, indent=2) + "\n")
        run.save(run.folder.model)
    return figures


def optimum_beta(run: Run) -> float:
    """The beta of the optimum that distances are measured to: `evaluation.beta`, else the algorithm's own as it is now."""
    return run.evaluation.beta or run.learner.beta


def settings_text(run: Run) -> str:
    """Settings of a run without a recipe, in a recipe's form, with names for what only Python has."""
    values = {
        "model": {"name": type(run.model.net).__name__, **described(run.model)},
        "reward": {"name": _name_of(run.reward.reward)},
        "algorithm": {"name": type(run.algorithm).__name__, **run.algorithm.model_dump()},
        "sampler": run.sampler.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json"),
        "prompts": None if run.prompts is None else [str(prompt) for prompt in run.prompts],
        "evaluation": {**run.evaluation.model_dump(mode="json"), "held_out": [{"name": name} for name in run.held_out]},
        "online": None if run.online is None else run.online.model_dump(mode="json"),
    }
    return dump_yaml(json.loads(json.dumps(values, default=str)))


def _name_of(reward: RewardFunction) -> str:
    own = reward.fn if isinstance(reward, Reward) else reward
    name = getattr(own, "__name__", type(own).__name__)
    return "reward" if name == "<lambda>" else name


def _save_samples(run: Run, kind: str, samples: Tensor) -> None:
    assert run.folder is not None
    run.folder.samples.mkdir(parents=True, exist_ok=True)
    kept = samples[: 4096 if samples.ndim == 2 else 100].cpu().numpy()
    arrays = {"samples": kept}
    if run.prompts is not None:
        arrays["prompts"] = np.array([str(run.prompts[i % len(run.prompts)]) for i in range(len(kept))])
    np.savez_compressed(run.folder.samples / f"{kind}.npz", **arrays)  # type: ignore[arg-type]


def _named(name: str, kind: str) -> str:
    """`reward` of the base is `reward_base`, its standard error `reward_base_se`."""
    return f"{name.removesuffix('_se')}_{kind}_se" if name.endswith("_se") else f"{name}_{kind}"
