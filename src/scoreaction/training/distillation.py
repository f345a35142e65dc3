"""Consistency distillation: a pretrained model's ODE, from any point to its end, in one evaluation of a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import SOLVERS, jittered, time_grid
from scoreaction.errors import check_kind
from scoreaction.networks.adapters import LoraShape, base_modules, replaced
from scoreaction.networks.conditions import take
from scoreaction.networks.consistency import belongs, save_consistency
from scoreaction.networks.model import Model
from scoreaction.sampling.rollout import States
from scoreaction.sampling.trajectory import trajectory
from scoreaction.settings import Settings
from scoreaction.types import Predict
from scoreaction.world import ALONE, World

HUBER = 0.03
"""Errors below this, in a coordinate, count squared; those above by their size (pseudo-Huber)."""


class Distill(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of distillation: its length, the size of the consistency model, and the ODE paths that it learns from.

    rank: that of the adapter; null gives it a copy of the network with weights of its own. targets: the modules that the
    adapter changes, by default all linear and convolutional layers. paths: ODE paths an iteration, each of `steps` steps;
    leap: how many steps ahead a point learns from, null to the path's end. max_rows: the largest batch of one network call.
    """

    iterations: int = Field(1000, ge=1)
    paths: int = Field(32, ge=1)
    steps: int = Field(16, ge=2, le=10_000)
    leap: int | None = Field(None, ge=1)
    lr: float = Field(2e-3, gt=0)
    ema: float = Field(0.99, ge=0, lt=1)
    rank: int | None = Field(None, ge=1)
    targets: list[str] | None = None
    seed: int = Field(0, ge=0, lt=2**32)
    max_rows: int = Field(4096, ge=1)


class Distiller:
    """Gives a model a consistency model of its reference: iterate over it, one dict of metrics an iteration.

    Each iteration follows the reference's guided ODE (DPM-Solver++ 2M, a grid in log SNR that moves) from noise to data. At
    every point of a path `f(x_t, t)` learns, under a pseudo-Huber loss, what the averaged f says `leap` steps further down
    (Song et al. 2023, arXiv 2303.01469, eq. 7, where leap is 1); at the path's end that is the sample itself. ValueError
    where the model has a consistency model already.

    >>> import scoreaction as sa
    >>> model = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    >>> [metrics["iteration"] for metrics in Distiller(model, Distill(iterations=2))]
    [1, 2]
    >>> model.consistency(torch.zeros(4, 2), torch.tensor(0.5)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        model: Model,
        settings: Distill | None = None,
        *,
        guidance: float = 1.0,
        prompts: Sequence[Any] | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.settings, self.guidance, self.world = model, settings or Distill(), guidance, world
        check_kind("settings", self.settings, Distill, "sa.Distill(rank=8)")
        if self.settings.paths % world.size:
            raise ValueError(f"distill.paths: {self.settings.paths} are not shared evenly by {world.size} processes")
        self.prompts = None if prompts is None else list(prompts)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.conditions = model.conditions(self.prompts)
            self.parameters = model.add_consistency(self._shape())
        self.world.share(self.parameters.values())
        model.consistency_guidance = guidance
        self.belongs = belongs(model)  # before a negative prompt is set
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    def _shape(self) -> LoraShape | None:
        rank, targets = self.settings.rank, self.settings.targets
        if rank is None:
            return None
        kinds = (nn.Linear, nn.Conv2d)
        chosen = targets or [name for name, m in base_modules(self.model.reference_net).items() if isinstance(m, kinds)]
        return LoraShape(rank, rank, chosen)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        settings = self.settings
        fixed: dict[str, Any] = {"lr": settings.lr, "ema": settings.ema, "world": self.world, "key": "distill"}
        yield from fitted(
            self.parameters, self.average, lambda: self._backward(*self._states()), iterations=settings.iterations, **fixed
        )

    def _backward(self, states: States, target: Tensor) -> float:
        """Accumulates the gradient of the loss over all states, and returns that loss."""
        total = 0.0
        for rows in torch.arange(len(target)).split(self.settings.max_rows):
            loss = self._loss(take(states, rows), take(target, rows)) * (len(rows) / len(target))
            loss.backward()
            total += loss.item()
        return total

    def _loss(self, states: States, target: Tensor) -> Tensor:
        """The mean pseudo-Huber distance of f to its targets.

        Distances are divided by `sigma/sqrt(alpha^2 + sigma^2)`, as an error of the network's own output is on its way to
        x0: else the states near the data count for nothing.
        """
        share = torch.sigmoid(-self.model.process.log_snr(states.t)).to(target)
        f = self._consistency(states)
        return (torch.sqrt((f - target).square().flatten(1).mean(1) / share + HUBER**2) - HUBER).mean()

    def _consistency(self, states: States) -> Tensor:
        return self.model.consistency(states.x, states.t, self.conditions, prompt=states.prompt)

    @torch.no_grad()
    def _states(self) -> tuple[States, Tensor]:
        """States of the reference's ODE, (steps * paths) of them, and their targets."""
        steps, paths, prompt = self.settings.steps, self.settings.paths, torch.zeros(self.settings.paths, dtype=torch.long)
        if self.prompts is not None:
            prompt = torch.randint(len(self.prompts), (paths,), generator=self.generator)
        times = jittered(time_grid(self.model.process, steps, name="log_snr"), self.generator)
        own = RowNoise.drawn(self.generator, self.world.stripe(paths))
        prompt, paths = self.world.own(prompt), paths // self.world.size
        noise = self.model.start(paths, self.model.noise(own, self.conditions, prompt))
        predict = partial(self.model.reference, conditions=take(self.conditions, prompt), guidance=self.guidance)
        x = follow(predict, self.model.process, noise, times)
        leap = self.settings.leap or steps
        ends = (torch.arange(steps) + leap).clamp(max=steps)
        states = States(x[:-1].flatten(0, 1), times[:-1].repeat_interleave(paths), prompt.repeat(steps))
        later = States(x[ends].flatten(0, 1), times[ends].repeat_interleave(paths), prompt.repeat(steps))
        if leap >= steps:
            return states, later.x
        with replaced(self.parameters, self.average):
            parts = torch.arange(len(later.t)).split(self.settings.max_rows)
            return states, torch.cat([self._consistency(take(later, rows)) for rows in parts])

    def save(self, path: str | Path, *, described: dict[str, Any] | None = None) -> Path:
        """Writes the consistency model into a folder, which `load_consistency` and recipes read."""
        about = {"rank": self.settings.rank, "distill": self.settings.model_dump(), **self.belongs, **(described or {})}
        return save_consistency(self.model, path, described=about)


