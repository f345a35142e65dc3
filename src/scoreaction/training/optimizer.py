"""Optimisation of a run: its settings, its optimisers, its schedule, and their steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._updates import Largest, Term, Update, Updates
from scoreaction.errors import missing
from scoreaction.networks.lockstep import equal_parts
from scoreaction.networks.memory import fitting
from scoreaction.networks.model import Model
from scoreaction.networks.sharding import distributed_as, whole
from scoreaction.settings import Settings
from scoreaction.training.errors import GradientError, TrainingError, check_first_ratio
from scoreaction.training.take_back import TakeBack
from scoreaction.training.trackers import Names
from scoreaction.world import ALONE, Rows, World

NO_GRADIENT = "check that the network's output depends on them, and that nothing detaches it"


SURE = 64
"""Rows a process, on average, at which none is without any: one in e^64 of lists drawn with replacement."""
ROWS = 4096
"""The largest batch of one network call where neither run nor model sets one."""


class Train(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of training: iterations, trajectories an iteration, learning rate, seed, device, averages, checkpoints.

    max_rows is the largest batch of one network call (guidance doubles it), null the model's own, else 4096; optimizer
    adam8bit keeps the policy's Adam in 8 bits, for full fine-tuning; held_out_rows how many samples an iteration the held-out
    rewards and diversity are measured on. select: the metric whose best weights are kept, higher is better; they are then what
    is reported, sampled and saved. show_every: after how many iterations the command `train` draws samples of the same noise
    into samples/, and where they are pictures to the trackers too. trackers: what shows the metrics beside the run's own files,
    `tensorboard`, `wandb`, `trackio`; null is TensorBoard where it is installed. schedule: of the learning rate over the run.
    samples_per_prompt: that many trajectories have one prompt. reward_delay: iterations after which the rewards of a batch are
    there; the policy goes on meanwhile, and learns from the batch then. shard: the processes of a node share the networks, of
    which each holds a part (FSDP).
    """

    iterations: int = Field(300, ge=1)
    batch: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adam", "adam8bit"] = "adam"
    shard: bool = False
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: bool = True
    ema_decay: float = Field(0.99, gt=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    max_rows: int | None = Field(None, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    reward_delay: int = Field(0, ge=0, description="iterations that rewards come late")
    checkpoint_every: int = Field(50, ge=1)
    held_out_rows: int = Field(64, ge=2)
    show_every: int | None = Field(None, ge=1)
    trackers: Names | None = None
    select: str | None = None


def policy_optimiser(train: Train, model: Model) -> torch.optim.Optimizer:
    """The optimiser of the trained weights. ValueError, with the remedy, where it cannot be had."""
    parameters = model.parameters.values()
    if train.optimizer == "adam":
        return adam(parameters, train.lr)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"train.optimizer: adam8bit {missing('bitsandbytes')}")
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(list(parameters), lr=train.lr)  # its own eps: in 8 bits a small second moment is 0, and the step m/eps


def learning_rate(train: Train, iteration: int) -> float:
    """The share of the learning rate at this iteration: cosine from 1 to 0.01 over the run."""
    if train.schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * iteration / train.iterations))


def adam(parameters: Any, lr: float) -> torch.optim.Adam:
    """Adam with an eps far below the scale of any gradient, so that steps do not depend on the reward's units."""
    chosen = list(parameters)
    if not chosen:
        raise ValueError("the network has no trainable parameters; unfreeze some, or set lora_rank")
    return torch.optim.Adam(chosen, lr=lr, eps=1e-12, fused=True)


