"""A new control from labels (CTRL): modes of a mixture, and the size of coloured shapes, which no prompt of theirs names.

    python -m benchmarks.ctrl                  # results/ctrl.csv and its tables: three seeds of some six CPU minutes; resumes
    python -m benchmarks.ctrl --only mixture   # the recipe ctrl alone, whose optimum is known for each label

2,000 pictures of single things by the drawing program, small or large by whether the area is below that of radius 7, fit the
reward `label`; training draws 1,920 pictures for `THING | small` and `THING | large`. The program reads the size, on pictures
of 20 steps, and whether a picture is its prompt's scene. A picture that has another number of things has no size. Old prompts
are the set `shapes`, without a label. The same weights are drawn from without guidance, as they were trained, and with it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Figures, arguments, built, run_jobs, summary
from torch import Tensor

PICTURES, LABELS, BOUNDARY = 2000, ("small", "large"), math.pi * 7.0**2
SETTINGS = ["model.labels=[small, large]", "algorithm={name: score_action, beta: 1.0}", "evaluation.held_out=[]"]
GUIDED = {"plain": 1.0, "guided": 2.0}
"""Guidance to draw with; training draws without."""
SEEDS, N, ITERATIONS = 3, 192, 30


def area_of(picture: Tensor) -> float | None:
    """The area in pixels of the one thing of a picture; None where there is another number of them."""
    from scoreaction.tasks.shapes.reader import read

    things = read(picture.numpy())
    return things[0].area if len(things) == 1 else None


def write_labelled(path: Path) -> None:
    """Pictures of single things by the drawing program, with their labels."""
    from scoreaction.tasks.shapes.scenes import THINGS, Scene, draw

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(THINGS), (PICTURES,), generator=generator).tolist()
    pictures = draw([Scene((THINGS[row],)) for row in rows], generator)
    labels = [LABELS[(area_of(picture) or 0.0) > BOUNDARY] for picture in pictures]
    np.savez(path, samples=pictures.numpy(), labels=np.array(labels))


def labelled_prompts() -> list[str]:
    """Every single thing with either label."""
    from scoreaction.tasks.shapes.scenes import THINGS, Scene

    return [f"{Scene((thing,)).caption} | {label}" for thing in THINGS for label in LABELS]


def read_sizes(pictures: Tensor) -> list[str | None]:
    """The size of the one thing of each picture; None where it has another number of them."""
    areas = [area_of(picture) for picture in pictures.cpu()]
    return [None if area is None else LABELS[area > BOUNDARY] for area in areas]


def pretrained(n: int) -> Figures:
    """Figures of the pretrained model, which no label reaches."""
    tuner = built("shapes", *SETTINGS, f"prompts={labelled_prompts()}")
    return {name: measured(tuner, n, guidance, reference=True) for name, guidance in GUIDED.items()}


def size(seed: int, iterations: int, n: int) -> Figures:
    """The control of size: a run, and figures of labelled and of old prompts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sizes.npz"
        write_labelled(path)
        changed = f"train.iterations={iterations}", f"train.seed={seed}", f"prompts={labelled_prompts()}"
        tuner = built("shapes", *SETTINGS, f"reward={{name: label, data: {path}}}", *changed)
    for _ in tuner:
        pass
    figures = {name: measured(tuner, n, guidance, reference=False) for name, guidance in GUIDED.items()}
    return tuner.counts() | figures | kls(tuner, n)


def measured(tuner: Any, n: int, guidance: float, *, reference: bool) -> Figures:
    """Sizes as asked for, with their macro-F1, prompts followed and diversity; prompts followed of the old ones."""
    from scoreaction.recipes.prompts import prompt_list
    from scoreaction.rewards import CountedReward
    from scoreaction.rewards import shapes as program
    from scoreaction.sampling.draw import spread_prompts
    from scoreaction.training.confusion import f1_scores
    from scoreaction.training.evaluation import measure

    sampler = tuner.evaluation.sampler(tuner.sampler).model_copy(update={"guidance": guidance})
    followed = CountedReward(program.build(program.Config(correct=True)))

    def of(prompts: Any) -> tuple[Figures, Tensor]:
        return measure(
            tuner.model, sampler, followed, {}, n=n, prompts=prompts, seed=tuner.evaluation.seed, reference=reference
        )

    labelled, pictures = of(tuner.prompts)
    old, _ = of(prompt_list("shapes"))
    asked = [prompt.rpartition(" | ")[2] for prompt in spread_prompts(tuner.prompts, n) or []]
    kinds = [*LABELS, None]
    table = torch.zeros(len(kinds), len(kinds))
    for wanted, seen in zip(asked, read_sizes(pictures), strict=True):
        table[kinds.index(wanted), kinds.index(seen)] += 1
    return {
        "accuracy": float(table.diagonal().sum() / n), "macro_f1": float(f1_scores(table)[: len(LABELS)].mean()),
        "followed": labelled["reward"], "diversity": labelled["diversity"], "old_followed": old["reward"],
    }  # fmt: skip


def kls(tuner: Any, n: int) -> Figures:
    """Path KL in nats of labelled prompts, and of old ones."""
    from scoreaction.recipes.prompts import prompt_list
    from scoreaction.training.evaluation import measure_kl

    sampler, seed = tuner.evaluation.sampler(tuner.sampler), tuner.evaluation.seed
    kinds = {"kl_nats": tuner.prompts, "kl_old_nats": prompt_list("shapes")}
    return {key: measure_kl(tuner.model, sampler, n, prompts, seed)["kl_nats"] for key, prompts in kinds.items()}


def mixture(seed: int) -> Figures:
    """The recipe ctrl: distance, floor, oracle and KL of each label."""
    tuner = built("ctrl", f"train.seed={seed}", "train.iterations=150", f"evaluation.seed={1234 + 100 * seed}")
    for _ in tuner:
        pass
    return {key: value for key, value in summary(tuner).items() if key.startswith(("by_label", "kl_nats", "distance"))}


def run(task: str, **settings: Any) -> Figures:
    """The figures of one task."""
    tasks: dict[str, Callable[..., Figures]] = {"pretrained": pretrained, "size": size, "mixture": mixture}
    return tasks[task](**settings)


if __name__ == "__main__":
    jobs: dict[str, Figures] = {"pretrained": {"task": "pretrained", "n": N}}
    for seed in range(SEEDS):
        jobs[f"size/{seed}"] = {"task": "size", "seed": seed, "iterations": ITERATIONS, "n": N}
        jobs[f"mixture/{seed}"] = {"task": "mixture", "seed": seed}
    run_jobs(run, jobs, arguments(__doc__ or "", "ctrl").parse_args())
