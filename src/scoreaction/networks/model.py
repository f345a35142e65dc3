"""A network, its reference, its conditions, and guidance: the policy that is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.noise import kept
from scoreaction.diffusion.predictions import PredictionBuffer, Predicts
from scoreaction.diffusion.processes import Process
from scoreaction.networks.adapters import Adapters, LoraShape, Role, base_modules, frozen
from scoreaction.networks.checks import check_lora, check_net, dimensions, register
from scoreaction.networks.conditioning import Conditioning
from scoreaction.networks.conditions import concatenate, map_conditions, null_of, take
from scoreaction.networks.consistent import Consistent
from scoreaction.networks.gaussian import GaussianStates
from scoreaction.networks.labels import LabelTable
from scoreaction.networks.layers import CriticNetwork
from scoreaction.networks.likeness import Likeness, by_features
from scoreaction.networks.lockstep import equal_parts, without_rows
from scoreaction.networks.memory import fitting, is_out_of_memory
from scoreaction.networks.weights import Evaluations, Weights
from scoreaction.types import Conditions, Prediction

if TYPE_CHECKING:
    from scoreaction.diffusion.mixtures import Mixture


class Model(Weights, Consistent, Conditioning, GaussianStates):
    """A pretrained network with its process, as a policy and its frozen reference.

    `net(x, t, cond) -> tensor`: x (batch, *shape), t (batch,) in [0, 1] with 0 data and 1 noise, cond None or what
    `encode` gives. `predicts` names what comes out: x0, eps, score, v or velocity. Without `lora_rank` all parameters
    train and the reference is a frozen copy; with it LoRA layers train and the reference is the net with them off. The net is
    put in evaluation mode, now and for training: no dropout, and batch norm by its running statistics.

    `encode(prompts) -> conditions`; `null` one row of the unconditional condition, for guidance; `decode(x0) -> samples` maps
    to what rewards see (images in [0, 1]), `invert(samples) -> x0` back, for data; `features(samples) -> (batch, F)` is what
    diversity is measured in; `law` is the exact data law where it is known; `export(folder)` writes what other libraries load.
    A network that takes guidance as an input (distilled) is given `true_cfg`: `guidance` then reaches it as
    conditions["guidance"], and true_cfg weighs both halves. `project(x0)` maps x0 of every prediction into the space of the
    data: `x0.clamp(-1, 1)` of pixels, `x0 - x0.mean(1, keepdim=True)` where centres are 0. `mask(conditions) -> (batch, ...)`
    is True at the numbers that a sample has and False in its padding, of the first dimensions of a sample, as (batch, points)
    for points (points, F): there no noise is drawn, x, x0 and eps are 0, and `project` is called as `project(x0, inside)`,
    inside 1 or 0 and of the dimensions of x0. `critic(width)` builds the network of a critic, where the small one does not
    suit the samples: `net(x, t, condition) -> (batch,)`, condition (batch, width), None at width 0, without prompts.
    ValueError for an unknown `predicts`, a bad LoRA target, and a net that is called otherwise, fails at two states (tried
    where there is no `encode`), cannot be copied, has adapters of its own, or is the policy of another model.

    >>> net = lambda x, t, cond: x
    >>> class Identity(nn.Module):
    ...     def forward(self, x, t, cond): return x
    >>> from scoreaction.diffusion.processes import VP
    >>> model = Model(Identity(), process=VP(), predicts="eps", shape=(2,))
    >>> model.predict(torch.zeros(4, 2), torch.tensor(0.5)).x0.shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        process: Process,
        predicts: Predicts,
        shape: Sequence[int],
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        encode: Callable[[list[Any]], Conditions] | None = None,
        null: Conditions = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        invert: Callable[[Tensor], Tensor] | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        law: Mixture | None = None,
        true_cfg: float | None = None,
        project: Callable[..., Tensor] | None = None,
        mask: Callable[[Conditions], Tensor] | None = None,
        critic: CriticNetwork | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        self._check_kind(process, predicts)
        check_lora(lora_rank, lora_targets)
        check_net(net)
        self.net, self.process, self.predicts, self.shape = net.eval(), process, predicts, dimensions(shape)
        self.encode, self.null, self.law, self.true_cfg = encode, null, law, true_cfg
        self.project, self.export, self.critic, self.mask = project, export, critic, mask
        self.decode = decode or (lambda x0: x0)
        self.invert = invert or (_no_way_back if decode else lambda samples: samples)
        self.features = features or (lambda samples: samples.flatten(1))
        self.likeness = Likeness(by_features, 256)
        self.reference_net = frozen(net) if lora_rank is None else net
        self.double = {p.dtype for p in net.parameters()} == {torch.float64}
        self.adapters = Adapters(self.reference_net)
        self.labelled = any(isinstance(module, LabelTable) for module in net.modules())
        self.autocast: Callable[[], AbstractContextManager[None]] = nullcontext
        if encode is None and mask is None and {p.dtype for p in net.parameters()} <= {torch.float32, torch.float64}:
            self.try_net(null)  # others need prompts, or the precision of a run
        functions = {"encode": encode, "decode": decode, "project": project, "mask": mask}
        self.functions = [name for name, function in functions.items() if function is not None]
        """Functions that it was built with, which no file can hold, by the names of their arguments."""
        self.lora = None if lora_rank is None else self._add_lora(lora_rank, lora_alpha or lora_rank, lora_targets)
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        """The trained parameters by name."""
        self._prepare()
        register(self)

    def _add_lora(self, rank: int, alpha: float, targets: Sequence[str] | None) -> LoraShape:
        """Freezes the network but for label tables, and gives the policy a LoRA on the targets, or all linear layers."""
        chosen = list(targets or [name for name, m in base_modules(self.net).items() if isinstance(m, nn.Linear)])
        if not chosen:
            raise ValueError("lora_targets: the network has no linear layer; name the modules that LoRA should change")
        self.net.requires_grad_(False)
        for table in (module for module in self.net.modules() if isinstance(module, LabelTable)):
            table.requires_grad_(True)
        shape = LoraShape(rank, alpha, chosen)
        self.adapters.add("policy", shape)
        return shape

    def _prepare(self) -> None:
        """Sets as they are at first those parts that a consistency model, a run and its sampler change later."""
        self.consistency_net: nn.Module | None = None
        self.consistency_parameters: dict[str, nn.Parameter] = {}
        self.consistency_guidance: float | None = None
        self.average: dict[str, Tensor] | None = None
        self.selected: dict[str, Tensor] | None = None
        """The weights that were best by `train.select`, None without one: `averaged` then means them."""
        self.sharded = False
        """True if processes share the network: then all of them must make the same calls."""
        self.evaluations = Evaluations()
        self.max_rows: int | None = None
        """The most rows of one network call; None is all."""
        self.guidance, self.grid, self.off_below = 1.0, "power", 0.0
        self.student: dict[str, Any] = {}
        self.prompts: list[Any] | None = None
        """Guidance, grid, `off_below` and prompts of its training, which `sample` takes."""

    @classmethod
    def restored(cls, net: nn.Module, **description: Any) -> Model:
        """The model of its kind around this network, by the arguments that a file holds."""
        return cls(net, **description)

    @torch.no_grad()
    def try_net(self, conditions: Conditions) -> None:
        """Calls the network at two states, of the first row of the conditions; ValueError, with the shapes, where it fails."""
        if self.device.type == "meta":
            return
        x, t = self.example(2, torch.Generator().manual_seed(0)), torch.full((2,), 0.5, device=self.device)
        some = map_conditions(lambda c: c[[0, 0]].to(self.device), conditions)
        try:
            with self.autocast(), torch.random.fork_rng(devices=[]):
                self._evaluate(self.net, x, t, self._with_guidance(some, x, 1.0))
        except (RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            shapes = map_conditions(lambda c: tuple(c.shape), some)  # type: ignore[arg-type, return-value]
            inputs = f"x {tuple(x.shape)}, t {tuple(t.shape)} and cond {shapes}"
            remedy = "" if self.encode is not None else "; conditions come from encode= and prompts"
            cause = f"{type(error).__name__}: {error}"
            raise ValueError(f"net: {type(self.net).__name__} fails on {inputs}: {cause}{remedy}") from error

    def to(self, device: torch.device | str) -> Model:
        """Moves network, reference and averages; returns itself."""
        self.net.to(device)
        self.reference_net.to(device)
        if self.chooser is not None:
            self.chooser.to(device)
        if self.consistency_net is not None:
            self.consistency_net.to(device)
        for weights in (self.average, self.selected):
            for name, value in (weights or {}).items():
                weights[name] = value.to(device)  # type: ignore[index]
        return self

    def predict(
        self, x: Tensor, t: Tensor, conditions: Conditions = None, *, prompt: Tensor | None = None, guidance: float = 1.0
    ) -> Prediction:
        """The policy's (x0, eps) at (x, t): x (batch, *shape), t () or (batch,).

        conditions have a row for each x, or, with prompt (batch,), a row for each prompt: row i of x has the prompt[i]-th,
        which is gathered when the network is called, at most `max_rows` of them at a time where no graph is built.
        With guidance w > 1 the output is `y_null + w (y_cond - y_null)` (Ho and Salimans 2022, arXiv 2207.12598), both
        halves in one batch; at 1 and below, as in diffusers, it is y_cond. The guided prediction is the policy. Where the
        network is told labels, y_null is the pretrained model's.
        Of one that moves the noise, or chooses prompts along a path, it is the pretrained model's.
        """
        return self._predict("policy" if self.steps_alone else "reference", x, t, conditions, prompt, guidance)

    def reference(
        self, x: Tensor, t: Tensor, conditions: Conditions = None, *, prompt: Tensor | None = None, guidance: float = 1.0
    ) -> Prediction:
        """The pretrained model's (x0, eps) at (x, t), as `predict`: gradients reach x, never a parameter."""
        return self._predict("reference", x, t, conditions, prompt, guidance)

    def noise_move(self, z: Tensor, conditions: Conditions = None, *, prompt: Tensor | None = None) -> Tensor:
        """`f(z) = y_policy(z, 1) - y_reference(z, 1)`, y the network's output without guidance, (batch, *shape); 0 at first.

        z (batch, *shape) is noise of std 1; conditions and prompt as in `predict`. Gradients reach z and the policy's
        parameters. Two evaluations a row.
        """
        x, t = self.process.prior_std * z, torch.ones((), dtype=torch.float64)
        roles: tuple[Role, Role] = ("policy", "reference")
        policy, reference = (self._predict(role, x, t, conditions, prompt, 1.0, raw=True).x0 for role in roles)
        return policy - reference

    def moved(self, x: Tensor, conditions: Conditions = None, *, prompt: Tensor | None = None) -> Tensor:
        """The states at t = 1 that the policy starts from, of noise x (batch, *shape): `x + std f(x/std)` where it moves it."""
        if not self.moves_noise:
            return x
        std = self.process.prior_std
        return x + std * self.noise_move(x / std, conditions, prompt=prompt)

    def _predict(
        self,
        role: Role,
        x: Tensor,
        t: Tensor,
        conditions: Conditions,
        prompt: Tensor | None,
        guidance: float,
        *,
        raw: bool = False,
    ) -> Prediction:
        """The prediction of a role; `raw`: the network's own output in the place of both of its parts, without guidance."""
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])
        weight = self.guidance_weight(guidance)
        guided = weight != 1.0 and conditions is not None and role != "consistency" and not raw
        if guided and self.null is None:
            raise ValueError("sampler.guidance: this model has no unconditional condition; set guidance to 1 or pass null=")
        if len(x) == 0 and not self.sharded:  # of a process without rows
            return self._nothing(x)
        rows = x.shape[0] * (2 if guided else 1)
        self.evaluations.forward += rows
        graph = torch.is_grad_enabled()
        split = self.sharded and not graph
        if graph:
            self.evaluations.backward += rows
        one_call = partial(self._call, role, guidance=guidance, weight=weight if guided else 1.0, raw=raw)

        def call(x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
            return one_call(x, t, conditions) if len(x) else without_rows(one_call, x, t, conditions)

        def in_parts(limit: int) -> Prediction:
            if len(x) <= limit and not split:
                return call(x, t, conditions if prompt is None else take(conditions, prompt))
            buffer = PredictionBuffer(len(x))
            every = torch.arange(len(x))
            for part in equal_parts(every, limit) if split else every.split(limit):
                here = slice(int(part[0]), int(part[-1]) + 1) if len(part) else slice(0)
                buffer.add(call(x[here], t[here], take(conditions, part if prompt is None else prompt[here])))
            return buffer.all()

        return in_parts(len(x)) if graph else fitting(self, len(x), in_parts)

    def _call(
        self, role: Role, x: Tensor, t: Tensor, conditions: Conditions, *, guidance: float, weight: float, raw: bool
    ) -> Prediction:
        """The guided prediction of one network call; the conditions come to its device here."""
        conditions = map_conditions(lambda c: c.to(x.device), conditions)
        inside = self.inside(conditions)
        x = kept(x, inside)
        complete = self._with_guidance(conditions, x, guidance)

        with self.autocast():
            if weight == 1.0:
                y = self._output(role, x, t, complete)
            else:
                null = self._with_guidance(null_of(conditions, self.null), x, guidance)
                unconditional, conditional = self._halves(role, x, t, null, complete)
                y = unconditional + weight * (conditional - unconditional)
        if raw:
            y = kept(y.to(x.dtype), inside)
            return Prediction(y, y)
        return self._prediction(x, t, y, inside)

    def _halves(self, role: Role, x: Tensor, t: Tensor, null: Conditions, complete: Conditions) -> tuple[Tensor, Tensor]:
        """The outputs without and with the conditions, in one batch where one role gives both."""
        null_role = self.null_role(role)
        if null_role != role:
            return self._output(null_role, x, t, null), self._output(role, x, t, complete)
        both = self._output(role, torch.cat([x, x]), torch.cat([t, t]), concatenate(null, complete))
        unconditional, conditional = both.chunk(2)
        return unconditional, conditional

    def _output(self, role: Role, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The output of the network that serves a role, its adapters those of the role."""
        net = {"policy": self.net, "reference": self.reference_net, "consistency": self.consistency_net}[role]
        assert net is not None

        def output(x: Tensor) -> Tensor:
            return self._evaluate(net, x, t, conditions)

        return self.adapters.call(role, output, x) if net is self.adapters.net else output(x)


def _no_way_back(samples: Tensor) -> Tensor:
    """ValueError: of a `decode` alone no x0 can be had."""
    raise ValueError("the model decodes its samples and cannot go back; give Model(invert=...), the inverse of decode")
