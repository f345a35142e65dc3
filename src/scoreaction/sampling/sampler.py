"""Settings of the sampler, and the prediction that acts in its steps: the policy's, or the pretrained model's below a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import mapped
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import SOLVERS, GridName, Solver, SolverName, find_solver, time_grid
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.sampling.prompt_path import PromptPath
from scoreaction.settings import Settings
from scoreaction.types import Conditions, Predict, Prediction


class Sampler(Settings, frozen=True, extra="forbid"):
    """Settings of sampling: solver, number of steps, noise level eta, time grid, guidance.

    negative_prompt: what guidance leads away from, instead of the unconditional prediction. off_below: a time; at earlier ones,
    closer to the data, the policy is off and the pretrained model acts. Nothing is learned and no KL is paid there. By default
    it is 0, but of a network that predicts x0 the time at which alpha/sigma is the algorithm's `largest_ratio`.

    >>> Sampler(steps=10, eta=1.0).solver
    'ddim'
    """

    solver: SolverName = "ddim"
    steps: int = Field(50, ge=1, le=10_000)
    eta: float = Field(1.0, ge=0, le=1)
    grid: GridName = "power"
    guidance: float = Field(1.0, ge=0)
    negative_prompt: str | None = None
    off_below: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="time below which the pretrained model acts; null: 0, and of an x0 network that of alpha/sigma 20",
    )

    @property
    def acts_from(self) -> float:
        """The time from which on the policy acts: `off_below`, 0 where no model has settled it."""
        return self.off_below or 0.0

    def settled(self, model: Model, ratio: float) -> Sampler:
        """The sampler with the `off_below` that suits what the model predicts, where it has none.

        ratio: the alpha/sigma up to which a network that predicts x0 is changed.
        """
        return self if self.off_below is not None else self.model_copy(update={"off_below": model.known_from(ratio)})

    def find(self) -> Solver:
        """The solver, refused where it cannot step at this eta."""
        return find_solver(self.solver, self.eta)

    def check(self, model: Model) -> None:
        """ValueError, with the remedy, where the solver cannot sample this model with these settings."""
        solver, process = self.find(), model.process
        if not isinstance(process, solver.process):
            others = " or ".join(name for name, other in SOLVERS.items() if isinstance(process, other.process))
            raise ValueError(
                f"sampler.solver: {self.solver} steps {solver.process.states} states and this model's are {process.states};"
                f" use {others}"
            )
        model.refuse_solver(self.solver)
        if model.moves_noise and isinstance(process, Process) and self.eta > 0:
            raise ValueError(
                f"sampler.eta: the policy moves the noise that samples start from, and noise on the way forgets it (got"
                f" {self.eta:g}); set it to 0"
            )
        if model.chooser is not None and solver.evaluations > 1:
            raise ValueError(
                f"sampler.solver: the policy chooses prompts between steps, and {self.solver} evaluates within them; use ddim"
            )
        positions = model.shape[0]
        if solver.single and self.steps != positions:
            raise ValueError(
                f"sampler.steps: {self.solver} shows one position a step and there are {positions}; set it to {positions}"
            )
        self.times(process)

    def noisy(self) -> Sampler:
        """The sampler on whose chain the KL is measured: at eta 1 where this one's is 0, by a solver that has densities."""
        return self.model_copy(update={"solver": SOLVERS[self.solver].kl, "eta": self.eta or 1.0})

    def times(self, process: Process) -> Tensor:
        """The time grid, (steps + 1,) float64."""
        return time_grid(process, self.steps, name=self.grid)


def act(
    model: Model,
    sampler: Sampler,
    x: Tensor,
    t: Tensor,
    conditions: Conditions = None,
    *,
    prompt: Tensor | None = None,
    ordered: bool = True,
) -> Prediction:
    """The prediction that is followed at (x, t): the policy's, and where `t < sampler.acts_from` the pretrained model's.

    Arguments as `Model.predict`, at the sampler's guidance. Each row is evaluated once, by the one of the two that acts.
    ordered: with the pretrained model's confidence where the solver's order goes by it, which is another evaluation.
    """
    off = torch.as_tensor(t) < sampler.acts_from  # of one time also without rows: a shared network is the same for all
    if bool(off.any()) and not bool(off.all()):
        numbers = torch.arange(len(x)) if prompt is None else prompt
        parts = [
            act(model, sampler, take(x, rows), take(t, rows), conditions, prompt=take(numbers, rows), ordered=ordered)
            for rows in (off.nonzero().flatten(), (~off).nonzero().flatten())
        ]
        order = torch.cat([off.nonzero().flatten(), (~off).nonzero().flatten()]).argsort()
        return take(mapped(lambda *both: torch.cat(both), *parts), order)
    options = {"conditions": conditions, "prompt": prompt, "guidance": sampler.guidance}
    if bool(off.any()):
        return model.reference(x, t, **options)
    prediction: Any = model.predict(x, t, **options)
    if ordered and sampler.find().by_reference:
        with torch.no_grad():
            reference: Any = model.reference(x, t, **options)
        prediction = prediction._replace(confidence=reference.confidence)
    return prediction


def follow(
    model: Model,
    sampler: Sampler,
    conditions: Conditions,
    prompt: Tensor,
    noise: Source | None = None,
    *,
    reference: bool = False,
) -> Predict:
    """The prediction function of paths from t = 1, one for each of prompt (rows,): `act`, or the pretrained model's.

    Where the model keeps what it computed of earlier positions, it is used; such a function serves one batch of paths. So does
    a policy that chooses prompts, for which there is noise beside that of the paths.
    """
    if model.chooser is not None and not reference:
        return PromptPath(model, conditions, prompt, noise, guidance=sampler.guidance, off_below=sampler.acts_from)
    if sampler.solver == "left_to_right" and not sampler.acts_from:
        stream = model.stream("reference" if reference else "policy", conditions, prompt, sampler.guidance)
        if stream is not None:
            return stream
    predict = partial(model.reference, guidance=sampler.guidance) if reference else partial(act, model, sampler)
    return partial(predict, conditions=conditions, prompt=prompt)
