"""The lean adjoint of Adjoint Matching under the exact optimal policy, against the exact gradient of the soft value.

    python benchmarks/adjoints.py       # results/adjoints.json and a table; a minute on one core

Where the method's fixed point is the optimum, `E<a, grad V*>/E||grad V*||^2` is 1; `E||a||^2/E||grad V*||^2` says how noisy
a is.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from _harness import arguments, table

PATHS = 2000
TASKS = ("linear_quadratic", "mixture16", "mixture")


def measured(task: str, steps: int) -> list[dict[str, float]]:
    """At nine steps of the chain, from noise to data."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.sampling.experience import Experience
    from scoreaction.sampling.rollout import roll_out

    tuner = build(load_recipe(task, ["algorithm.name=adjoint_matching", f"sampler.steps={steps}"]))
    model, beta, process = tuner.model, tuner.learner.beta, tuner.model.process
    quadratic, law = tuner.reward.reward.quadratic, tuner.model.law
    optimum = law.optimum(quadratic, beta).law
    generator, times = torch.Generator().manual_seed(0), tuner.sampler.times(process)
    rollout = roll_out(model, tuner.sampler, lambda x, t: optimum.prediction(process, x, t), PATHS, generator, times=times)
    slope = quadratic.l - (rollout.x0.double() - quadratic.mu) @ quadratic.Q
    nothing = torch.zeros(PATHS)
    experience = Experience(rollout, nothing, None, nothing.long(), reward_gradient=slope.float())
    adjoints: Any = tuner.learner.prepare(experience, generator)
    found = []
    for i in range(0, steps, max(1, steps // 8)):
        truth = law.value_grad(quadratic, beta, process, rollout.x[i].double(), times[i])
        size, adjoint = float(truth.square().sum(1).mean()), adjoints.adjoint[i].double()
        along = (adjoint * truth).sum(1) / size
        found.append(
            {
                "t": float(times[i]),
                "along": float(along.mean()),
                "error": float(along.std()) / PATHS**0.5,
                "moment": float(adjoint.square().sum(1).mean()) / size,
            }
        )
    return found


def main() -> None:
    options = arguments(__doc__ or "", "adjoints.json").parse_args()
    torch.set_num_threads(1)
    out = {f"{task}, {steps} steps": measured(task, steps) for task in TASKS for steps in (25, 100)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(out, indent=1) + "\n")
    rows = []
    for name, found in out.items():
        for at in found[:: len(found) // 4]:
            rows.append([name, f"{at['t']:.3f}", f"{at['along']:.2f} ± {at['error']:.2f}", f"{at['moment']:.1f}"])
    print(table(["task", "t", "mean along grad V*", "second moment"], rows))


if __name__ == "__main__":
    main()
