"""The part of a model that depends on the kind of its states: numbers with Gaussian noise, and what a network says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.kl import chain_kl, path_kl
from scoreaction.diffusion.noise import PaddedNoise, Source, kept
from scoreaction.diffusion.predictions import Predicts, known_from, mapped, projected, to_prediction
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import Solver
from scoreaction.networks.adapters import Role
from scoreaction.networks.conditions import map_conditions, take
from scoreaction.networks.prompt_chooser import PromptChooser
from scoreaction.types import Conditions, Predict, Prediction

Guesses = Callable[[Tensor, Tensor, Prediction], Tensor]
"""Clean samples `guesses(rows, x, prediction) -> (rows, draws, *shape)` that states x lead to; rows are their numbers."""


class GaussianStates:
    """States x (batch, *shape) between data at t = 0 and Gaussian noise at t = 1; a model of another kind overrides these."""

    process: Process
    predicts: Predicts
    shape: tuple[int, ...]
    project: Callable[..., Tensor] | None
    mask: Callable[[Conditions], Tensor] | None
    double: bool
    """True if the network's weights are in float64."""
    net: nn.Module
    invert: Callable[[Tensor], Tensor]
    student: dict[str, Any]
    """The sampler of a student, which is made for that one alone; empty of any other model."""
    causal = False
    """True of tokens each of which is predicted from those before it."""
    letters: str | None = None
    """Characters that stand for tokens in reports, None for their numbers."""
    moves_noise = False
    """True if the policy moves the noise that samples start from, and its steps are the pretrained model's."""

    chooser: PromptChooser | None

    @property
    def steps_alone(self) -> bool:
        """True if the policy is a network of steps, as other libraries know them, and nothing beside it."""
        return not self.moves_noise and self.chooser is None

    def known_from(self, ratio: float) -> float:
        """The time below which the pretrained model acts where `sampler.off_below` is not set: `predictions.known_from`."""
        if not self.steps_alone:
            return 0.0
        time = known_from(self.process, self.predicts, ratio)
        if time >= 1:
            raise ValueError(
                f"sampler.off_below: alpha/sigma is above {ratio:g} at all times of this process, whose data must be small;"
                " set the time below which the pretrained model acts, 0 for none"
            )
        return time

    def _check_kind(self, process: Process, predicts: Predicts) -> None:
        """ValueError unless process and output are of this kind of model, and go together."""
        if not isinstance(process, Process):
            raise ValueError(f"process: must be one such as sa.VP() (got {process!r})")
        to_prediction(process, predicts, torch.zeros(1), torch.full((), 0.5, dtype=torch.float64), torch.zeros(1))
        if predicts in ("eps", "score") and float(process.alpha(torch.ones((), dtype=torch.float64))) == 0:
            raise ValueError(
                f"predicts: {predicts} says nothing of the sample at t = 1, where alpha of {type(process).__name__} is 0;"
                " use a network that predicts velocity, v or x0"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of a sampler that suit its kind, over those of `Sampler`: of a student its own."""
        return self.student or ({"eta": 0.0} if self.moves_noise else {})  # noise on the way forgets that of the start

    @property
    def size(self) -> int:
        """Numbers in one tensor of the prediction at one state."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def start(self, n: int, source: Source) -> Tensor:
        """n states at t = 1, (n, *shape)."""
        return self.process.start((n, *self.shape), source).to(self.device)

    def refuse_solver(self, name: str) -> None:
        """UserError for a solver of its kind of states that this network cannot follow."""

    def stream(self, role: Role, conditions: Conditions, prompt: Tensor, guidance: float) -> Predict | None:
        """Predictions along paths from left to right, as `MaskedModel.stream`; None where nothing is kept between them."""
        return None

    def guesses(self, n: int, draws: int | None, source: Source) -> Guesses:
        """The clean samples by which look-aheads judge n states: x0 of the prediction."""
        return lambda rows, x, prediction: prediction.x0[:, None]

    def example(self, n: int, generator: torch.Generator) -> Tensor:
        """n clean samples of any values, (n, *shape), to try rewards on."""
        return torch.randn(n, *self.shape, generator=generator).to(self.device)

    @torch.no_grad()
    def clean(self, samples: Tensor) -> Tensor:
        """Samples of data, as rewards see them, before decoding: (n, *shape) on the CPU. ValueError where they do not fit."""
        x0 = self.invert(self._checked_data(samples).to(self.device)).cpu()
        if x0.shape[1:] != self.shape:
            raise ValueError(
                f"samples of shape {tuple(samples.shape[1:])} become {tuple(x0.shape[1:])}, and the model's are {self.shape}"
            )
        return x0

    def _checked_data(self, samples: Tensor) -> Tensor:
        """Samples in the model's own type; ValueError for values that it cannot have."""
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("its samples must be finite numbers")
        return samples.to(torch.float64 if self.double else torch.float32)

    def refuse_tokens(self, what: str) -> None:
        """UserError for `what`, which needs Gaussian states, where the model's are tokens."""

    def learner(self, algorithm: Any, setting: Any) -> Any:
        """The learner that an algorithm builds for this kind of model."""
        return algorithm.build(setting)

    def kls(
        self, solver: Solver, times: Tensor, x: Tensor, policy: Prediction, reference: Prediction, eta: float
    ) -> tuple[Tensor, Tensor]:
        """Path and chain KL of a policy to a reference on a solver's grid, in nats, (batch,) each.

        times (N+1,); x (N, batch, *shape) are the states; both predictions are at those.
        """
        difference = mapped(torch.sub, policy, reference)
        return path_kl(self.process, times, difference, eta), chain_kl(self.process, times, difference, eta)

    def _nothing(self, x: Tensor) -> Prediction:
        """The prediction for no rows."""
        return Prediction(x, x)

    def inside(self, conditions: Conditions) -> Tensor | None:
        """True at the numbers of each row's sample and False in its padding, (rows, ...); None without a mask."""
        if self.mask is None:
            return None
        if conditions is None:
            raise ValueError("prompts: this model's mask is made of conditions, and there are none; give prompts")
        inside = self.mask(conditions).bool()
        missing = len(self.shape) + 1 - inside.ndim
        if missing < 0 or any(size not in (1, whole) for size, whole in zip(inside.shape[1:], self.shape, strict=False)):
            shape = tuple(inside.shape)
            raise ValueError(f"mask: must be (rows, ...) with the first dimensions of a sample, {self.shape}, and is {shape}")
        return inside.reshape(*inside.shape, *[1] * missing)

    def noise(self, source: Source, conditions: Conditions, prompt: Tensor | None = None) -> Source:
        """The source of the noise of samples: 0 in their padding. conditions and prompt are as in `predict`."""
        inside = self.inside(conditions)
        return source if inside is None else PaddedNoise(source, inside if prompt is None else take(inside, prompt))

    def _prediction(self, x: Tensor, t: Tensor, y: Tensor, inside: Tensor | None) -> Prediction:
        """The prediction that an output of the network means at (x, t)."""
        return self.projected(t, to_prediction(self.process, self.predicts, x, t, kept(y.to(x.dtype), inside)), inside)

    def projected(self, t: Tensor, prediction: Prediction, inside: Tensor | None) -> Prediction:
        """The prediction with x0 in the space of the data, `inside` as the method of that name gives it."""
        project = self.project
        if project is None:
            return prediction
        if inside is None:
            return projected(self.process, t, prediction, project)
        return projected(self.process, t, prediction, lambda x0: kept(project(x0, inside.to(x0)), inside))

    def _check_output(self, x: Tensor, y: Tensor) -> None:
        """ValueError where the network's output at x has another shape than it must."""
        if y.shape != x.shape:
            raise ValueError(f"the network returned shape {tuple(y.shape)} for x of shape {tuple(x.shape)}; they must be equal")

    def _evaluate(self, net: nn.Module, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The output of a network at (x, t); one in float64 gets all in float64, any other x and t in the dtype of x."""
        width = torch.float64 if self.double else x.dtype if x.is_floating_point() else torch.float32
        cond = map_conditions(lambda c: c.to(width) if self.double and c.is_floating_point() else c, conditions)
        try:
            y = net(x.to(width) if x.is_floating_point() else x, t.to(width), cond)
        except RuntimeError as error:
            kinds = ", ".join(sorted({str(p.dtype) for p in net.parameters()} - {str(width)}))
            if not kinds or not re.search(r"\bd?type\b", str(error)):
                raise
            raise ValueError(
                f"net: its weights are in {kinds}, and x and t come in {width} ({error}); convert them in its forward, or call"
                " net.float() before the model is built (train.precision sets half precision)"
            ) from error
        if not isinstance(y, Tensor):
            raise ValueError(
                f"net: {type(net).__name__} returned a {type(y).__name__}, not a tensor of x's shape; wrap it in a module whose"
                " forward(x, t, cond) returns its output[0], or .sample, at its own time (t is 0 at data and 1 at noise)"
            )
        self._check_output(x, y)
        return y
