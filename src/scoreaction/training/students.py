"""Students: the tuned policy in a few steps, a model again, that lands where the teacher's ODE does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import softplus

from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.solvers import ddim_step, time_grid
from scoreaction.networks.adapters import replaced
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic
from scoreaction.networks.model import Model
from scoreaction.sampling.sampler import Sampler, act
from scoreaction.settings import Settings
from scoreaction.training.distillation import fitted, follow
from scoreaction.training.runge_kutta import RungeKutta
from scoreaction.types import Prediction
from scoreaction.world import ALONE, World

R1 = 0.05
"""Weight of the discriminator's squared gradient at the teacher's states."""
OWN_FROM = 2 / 3
"""Share of the training after which the student starts each step where its last one ended."""


class Student(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of a student: its steps, its training, and the teacher's ODE paths that it learns from.

    steps: evaluations a sample. paths: of the teacher an iteration, each of about `teacher_steps` steps. adversarial: weight of
    a discriminator's opinion beside the squared error, 0 is none. optimizer: adam, or Runge-Kutta of order 1, 2 or 4 on
    student and discriminator together. max_rows: the largest batch of one network call. of: the run whose policy it is made
    of, which `distill` writes; a recipe that has it describes a student.
    """

    steps: int = Field(4, ge=1, le=1000)
    iterations: int = Field(500, ge=1)
    paths: int = Field(32, ge=1)
    teacher_steps: int = Field(64, ge=1, le=10_000)
    lr: float = Field(2e-3, gt=0)
    ema: float = Field(0.99, ge=0, lt=1)
    adversarial: float = Field(0.0, ge=0)
    optimizer: Literal["adam", "rk1", "rk2", "rk4"] = "adam"
    critic_lr: float = Field(2e-3, gt=0)
    seed: int = Field(0, ge=0, lt=2**32)
    max_rows: int = Field(4096, ge=1)
    of: Path | None = None

    @model_validator(mode="after")
    def _fewer(self) -> Student:
        if self.steps > self.teacher_steps:
            raise ValueError(f"steps: a student has no more than its teacher, whose teacher_steps are {self.teacher_steps}")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """The one sampler that a student is made for."""
        return {"solver": "ddim", "steps": self.steps, "eta": 0.0, "grid": "power"}


