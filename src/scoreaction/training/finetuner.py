"""The one loop: sample, score, learn, again. It is a generator of metrics; whoever iterates logs, draws or stops."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from scoreaction.algorithms._learner import Algorithm, Learner, Objective, Setting
from scoreaction.algorithms._likelihood_ratio import spread_is_rounding
from scoreaction.diffusion.kl import chain_kl, path_kl
from scoreaction.networks.model import Model
from scoreaction.rewards import CountedReward, RewardError
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.sampling.rollout import Rollout, Sampler
from scoreaction.training.best_weights import Selection, check_metric
from scoreaction.training.checkpoints import load_tree, save_tree
from scoreaction.training.collector import Collector, check_finite
from scoreaction.training.evaluation import Evaluation, diversity, rounding_floor
from scoreaction.training.export import save_model
from scoreaction.training.online import Online, Rounds
from scoreaction.training.optimizer import Optimisation, Train, call_rows
from scoreaction.training.run_folder import RunFolder
from scoreaction.training.run_log import Journal
from scoreaction.training.summary import settings_text, summarise
from scoreaction.types import RewardFunction


def _listed(prompts: Sequence[Any] | None) -> list[Any] | None:
    if isinstance(prompts, str):
        raise ValueError(f"prompts: must be a list of prompts (got {prompts!r}); one prompt is [{prompts!r}]")
    listed = None if prompts is None else list(prompts)
    if listed == []:
        raise ValueError("prompts: the list is empty; give at least one prompt, or null for none")
    return listed


class Finetuner:
    """Fine-tunes a model on a reward: iterate over it, one dict of metrics an iteration.

    reward: `fn(samples, conditions) -> (batch,)`, a plain function (black-box) or a `Reward`. prompts: what samples are
    conditioned on, drawn uniformly, or by its weight where one is a `Prompt`. output: the run folder, None writes nothing.
    held_out: rewards that are only reported. online: the reward is an oracle, asked in rounds; training follows a proxy of it.
    ValueError, with the remedy, where the algorithm's needs are not met; TrainingError or RewardError where it fails.

    >>> import scoreaction as sa
    >>> model = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    >>> tuner = Finetuner(model, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), train=Train(iterations=1, batch=8))
    >>> [metrics["iteration"] for metrics in tuner]
    [1]
    """

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
    ) -> None:
        self.sampler, self.train, self.evaluation = sampler or Sampler(), train or Train(), evaluation or Evaluation()
        if self.evaluation.held_out:
            raise ValueError("evaluation.held_out: names rewards in a recipe; here give them as held_out={name: reward}")
        self.algorithm, self.recipe, self.online = algorithm, recipe, online
        self.model, dtype = model, self._placed(model)
        self.reward = CountedReward(reward)
        self.held_out = {name: CountedReward(judge, name=f"held_out.{name}") for name, judge in (held_out or {}).items()}
        self.prompts = _listed(prompts)
        taught = model.consistency_guidance
        if self.prompts is not None and taught not in (None, self.sampler.guidance):
            raise ValueError(
                f"model.consistency: was distilled at guidance {taught:g}, and sampler.guidance is {self.sampler.guidance:g};"
                " make them equal, or distill again"
            )
        self.folder = RunFolder(output) if output is not None else None
        self.journal = None if self.folder is None else Journal(self.folder)
        self.rounds: Rounds | None = None
        if online is not None:
            queries = None if self.folder is None else self.folder.queries_path
            self.rounds = Rounds(online, self.train.iterations, self.model, self.reward, self.prompts, queries)
        check_metric(self.train.select, self.held_out, key="train.select")
        self.selection = None if self.train.select is None else Selection(self.train.select)
        self.iteration, self.seconds, self.between, self.owns_folder = 0, 0.0, True, False
        self.generator = torch.Generator().manual_seed(self.train.seed)
        self.sampler.find()
        try:
            self.evaluation.sampler(self.sampler).find()  # said now, and not after training
        except ValueError as error:
            raise ValueError(f"evaluation.{str(error).removeprefix('sampler.')}") from error
        self.sampler.times(model.process)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            if self.sampler.negative_prompt is not None:
                if self.prompts is None:
                    raise ValueError("sampler.negative_prompt: there are no prompts to set it against; give prompts, or null")
                model.lead_away_from(self.sampler.negative_prompt, guidance=self.sampler.guidance)
            self.conditions = model.conditions(self.prompts)
            self.collector = Collector(self.model, self.sampler, self.train, self.reward, self.rounds, self.prompts)
            self.learner: Learner = algorithm.build(self._setting())
        self.learner.networks.to(self.model.device)
        networks = {name: self.learner.networks[name] for name in self.learner.lr}
        self.optimisation = Optimisation(self.train, self.model, networks, self.learner.lr, scaled=dtype == torch.float16)
        self.settings = settings_text(self) if recipe is None and output is not None else ""
        model.guidance, model.grid, model.prompts = self.sampler.guidance, self.sampler.grid, self.prompts

    def _placed(self, model: Model) -> torch.dtype | None:
        """Puts the model on its device, in its precision, with the rows of its calls; the dtype of autocast."""
        accelerator = Accelerator(cpu=self.train.device == "cpu")
        if accelerator.num_processes > 1:
            raise ValueError("train.device: one process trains; start scoreaction without a distributed launcher")
        model.to(accelerator.device if self.train.device == "auto" else self.train.device)
        # not accelerate's: its precision is one for the whole process, and a second tuner may want another
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.train.precision]
        model.autocast = nullcontext if dtype is None else partial(torch.autocast, model.device.type, dtype=dtype)
        if dtype != torch.float16 and any(p.dtype == torch.float16 for p in model.net.parameters()):
            raise ValueError(
                "train.precision: gradients through fp16 weights vanish unless they are scaled; set it to fp16, or the weights'"
                " model.dtype to bf16"
            )
        model.max_rows = call_rows(self.train, model)
        model.net.eval()  # dropout would make the ratio of the first pass differ from 1
        return dtype

    @property
    def half(self) -> bool:
        """True if the network works in half precision, by its weights or by the run's setting."""
        halves = (torch.bfloat16, torch.float16)
        return self.train.precision != "fp32" or any(p.dtype in halves for p in self.model.net.parameters())

    def _setting(self) -> Setting:
        reward = Objective(self.collector.score, self.collector.objective.differentiable)
        return Setting(self.model, self.sampler, reward, self.train.batch, self.conditions)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._folder_held():
            yield from self._iterations()

    @contextmanager
    def _folder_held(self) -> Iterator[None]:
        """The folder, if there is one, kept from other runs; ValueError where it is another's."""
        if self.folder is None:
            yield
            return
        with self.folder.locked():
            if not self.owns_folder and self.folder.exists:
                raise ValueError(
                    f"output: {self.folder.path} already holds a run; go on with it by resume(), or name another folder"
                )
            self.owns_folder = True
            yield

    def _iterations(self) -> Iterator[dict[str, Any]]:
        while self.iteration < self.train.iterations:
            began = time.perf_counter()
            self.between = False
            metrics = self._iterate()
            self.iteration += 1
            self.between = True
            self.seconds += time.perf_counter() - began
            metrics = {"iteration": self.iteration, **metrics, **self.counts()}
            if self.journal is not None:
                self.write_recipe()
                self.journal.log(metrics)
                if self.iteration % self.train.checkpoint_every == 0 or self.iteration == self.train.iterations:
                    self.checkpoint()
            yield metrics

    def _iterate(self) -> dict[str, Any]:
        if self.rounds is not None and self.rounds.due(self.iteration):
            self.write_recipe()  # so that the answers are known to be this run's
            draw = partial(self.collector.samples, self.learner, generator=self.generator)
            self.rounds.query(draw, self.train.batch, self.generator)
        rollout, watched = self._collect()
        if self.half and self.learner.state.kl_floor is None:
            self.learner.state.kl_floor = rounding_floor(self.model, self.sampler, self.conditions, rollout, self.train.seed)
        metrics = {"reward_mean": float(rollout.rewards.mean()), "reward_std": float(rollout.rewards.std())}
        metrics |= self._kl(rollout)
        equal = spread_is_rounding(rollout.rewards)
        metrics |= self.optimisation.learn(self.learner.updates(rollout, self.generator), self.iteration, equal=equal)
        self.learner.adapt_beta(metrics["kl_nats"])
        decay = min(self.train.ema_decay, (1 + self.iteration) / (10 + self.iteration)) if self.train.ema else 0.0
        if self.train.ema:
            self.model.average_weights(decay)
        metrics |= {name: value for name, value in vars(self.learner.state).items() if isinstance(value, float)}
        metrics |= {} if self.rounds is None else self.rounds.figures
        metrics |= watched
        chosen = self.selection
        # diversity is not among them where no prompt came twice
        if chosen and chosen.metric in metrics and chosen(metrics[chosen.metric], self.iteration + 1, decay):
            self.model.select_weights()
        return metrics

    def _collect(self) -> tuple[Rollout, dict[str, float]]:
        """Trajectories with all that is asked of them before anything is learned, and what is only watched in them.

        Where a reward fails nothing is learned yet: the iteration is taken back, and what was learned before is saved.
        """
        evaluations = self.model.evaluations
        before, counted, queries = self.generator.get_state(), replace(evaluations), self.reward.queries
        try:
            rollout = self.collector.rollout(self.learner, self.generator, self.iteration)
            watched = self._watch(rollout)
            return self.learner.prepare(rollout, self.generator), watched
        except RewardError:
            self.generator.set_state(before)
            evaluations.forward, evaluations.backward, self.reward.queries = counted.forward, counted.backward, queries
            self.between = True
            if self.iteration > 0:
                self.checkpoint()
            raise

    def _kl(self, rollout: Rollout) -> dict[str, float]:
        difference, times = rollout.difference(), rollout.times
        eta = self.sampler.eta or 1.0  # a deterministic sampler has no path KL: that of the same scores at eta 1
        kl = {"kl_nats": path_kl, "kl_chain_nats": chain_kl}
        nats = {name: measure(self.model.process, times, difference, eta).mean() for name, measure in kl.items()}
        check_finite("KLs", torch.stack([*nats.values()]), self.iteration)
        return {name: float(value) for name, value in nats.items()}

    @torch.no_grad()
    def _watch(self, rollout: Rollout) -> dict[str, float]:
        """Diversity and held-out rewards of some of this iteration's samples."""
        n = min(self.train.held_out_rows, self.train.batch)
        samples, prompts = self.model.decode(rollout.x0[:n]), self.collector.texts(rollout.prompt[:n])
        judged = {f"held_out.{name}": float(judge(samples, prompts).mean()) for name, judge in self.held_out.items()}
        return {**diversity(self.model, samples, rollout.prompt[:n]), **judged}

    def counts(self) -> dict[str, Any]:
        """Costs so far: reward queries, rows of network evaluations forwards and backwards, seconds."""
        return {
            "reward_queries": self.reward.queries,
            "model_evaluations": self.model.evaluations.forward,
            "model_backward_rows": self.model.evaluations.backward,
            "seconds": round(self.seconds, 3),
        }

    def write_recipe(self) -> None:
        """Writes the run's recipe into its folder, or its settings where it was started from Python without one."""
        if self.journal is not None:
            self.journal.describe(self.recipe, self.settings)

    def state(self) -> dict[str, Any]:
        """All that changes: what a resumed run needs to equal the uninterrupted one."""
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "policy": dict(self.model.parameters.items()),
            "average": self.model.average,
            "networks": self.learner.networks.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisation.optimisers.items()},
            "learner": vars(self.learner.state),
            "generator": self.generator.get_state(),
            "scaler": self.optimisation.scaler.state_dict(),
            "queries": self.reward.queries,
            "moments": self.reward.reward.moments if isinstance(self.reward.reward, WeightedSum) else None,
            "evaluations": [self.model.evaluations.forward, self.model.evaluations.backward],
        }
        if self.rounds is not None:
            state["rounds"] = self.rounds.state()
        if self.selection is not None:
            state["selection"] = self.selection.state(self.model.selected)
        return state

    def load_weights(self, state: dict[str, Any]) -> None:
        """Puts back the model's part of what `state` took: all that drawing needs."""
        with torch.no_grad():
            for name, parameter in self.model.parameters.items():
                parameter.copy_(state["policy"][name])
        for name, kept in (("average", state["average"]), ("selected", state.get("selection", {}).get("weights"))):
            setattr(self.model, name, None if kept is None else {k: v.to(self.model.device) for k, v in kept.items()})

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` took."""
        self.load_weights(state)
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.learner.networks.load_state_dict(state["networks"])
        for name, optimiser in self.optimisation.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.learner.state = replace(self.learner.state, **state["learner"])
        self.generator.set_state(state["generator"])
        self.optimisation.scaler.load_state_dict(state["scaler"])
        self.reward.queries = state["queries"]
        if isinstance(self.reward.reward, WeightedSum):
            self.reward.reward.moments = state["moments"]
        self.model.evaluations.forward, self.model.evaluations.backward = state["evaluations"]
        if self.rounds is not None:
            self.rounds.load_state(state["rounds"])
        if self.selection is not None:
            self.selection.load_state(state["selection"])

    def checkpoint(self) -> bool:
        """Saves the state, keeping the newest two; False in the middle of an iteration, whose state is of no use."""
        if self.folder is None or self.journal is None or not self.between:
            return False
        with self._folder_held():
            self.write_recipe()
            self.journal.flush()
            save_tree(self.folder.checkpoints / f"{self.iteration:06d}", self.state())
            for old in self.folder.saved_checkpoints()[:-2]:
                shutil.rmtree(old)
        return True

    def resume(self) -> bool:
        """Continues from the newest checkpoint; False where there is none, and the run starts afresh."""
        self.owns_folder = True
        with self._folder_held():
            newest = self.folder.newest_checkpoint() if self.folder is not None else None
            if self.rounds is not None:
                self.rounds.resume()
            if newest is not None:
                self.load_state(load_tree(newest))
            if self.folder is not None:
                self.folder.cut_metrics(self.iteration)
        return newest is not None

    def save(self, path: str | Path) -> Path:
        """Writes the averaged weights, the recipe and the summary of what they are into a folder; `load` reads it."""
        return save_model(self.model, self.sampler, self.prompts, Path(path), recipe=self.recipe)

    def summary(self) -> dict[str, Any]:
        """Measures base and tuned model from the same noise; with a folder also writes summary.json, samples/ and model/."""
        with self._folder_held():
            return summarise(self)