class Optimisation:
    """The optimisers of a run, one for the policy and one for each network with a rate, and the scaler of fp16 gradients."""

    moved = False
    """True once a network took a step, until the loop sets it back."""

    def __init__(
        self,
        train: Train,
        model: Model,
        networks: dict[str, nn.Module],
        rates: dict[str, float],
        *,
        scaled: bool,
        world: World = ALONE,
    ) -> None:
        self.train, self.model, self.rates, self.world = train, model, {"policy": train.lr, **rates}, world
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=scaled)
        self.optimisers: dict[str, torch.optim.Optimizer] = {"policy": policy_optimiser(train, model)}
        self.optimisers |= {name: adam(network.parameters(), rates[name]) for name, network in networks.items()}

    def state(self) -> dict[str, Any]:
        """The states of the optimisers."""
        return {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a `state` with whole tensors, each held as its parameter is."""
        for name, optimiser in self.optimisers.items():
            own = dict(enumerate(self._parameters(name)))
            states = {
                i: {
                    key: distributed_as(v, own[i]) if isinstance(v, Tensor) and v.shape == own[i].shape else v
                    for key, v in kept.items()
                }
                for i, kept in state[name]["state"].items()
            }
            optimiser.load_state_dict({**state[name], "state": states})

    def learn(
        self, updates: Updates, iteration: int, *, equal: bool, kl_floor: float = 0.0, learner: Learner | None = None
    ) -> dict[str, float]:
        """Takes a step for each update; returns each figure's mean over the updates, and the policy's mean gradient norm.

        equal: all rewards of the iteration are, so that a gradient of 0 is no fault: the log says it. kl_floor: the path KL of
        rounding alone, in nats. Of a `learner` with a trust region, an iteration that leaves it by far is taken back.
        """
        seen: dict[str, list[float]] = {}
        share = learning_rate(self.train, iteration)
        back = None if learner is None else TakeBack.of(learner, self.optimisers["policy"], iteration)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = share * self.rates[name]
        if back is not None:
            back.begin()
        last: Update | None = None
        for update, figures in self._figures(updates, iteration):
            check_first_ratio(figures.get("log_ratio_first", 0.0), kl_floor, iteration)
            norm, policy = self._gradient_norm(update.network), update.network == "policy"
            if back is not None and policy and back.refuses(figures, 0.0 if self.scaler.is_enabled() else norm):
                self.scaler.update()
                continue
            self._step(update.network, norm, iteration)
            if policy and math.isfinite(norm):
                seen.setdefault("grad_norm", []).append(norm)
            for name, value in figures.items():
                seen.setdefault(name, []).append(value)
            if back is not None and policy:
                last, back.steps = update, back.steps + 1
        if back is not None and last is not None:
            if back.doubt:
                with torch.no_grad():  # what the last step did, no update has measured
                    back.refuses(self._backward(last, iteration))
            back.end()
        if not any(seen.get("grad_norm", [])):
            if equal or "grad_norm" not in seen:  # nothing to learn from, or fp16 overflowed: the log says it, no error
                return {"grad_norm": 0.0, "skipped": 1.0}
            raise GradientError(f"iteration {iteration + 1}: the trained parameters received no gradient", NO_GRADIENT)
        return {name: sum(values) / len(values) for name, values in seen.items()}

    def _figures(self, updates: Updates, iteration: int) -> Iterator[tuple[Update, dict[str, float]]]:
        """Yields each update with its figures after its backward passes; the algorithm gets them after the step."""
        if not isinstance(updates, Generator):
            raise TypeError(f"updates must be a generator, `yield Update(...)`, and gave {type(updates).__name__}")
        figures: dict[str, float] | None = None
        while True:
            try:
                update = next(updates) if figures is None else updates.send(figures)
            except StopIteration:  # of the generator alone: in a loss it is an error
                return
            figures = self._backward(update, iteration)
            yield update, figures

    def _backward(self, update: Update, iteration: int) -> dict[str, float]:
        """The gradient of the sum of the terms, each a mean over its rows of all processes, in parts that memory holds.

        Returns the figures of all rows: their mean, or the largest where it is asked for. Under no_grad it only measures them.
        """
        if not isinstance(update, Update) or not update.terms or not all(isinstance(term, Term) for term in update.terms):
            raise TypeError(f"updates must yield Update(network, [Term(rows, loss), ...]), and gave {update!r}")
        if update.network not in self.optimisers:
            raise ValueError(f"updates: {update.network!r} is not trained; choose from {', '.join(self.optimisers)}")
        own = [len(rows) if isinstance(rows, Rows) else rows for rows, _, _ in update.terms]
        most = max(rows * term.calls for rows, term in zip(own, update.terms, strict=True)) or 1
        work = partial(fitting, self.model, most, partial(self._accumulate, update, iteration))
        return self._averaged(update, *self.world.together(work, sends=self.model.sharded))  # a loss may ask a reward

    def _accumulate(self, update: Update, iteration: int, limit: int) -> tuple[dict[str, float], dict[str, float]]:
        """The gradient of the own rows, and their part of the figures' means and largest, in calls of at most `limit` rows."""
        means: dict[str, float] = {}
        largest: dict[str, float] = {}
        self.optimisers[update.network].zero_grad(set_to_none=True)
        for rows, loss, calls in update.terms:
            own = len(rows) if isinstance(rows, Rows) else rows
            share = rows.total / self.world.size if isinstance(rows, Rows) else own  # the mean over processes is then right
            for numbers in self._parts(own, calls, limit):
                values, seen = loss(numbers)
                _check_rows("the loss", values, len(numbers))
                if values.requires_grad:
                    self.scaler.scale(values.sum() / share).backward()
                elif torch.is_grad_enabled():
                    raise TrainingError(f"iteration {iteration + 1}: the {update.network} received no gradient; {NO_GRADIENT}")
                for name, figure in seen.items():
                    _check_rows(f"the figure {name!r}", figure.values if isinstance(figure, Largest) else figure, len(numbers))
                    if isinstance(figure, Largest):
                        most = float(figure.values.detach().max()) if len(numbers) else -math.inf
                        largest[name] = max(largest.get(name, -math.inf), most)
                    else:
                        means[name] = means.get(name, 0.0) + float(figure.detach().sum()) / share
        return means, largest

    def _parts(self, own: int, calls: int, limit: int) -> Sequence[Tensor]:
        """The own rows in parts of one backward pass; of a sharded network every process makes as many."""
        rows = torch.arange(own)
        if calls and self.model.sharded:
            return equal_parts(rows, max(1, limit // calls))
        return rows.split(own if calls == 0 else max(1, limit // calls)) if own else ()

    def _averaged(self, update: Update, means: dict[str, float], largest: dict[str, float]) -> dict[str, float]:
        """Averages gradient and figures over the processes."""
        few = SURE * self.world.size  # a list drawn with replacement may be all of other processes
        if any(isinstance(term.rows, Rows) and term.rows.total < few for term in update.terms):
            for own, missing in ((means, 0.0), (largest, -math.inf)):  # of a process without rows
                names = {name for known in self.world.every([*own]) for name in known}
                own |= {name: missing for name in names - own.keys()}
        values = [value for _, value in sorted(means.items())]
        learned = self._parameters(update.network) if torch.is_grad_enabled() else []
        averages = self.world.average_gradients(learned, values)
        most = self.world.reduced([value for _, value in sorted(largest.items())], "max")
        return dict(zip(sorted(means), averages, strict=True)) | dict(zip(sorted(largest), most, strict=True))

    def _parameters(self, network: str) -> list[Tensor]:
        return [p for group in self.optimisers[network].param_groups for p in group["params"]]

    def _gradient_norm(self, name: str) -> float:
        """The norm of a network's gradient, which for the policy is then clipped."""
        self.scaler.unscale_(self.optimisers[name])
        most = self.train.max_grad_norm if name == "policy" else 1e9
        return float(whole(nn.utils.clip_grad_norm_(self._parameters(name), most)))

    def _step(self, name: str, norm: float, iteration: int) -> None:
        optimiser, self.moved = self.optimisers[name], True
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise GradientError(f"iteration {iteration + 1}: the gradient of the {name} is not finite")
        self.scaler.step(optimiser)  # with fp16 a step whose gradient overflowed is left out, and the scale lowered
        self.scaler.update()
        optimiser.zero_grad(set_to_none=True)


def _check_rows(name: str, values: Tensor, rows: int) -> None:
    """ValueError unless there is one number for each row: of a mean the loop would take the mean again."""
    if values.shape != (rows,):
        raise ValueError(f"updates: {name} of {rows} rows must have one number for each, and has shape {tuple(values.shape)}")