class StudentDistiller:
    """Makes a model's policy a student of itself: iterate over it, one dict of metrics an iteration.

    The teacher is the averaged policy as it is now, guidance and all, along its ODE (DPM-Solver++ 2M at eta 0, prompts at
    random): a stochastic teacher's noise and picture are all but independent. The student starts with its weights and takes
    `steps` DDIM steps y_k at eta 0, without guidance, and learns
    `sum_k ||y_k - x_{k+1}||^2/(alpha^2 v + sigma^2)`, x_k the teacher's states at the same times and v the variance of
    their ends; in the last third each step starts where its last one ended. With `adversarial` also
    `softplus(-D(x_k, y_k, t_k))`, D a network of a critic's size that tells y_k from x_{k+1}, with R1 at the latter (Mescheder
    et al. 2018, arXiv 1801.04406); at its optimum D's loss is `2 log 2 - 2 JS`. Adversarial distillation: arXiv 2405.20675,
    whose teacher is stochastic and whose students see no squared error. ValueError for tokens, which have no ODE.

    >>> import scoreaction as sa
    >>> model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    >>> student = StudentDistiller(model, sa.Student(steps=2, iterations=2, teacher_steps=4), sa.Sampler())
    >>> [metrics["iteration"] for metrics in student]
    [1, 2]
    >>> sa.sample(model, n=3).shape  # by default the student's own two steps
    torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Model,
        settings: Student,
        sampler: Sampler,
        *,
        prompts: Sequence[Any] | None = None,
        world: World = ALONE,
    ) -> None:
        model.refuse_tokens("a student, whose teacher is an ODE,")
        if model.moves_noise:
            raise ValueError("student: this policy moves the noise, and its steps are the pretrained model's; distill that")
        if model.chooser is not None:
            raise ValueError("student: this policy chooses prompts, and its steps are the pretrained model's; distill that")
        if settings.paths % world.size:
            raise ValueError(f"student.paths: {settings.paths} are not shared evenly by {world.size} processes")
        if settings.optimizer != "adam" and world.size > 1:
            raise ValueError(f"student.optimizer: {settings.optimizer} is for one process; take adam")
        self.model, self.settings, self.world = model, settings, world
        self.sampler = sampler if sampler.off_below is not None else sampler.model_copy(update={"off_below": model.off_below})
        self.prompts = None if prompts is None else list(prompts)
        self.conditions = model.conditions(self.prompts)
        self.generator = torch.Generator().manual_seed(settings.seed)
        own = model.selected or model.average or model.parameters
        self.teacher = {name: value.detach().clone() for name, value in own.items()}
        self.guidance = 1.0 if model.true_cfg is None else sampler.guidance
        self.times = time_grid(model.process, settings.steps, name="power")
        self.inner = -(-settings.teacher_steps // settings.steps)
        self.iteration, self.variance = 0, 1.0
        for name, p in model.parameters.items():
            p.data.copy_(self.teacher[name])
        model.average = model.selected = None
        model.student, model.guidance, model.off_below, model.grid = settings.sampling, self.guidance, 0.0, "power"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            shape = (2 * model.shape[0], *model.shape[1:])
            self.critic = Critic(model.process, shape, skip="none", conditions=self.conditions).to(model.device)
        self.critic_optimiser = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_lr, betas=(0.5, 0.99))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        settings, parameters = self.settings, self.model.parameters
        average = {name: p.detach().clone() for name, p in parameters.items()}
        game = None if settings.optimizer == "adam" else self._game()
        fixed: dict[str, Any] = {"lr": settings.lr, "ema": settings.ema, "world": self.world, "key": "student"}
        yield from fitted(parameters, average, self._learned, iterations=settings.iterations, game=game, **fixed)

    def teach(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        """The teacher's prediction: that of the policy as it was, guided."""
        with replaced(self.model.parameters, self.teacher):
            return act(self.model, self.sampler, x, t, self.conditions, prompt=prompt)

    @torch.no_grad()
    def paths(self, n: int, source: RowNoise, prompt: Tensor) -> list[Tensor]:
        """The teacher's states at the student's times from n starts, (n, *shape) each."""
        fine = time_grid(self.model.process, self.inner * self.settings.steps, name="power")
        start = self.model.start(n, self.model.noise(source, self.conditions, prompt))
        return list(follow(partial(self.teach, prompt=prompt), self.model.process, start, fine)[:: self.inner])

    def step(self, x: Tensor, k: int, prompt: Tensor) -> Tensor:
        """The student's step from x at its k-th time to the next one."""
        t, s = self.times[k], self.times[k + 1]
        prediction = self.model.predict(x, t, self.conditions, prompt=prompt, guidance=self.guidance)
        return ddim_step(self.model.process, prediction, t, s, 0.0).mean

    def _batch(self) -> tuple[list[Tensor], Tensor]:
        """Paths of this iteration, of this process, and the numbers of their prompts."""
        paths, prompt = self.settings.paths, torch.zeros(self.settings.paths, dtype=torch.long)
        if self.prompts is not None:
            prompt = torch.randint(len(self.prompts), (paths,), generator=self.generator)
        source = RowNoise.drawn(self.generator, self.world.stripe(paths))
        prompt = self.world.own(prompt)
        states = self.paths(len(prompt), source, prompt)
        if self.iteration == 0:
            self.variance = self.world.reduced([float(states[-1].double().var())])[0]
        self.iteration += 1
        return states, prompt

    def _starts(self, states: list[Tensor], prompt: Tensor) -> list[Tensor]:
        """The start of each step: on the teacher's path, in the last third where the student's last step ended."""
        if self.iteration <= OWN_FROM * self.settings.iterations:
            return states[:-1]
        starts = states[:1]
        with torch.no_grad():
            for k in range(self.settings.steps - 1):
                starts.append(self.step(starts[-1], k, prompt))
        return starts

    def _learned(self) -> float:
        """Accumulates the gradient of an iteration's loss, after a step of the discriminator, and returns that loss."""
        states, prompt = self._batch()
        starts = self._starts(states, prompt)
        if self.settings.adversarial:
            self._criticise(starts, states, prompt)
        total, rows = 0.0, torch.arange(len(prompt))
        for k in range(self.settings.steps):
            for part in rows.split(self.settings.max_rows):
                share = len(part) / len(rows)
                loss = share * self._loss(k, *(take(x, part) for x in (starts[k], states[k + 1], prompt)))
                loss.backward()
                total += loss.item()
        return total

    def _loss(self, k: int, x: Tensor, target: Tensor, prompt: Tensor) -> Tensor:
        """The mean loss of the k-th step, over `steps`."""
        y, s = self.step(x, k, prompt), self.times[k + 1]
        weight = 1 / (self.model.process.alpha(s) ** 2 * self.variance + self.model.process.sigma2(s))
        loss = float(weight) * (y - target).square().mean()
        if self.settings.adversarial:
            loss = loss + self.settings.adversarial * softplus(-self.judge(x, y, k, prompt)).mean()
        return loss / self.settings.steps

    def judge(self, x: Tensor, y: Tensor, k: int, prompt: Tensor) -> Tensor:
        """The discriminator's opinion of y as what follows x at the k-th time, (rows,): high for the teacher's."""
        return self.critic(torch.cat([x, y], 1), self.times[k].expand(len(x)), prompt)

    def critic_loss(self, k: int, x: Tensor, y: Tensor, target: Tensor, prompt: Tensor) -> Tensor:
        """`softplus(-D(x_k, x_{k+1})) + softplus(D(x_k, y)) + R1 ||grad D(x_k, x_{k+1})||^2`, a mean."""
        target = target.detach().requires_grad_(True)
        real = self.judge(x, target, k, prompt)
        (gradient,) = torch.autograd.grad(real.sum(), target, create_graph=True)
        penalty = R1 * gradient.flatten(1).square().sum(1)
        return (softplus(-real) + softplus(self.judge(x, y, k, prompt)) + penalty).mean()

    def _criticise(self, starts: list[Tensor], states: list[Tensor], prompt: Tensor) -> None:
        """One Adam step of the discriminator."""
        self.critic_optimiser.zero_grad(set_to_none=True)
        for k in range(self.settings.steps):
            with torch.no_grad():
                y = self.step(starts[k], k, prompt)
            self.critic_loss(k, starts[k], y, states[k + 1], prompt).backward()
        self.world.average_gradients(self.critic.parameters(), [])
        self.critic_optimiser.step()

    def _game(self) -> Any:
        """A step of student and discriminator together: `game(share)`, share that of the rate, gives the student's loss."""
        players: dict[str, list[nn.Parameter]] = {"student": list(self.model.parameters.values())}
        rates = {"student": self.settings.lr}
        if self.settings.adversarial:
            players["critic"], rates["critic"] = list(self.critic.parameters()), self.settings.critic_lr
        order: Any = int(self.settings.optimizer[2:])
        solver = RungeKutta(players, rates, order=order)

        def game(share: float) -> float:
            states, prompt = self._batch()
            starts = self._starts(states, prompt)

            def losses() -> dict[str, Tensor]:
                steps = [(k, starts[k], states[k + 1], prompt) for k in range(self.settings.steps)]
                known = {"student": torch.stack([self._loss(*step) for step in steps]).sum()}
                if self.settings.adversarial:
                    opinions = [self.critic_loss(k, x, self.step(x, k, p).detach(), y, p) for k, x, y, p in steps]
                    known["critic"] = torch.stack(opinions).sum()
                return known

            solver.lr = {name: share * rate for name, rate in rates.items()}
            return solver.step(losses)["student"]

        return game