def fitted(
    parameters: Mapping[str, nn.Parameter],
    average: dict[str, Tensor],
    learned: Callable[[], float],
    *,
    iterations: int,
    lr: float,
    ema: float,
    world: World,
    key: str,
    game: Callable[[float], float] | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains parameters by Adam at a rate that falls as a cosine, one dict of metrics an iteration; they end as their average.

    learned: accumulates the gradient of an iteration's loss and returns that loss; average: holds the average, decay `ema`.
    game: takes the place of both gradient and step, `game(share)` at this share of the rate. ValueError, naming a setting
    below `key`, for a gradient that is not finite, or none.
    """
    own = nn.ParameterList(parameters.values())
    optimiser = torch.optim.Adam(own, lr=lr, eps=1e-12)
    trained = [p.requires_grad for p in own]
    try:
        for i in range(iterations):
            share = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * i / iterations))
            own.requires_grad_(True)  # which may be frozen elsewhere
            metrics = {"loss": game(share)} if game is not None else _adam_step(own, optimiser, learned, share * lr, world, key)
            own.requires_grad_(False)
            keep = min(ema, (1 + i) / (10 + i))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), [p.detach() for p in own], 1 - keep)
            yield {"iteration": i + 1, **metrics}
    finally:
        for p, was in zip(own, trained, strict=True):
            p.requires_grad_(was)
        for name, p in parameters.items():
            p.data = average[name]


def _adam_step(
    own: nn.ParameterList, optimiser: torch.optim.Adam, learned: Callable[[], float], lr: float, world: World, key: str
) -> dict[str, Any]:
    for group in optimiser.param_groups:
        group["lr"] = lr
    (loss,) = world.average_gradients(own, [learned()])
    norm = float(nn.utils.clip_grad_norm_(own, 1.0))
    if not math.isfinite(norm):
        raise ValueError(f"{key}.lr: the gradient is not finite; lower it")
    if norm == 0:
        raise ValueError(
            f"{key}.rank: no gradient reaches the adapter; name other {key}.targets, or set rank to null"
            if key == "distill"
            else f"{key}: no gradient reaches the policy's parameters"
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": norm}


@torch.no_grad()
def follow(predict: Predict, process: Process, x: Tensor, times: Tensor) -> Tensor:
    """The ODE of a prediction from x at times[0] down the grid: the states, (len(times), batch, *shape)."""
    steps = trajectory(predict, process, x, times, solver=SOLVERS["dpmpp_2m"], eta=0.0)
    return torch.stack([x, *(visit.x_next for visit in steps)])


@torch.no_grad()
def endpoint_errors(
    model: Model, n: int, *, guidance: float = 1.0, prompts: Sequence[Any] | None = None, seed: int = 0, steps: int = 100
) -> dict[str, list[float]]:
    """Root mean square error, a coordinate, of ways to say where the reference's ODE ends, by time.

    Truth: `steps` steps of that ODE from noise, at the times and ends of n paths. `consistency` is the model's own,
    `tweedie` the reference's x0.
    """
    generator = torch.Generator().manual_seed(seed)
    listed = None if prompts is None else [list(prompts)[i % len(prompts)] for i in range(n)]
    with model.uncounted():
        conditions = model.conditions(listed)
        times = time_grid(model.process, steps, name="log_snr")
        predict = partial(model.reference, conditions=conditions, guidance=guidance)
        states = follow(predict, model.process, model.start(n, model.noise(generator, conditions)), times)
        errors: dict[str, list[float]] = {"t": [], "consistency": [], "tweedie": []}
        for at in (1.0, 0.8, 0.6, 0.4, 0.2, 0.1):
            i = int((times - at).abs().argmin())
            x, t = states[i], times[i]
            tweedie = model.reference(x, t, conditions, guidance=guidance).x0
            errors["t"].append(float(t))
            errors["consistency"].append(_rms(model.consistency(x, t, conditions) - states[-1]))
            errors["tweedie"].append(_rms(tweedie - states[-1]))
    return errors


def _rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())
