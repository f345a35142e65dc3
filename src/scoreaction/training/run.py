"""A run: its parts, checked and put together, and its state, which checkpoints keep."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.algorithms._learner import Algorithm, Learner
from scoreaction.algorithms._setting import Objective, Setting
from scoreaction.networks.model import Model
from scoreaction.networks.sharding import class_of, networks, shard
from scoreaction.rewards import CountedReward, Reward
from scoreaction.sampling.known import check_known
from scoreaction.sampling.replay import Replay
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steer import check_steered
from scoreaction.sampling.steering import Steering
from scoreaction.training.best_weights import Selection, check_metric
from scoreaction.training.budget import Budget
from scoreaction.training.checks import (
    check_objects,
    check_parts,
    check_precision,
    check_shard,
    check_siblings,
    check_signal,
    check_whole,
    device_of,
    listed,
)
from scoreaction.training.clusters import clusters_of, settle_kept
from scoreaction.training.collector import Collector
from scoreaction.training.evaluation import Evaluation, check_certificate
from scoreaction.training.examples import Unread, settled
from scoreaction.training.export import described, save_model
from scoreaction.training.identity import identity
from scoreaction.training.late import Late, check_delay, check_late_room
from scoreaction.training.online import Online, Rounds
from scoreaction.training.optimizer import ROWS, Optimisation, Train
from scoreaction.training.rehearsal import Demand, measuring_demand
from scoreaction.training.run_folder import Journal, RunFolder
from scoreaction.training.run_state import RunState
from scoreaction.training.trackers import check_trackers
from scoreaction.types import DTYPES, Conditions, Pairs, RewardFunction, Samples, Values
from scoreaction.world import World
from scoreaction.yaml_text import dump_yaml, parse_yaml


class Run(RunState):
    """The parts of a run, checked and put together; a `Finetuner` trains them, and their summary is measured at the end."""

    def __init__(
        self,
        model: Model,
        *,
        reward: RewardFunction | Callable[[Tensor, Any], Tensor],
        algorithm: Algorithm,
        sampler: Sampler | None = None,
        train: Train | None = None,
        prompts: Sequence[Any] | None = None,
        output: str | Path | None = None,
        evaluation: Evaluation | None = None,
        held_out: dict[str, RewardFunction] | None = None,
        recipe: str | None = None,
        online: Online | None = None,
        steer: Steering | None = None,
        data: Pairs | Samples | Unread | None = None,
    ) -> None:
        check_objects(model=model, algorithm=algorithm, sampler=sampler, train=train, evaluation=evaluation)
        check_objects(held_out=held_out, online=online, steer=steer)
        if model.moves_noise and not algorithm.moves_noise:
            raise ValueError("algorithm.name: this model's policy moves noise, which only hypernoise trains; build it again")
        model.moves_noise = algorithm.moves_noise
        self.sampler, self.train = sampler or Sampler(**model.sampling), train or Train()
        self.evaluation = evaluation or Evaluation.of(model)
        if self.evaluation.held_out:
            raise ValueError("evaluation.held_out: names rewards in a recipe; here give them as held_out={name: reward}")
        self.algorithm, self.recipe, self.online = algorithm, recipe, online
        self.model, self.world = model, World.joined(self.train.device)
        self._place()
        self.reward = CountedReward(reward)
        self.held_out = {name: CountedReward(judge, name=f"held_out.{name}") for name, judge in (held_out or {}).items()}
        self.prompts = listed(prompts)
        check_parts(model, self.sampler, self.train, self.prompts, self.world)
        if not isinstance(data, Unread):  # of a run that only measures and draws
            check_signal(model, algorithm)
        self.clusters = None if self.evaluation.clusters is None else clusters_of(self.evaluation.clusters, model)
        self.kept = output is not None
        """True if the run has a folder: the first process of the world writes it, and it alone has `folder`."""
        self.folder = RunFolder(output) if output is not None and self.world.leads else None
        check_trackers(self.train.trackers)
        self.journal = None if self.folder is None else Journal(self.folder, self.train.trackers)
        self.rounds: Rounds | None = None
        if online is not None:
            queries = None if self.folder is None else self.folder.queries_path
            self.rounds = Rounds(online, self.train.iterations, self.model, self.reward, self.prompts, queries, self.world)
        self.count_questions(None if output is None else RunFolder(output))
        check_metric(self.train.select, self.held_out, key="train.select")
        self.selection = None if self.train.select is None else Selection(self.train.select)
        self.iteration, self.seconds = 0, 0.0
        self.generator = torch.Generator().manual_seed(self.train.seed)
        self.sampler = self.sampler.settled(model, self.algorithm.largest_ratio)
        self._check_samplers()
        self._choose_prompts()
        self._check_samplers()  # a policy that chooses prompts takes fewer of them
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            self.conditions = self._conditions()
            self.collector = Collector(model, self.sampler, self.train, self.reward, self.rounds, self.prompts, self.world)
            self.learner: Learner = model.learner(self.algorithm, self._setting(data))
            self._check_learner()
            self.late = Late(self.train, self.collector, self.world)
        if self.evaluation.certificate:
            check_certificate(model)
        self.steering = None if steer is None else self._settled(steer)
        self._check_budget()
        self.learner.networks.to(self.model.device)
        self._share([net for net in self.learner.networks.values() if not isinstance(net, Replay)])
        networks = {name: self.learner.networks[name] for name in self.learner.lr}
        self.optimisation = Optimisation(
            self.train, self.model, networks, self.learner.lr, scaled=self.train.precision == "fp16", world=self.world
        )
        self.settings = settings_text(self) if recipe is None and self.kept else ""
        model.guidance, model.grid, model.prompts = self.sampler.guidance, self.sampler.grid, self.prompts
        model.off_below = self.sampler.acts_from

    def _check_samplers(self) -> None:
        """ValueError where the model takes the sampler of training or that of the measurement not."""
        self.sampler.check(self.model)
        try:
            self.evaluation.sampler(self.sampler).check(self.model)  # refused now, and not after training
        except ValueError as error:
            raise ValueError(f"evaluation.{str(error).removeprefix('sampler.')}") from error

    def _lead_away(self) -> None:
        """Makes guidance lead away from the sampler's negative prompt, where it has one."""
        if self.sampler.negative_prompt is not None:
            if self.prompts is None:
                raise ValueError("sampler.negative_prompt: there are no prompts to set it against; give prompts, or null")
            self.model.lead_away_from(self.sampler.negative_prompt, guidance=self.sampler.guidance)

    def _conditions(self) -> Conditions:
        """The conditions of the prompts, with which the network has been tried."""
        conditions = self.model.conditions(self.prompts)
        if self.model.encode is not None:  # one without was tried when it was built
            self.model.try_net(conditions)
        return conditions

    def _setting(self, data: Pairs | Samples | Unread | None) -> Setting:
        """The parts that the learner is given."""
        batch, reward = self.train.batch, self.collector
        objective = Objective(reward.score, reward.objective.differentiable, reward.at_once)
        group = min(batch, max(self.train.samples_per_prompt, batch / len(self.prompts or [None])))
        examples = settled(data, self.algorithm, self.model, self.prompts)
        parts = (self.model, self.sampler, objective, batch, self.conditions, group, self.world)
        return Setting(*parts, self.train.reward_delay, self.prompts, examples)

    def _check_learner(self) -> None:
        """ValueError where the learner does not go with the other parts."""
        online = self.online is not None
        check_siblings(self.train, self.learner)
        settle_kept(self.reward.reward, self.algorithm, self.learner.beta, online=online)
        name = getattr(self.algorithm, "name", type(self.algorithm).__name__)
        check_delay(self.train, self.learner, algorithm=name, online=online)
        check_late_room(self.train, self.sampler, self.model, self.world)

    def _choose_prompts(self) -> None:
        """Gives the model what its policy chooses prompts by, where it is one that does."""
        if self.model.chooser is not None:
            raise ValueError("algorithm.name: this model's policy chooses prompts and is trained already; build it again")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            self._lead_away()
            config = self.algorithm
            if self.kept or self.recipe is None:  # else it is only tried: planned, examined or drawn from
                self.algorithm = config.settled(self.model, self.sampler, self.prompts, seed=self.train.seed, world=self.world)
            self.has_answers = self.algorithm is not config
            """True if others were asked, whose answer is kept before anything can fail."""
            torch.manual_seed(self.train.seed)  # whatever a writer of one's own drew
            chooser = self.algorithm.chooser(self.model, self.prompts)
        if chooser is not None:
            self.model.choose_prompts(chooser)
            self._share([chooser])

    def count_questions(self, folder: RunFolder | None) -> None:
        """Counts every question to the oracle of a run with a budget, in that folder or in memory."""
        self.budget: Budget | None = None
        if self.online is not None and self.online.budget is not None:
            path = None if folder is None else folder.asked_path
            self.budget = Budget(self.online.budget, path, shared=self.world.size > 1)
            self.reward.spend = self.budget.spend

    def before_asking(self) -> None:
        """Puts on the disk what must be there when the oracle is asked: whose the answers are, and the count of questions."""
        self.write_recipe()
        if self.budget is not None and self.rounds is not None and self.world.leads:
            self.budget.begin(len(self.rounds.log.records))

    def measuring(self) -> dict[str, Demand]:
        """The demand of the measurement at the end, by part."""
        return measuring_demand(
            self.model.process, self.evaluation, self.evaluation.sampler(self.sampler), steering=self.steering,
            prompts=self.prompts, differentiable=self.reward.differentiable, size=self.model.size,
        )  # fmt: skip

    def _check_budget(self) -> None:
        if self.budget is not None and self.online is not None:
            queries = {name: part.queries for name, part in self.measuring().items() if part.queries}
            self.budget.check_plan(sum(self.online.rounds), queries, self.evaluation.n)

    def _settled(self, steer: Steering) -> Steering:
        sampler = self.evaluation.sampler(self.sampler)
        check_steered(self.model)
        try:
            check_known(self.model, steer.known)
            return steer.settled(differentiable=self.reward.differentiable, sampler=sampler, beta=self.beta)
        except ValueError as error:
            raise ValueError(str(error).replace("sampler.", "evaluation.")) from error

    def _place(self) -> None:
        """Puts the model on its device, in its precision, with the rows of its calls."""
        model = self.model
        device = device_of(self.train)
        if self.train.shard:  # from the host, block by block: no device ever holds a whole network
            check_shard(self.train, self.world)
            check_whole(model)
            self._share(networks(model))
            shard(model, self.world, device)
        model.to(device)
        if not self.train.shard:
            self._share(networks(model))
        # not accelerate's: its precision is one for the whole process, and a second tuner may want another
        dtype = DTYPES[self.train.precision]
        model.autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, model.device.type, dtype=dtype)
        check_precision(model, self.train.precision)
        model.max_rows = self.train.max_rows or model.max_rows or ROWS
        model.net.eval()  # dropout would make the ratio of the first pass differ from 1

    def _share(self, nets: Sequence[nn.Module]) -> None:
        """All processes begin with the first one's weights: nothing says that a script seeded them alike."""
        shared = {id(value): value for net in nets for value in [*net.parameters(), *net.buffers()]}
        self.world.share(shared.values())

    @property
    def beta(self) -> float:
        """The beta of the optimum that is measured against: `evaluation.beta`, else the algorithm's own as it is now."""
        return self.evaluation.beta or self.learner.beta

    @property
    def half(self) -> bool:
        """True if the network works in half precision, by its weights or by the run's setting."""
        halves = (torch.bfloat16, torch.float16)
        return self.train.precision != "fp32" or any(p.dtype in halves for p in self.model.net.parameters())

    def write_recipe(self) -> None:
        """Writes the run's recipe into its folder, or its settings where it was started from Python without one."""
        if self.journal is not None:
            self.journal.describe(self.recipe, self.settings)

    def identity(self) -> Values:
        """Settings and shapes that another part of this run has in common with it, as JSON gives them back."""
        text = self.recipe or re.sub(r" at 0x[0-9a-f]+", "", self.settings or settings_text(self))
        shapes = {name: list(p.shape) for name, p in self.model.parameters.items()}
        return json.loads(json.dumps(identity(parse_yaml(text, where="settings"), shapes)))

    def save(self, path: str | Path) -> Path:
        """Writes the averaged weights, the model's description and the recipe into a folder; `load` reads it.

        All processes of a sharded run must call it; the first one writes.
        """
        return save_model(self.model, self.sampler, self.prompts, Path(path), recipe=self.recipe)


def settings_text(run: Run) -> str:
    """Settings of a run without a recipe, in a recipe's form, with names for what only Python has."""
    values = {
        "model": {"name": class_of(run.model.net).__name__, **described(run.model)},
        "reward": {"name": _name_of(run.reward.reward)},
        "algorithm": {"name": type(run.algorithm).__name__, **run.algorithm.model_dump()},
        "sampler": run.sampler.model_dump(mode="json"),
        "train": run.train.model_dump(mode="json"),
        "prompts": None if run.prompts is None else [str(prompt) for prompt in run.prompts],
        "evaluation": {**run.evaluation.model_dump(mode="json"), "held_out": [{"name": name} for name in run.held_out]},
        "online": None if run.online is None else run.online.model_dump(mode="json"),
        "steer": None if run.steering is None else run.steering.model_dump(mode="json"),
    }
    return dump_yaml(json.loads(json.dumps(values, default=str)))


def _name_of(reward: RewardFunction) -> str:
    own = reward.fn if isinstance(reward, Reward) else reward
    name = getattr(own, "__name__", type(own).__name__)
    return "reward" if name == "<lambda>" else name
