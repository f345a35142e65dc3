"""The one loop: sample, score, learn, again. It is a generator of metrics; whoever iterates logs, draws or stops."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from scoreaction.algorithms._learner import Algorithm, Judge, Learner, Setting, Update
from scoreaction.checkpoints import RunFolder, load_tree, save_tree, write_whole
from scoreaction.conditions import take
from scoreaction.evaluation import Evaluation, ExactTask, diversity, measure, measure_kl
from scoreaction.export import save_model
from scoreaction.kl import chain_kl, path_kl
from scoreaction.model import Model
from scoreaction.rewards import CountedReward, RewardError
from scoreaction.rollout import Experience, Sampler
from scoreaction.types import RewardFunction

NO_GRADIENT = "check that the network's output depends on them, and that nothing detaches it"


class TrainingError(RuntimeError):
    """Training cannot go on: no gradient reaches the trained parameters, or a number is not finite."""


class Train(BaseModel):
    """How long and how fast: iterations, trajectories an iteration, learning rate, seed, device, averages, checkpoints.

    max_rows is the largest batch of one network call (guidance doubles it); optimizer adam8bit keeps the policy's Adam in 8
    bits, for full fine-tuning on a GPU; held_out_rows how many samples an iteration the
    held-out rewards and diversity are measured on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    iterations: int = Field(300, ge=1)
    batch: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adam", "adam8bit"] = "adam"
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: bool = True
    ema_decay: float = Field(0.99, gt=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    max_rows: int = Field(4096, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    held_out_rows: int = Field(64, ge=2)


class Finetuner:
    """Fine-tunes a model on a reward: iterate over it, one dict of metrics an iteration.

    reward: `fn(samples, conditions) -> (batch,)`, a plain function (black-box) or a `Reward`. prompts: what samples are
    conditioned on, drawn uniformly. output: the run folder, None writes nothing. held_out: rewards that are only reported.
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
    ) -> None:
        self.sampler, self.train, self.evaluation = sampler or Sampler(), train or Train(), evaluation or Evaluation()
        self.algorithm, self.recipe = algorithm, recipe
        self.accelerator = Accelerator(cpu=self.train.device == "cpu")
        if self.accelerator.num_processes > 1:
            raise ValueError("train.device: one process trains; start scoreaction without a distributed launcher")
        self.model = model.to(self.accelerator.device if self.train.device == "auto" else self.train.device)
        device = self.model.device.type
        # not accelerate's: its precision is one for the whole process, and a second tuner may want another
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.train.precision]
        self.model.autocast = nullcontext if dtype is None else partial(torch.autocast, device, dtype=dtype)
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        if dtype != torch.float16 and any(p.dtype == torch.float16 for p in self.model.net.parameters()):
            raise ValueError(
                "train.precision: gradients through fp16 weights vanish unless they are scaled; set it to fp16, or the weights'"
                " model.dtype to bf16"
            )
        self.model.max_rows = self.train.max_rows
        self.model.net.eval()  # dropout would make the ratio of the first pass differ from 1
        self.reward = CountedReward(reward)
        self.held_out = {name: CountedReward(judge, name=f"held_out.{name}") for name, judge in (held_out or {}).items()}
        self.prompts = list(prompts) if prompts is not None else None
        if self.prompts is not None and not self.prompts:
            raise ValueError("prompts: the list is empty; give at least one prompt, or null for none")
        self.folder = RunFolder(output) if output is not None else None
        self.iteration, self.seconds, self.between = 0, 0.0, True
        self.generator = torch.Generator().manual_seed(self.train.seed)
        self.sampler.find()
        self.sampler.times(model.process)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            if self.sampler.negative_prompt is not None:
                if self.prompts is None:
                    raise ValueError("sampler.negative_prompt: there are no prompts to set it against; give prompts, or null")
                model.null = model.conditions([self.sampler.negative_prompt])
            self.conditions = model.conditions(self.prompts)
            self.learner: Learner = algorithm.build(self._setting())
        self.learner.networks.to(self.model.device)
        self.optimisers: dict[str, torch.optim.Optimizer] = {"policy": self._policy_optimiser()}
        for name, network in self.learner.networks.items():
            self.optimisers[name] = _adam(network.parameters(), self.learner.lr[name])
        self._board: Any = None

    def _policy_optimiser(self) -> torch.optim.Optimizer:
        parameters = self.model.parameters.values()
        if self.train.optimizer == "adam":
            return _adam(parameters, self.train.lr)
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError('train.optimizer: adam8bit needs the package bitsandbytes: pip install "scoreaction[adam8bit]"')
        if self.model.device.type != "cuda":
            raise ValueError(
                f"train.optimizer: adam8bit runs on a GPU only, and train.device is {self.model.device.type}; use adam"
            )
        from bitsandbytes.optim import Adam8bit

        return Adam8bit(list(parameters), lr=self.train.lr, eps=1e-12)

    def _setting(self) -> Setting:
        judge = Judge(self._score, self.reward.differentiable)
        return Setting(self.model, self.sampler, judge, self.train.batch, self.train.max_rows, self.conditions)

    def _score(self, x0: Tensor, rows: Tensor) -> Tensor:
        """The reward of x0 for the trajectories `rows` of this iteration."""
        prompts = None if self.prompts is None else [self.prompts[int(self._groups[int(i)])] for i in rows]
        scores = self.reward(self.model.decode(x0), prompts)
        if torch.is_grad_enabled() and self.reward.differentiable and not scores.requires_grad:
            raise RewardError(
                f"{self.reward.name}: says it is differentiable, and no gradient reaches the samples; keep the graph in it, or"
                " leave differentiable out"
            )
        return scores

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.iteration < self.train.iterations:
            began = time.perf_counter()
            self.between = False
            metrics = self._iterate()
            self.iteration += 1
            self.between = True
            self.seconds += time.perf_counter() - began
            metrics = {"iteration": self.iteration, **metrics, **self._counts()}
            if self.folder is not None:
                self._log(metrics)
                if self.iteration % self.train.checkpoint_every == 0 or self.iteration == self.train.iterations:
                    self.checkpoint()
            yield metrics

    def _iterate(self) -> dict[str, Any]:
        experience, prompts = self._collect()
        experience = self.learner.prepare(experience, self.generator)
        metrics = {"reward_mean": float(experience.rewards.mean()), "reward_std": float(experience.rewards.std())}
        metrics |= self._kl(experience)
        metrics |= self._learn(self.learner.updates(experience, self.generator))
        self.learner.adapt_beta(metrics["kl_nats"])
        if self.train.ema:
            self.model.average_weights(min(self.train.ema_decay, (1 + self.iteration) / (10 + self.iteration)))
        metrics |= {name: value for name, value in self.learner.state.items() if isinstance(value, float)}
        return metrics | self._watch(experience, prompts)

    def _collect(self) -> tuple[Experience, list[Any] | None]:
        """Prompts, trajectories and their rewards."""
        batch, each = self.train.batch, self.train.samples_per_prompt
        kinds = 1 if self.prompts is None else len(self.prompts)
        drawn = torch.randint(kinds, (math.ceil(batch / each),), generator=self.generator)
        self._groups = drawn.repeat_interleave(each)[:batch]
        conditions = take(self.conditions, self._groups)
        rollout = self.learner.explore(conditions, batch, self.generator)
        prompts = None if self.prompts is None else [self.prompts[int(g)] for g in self._groups]
        with torch.no_grad():
            rewards = self.reward(self.model.decode(rollout.x0), prompts)
        return Experience(rollout, rewards, conditions, self._groups.to(rewards.device)), prompts

    def _kl(self, experience: Experience) -> dict[str, float]:
        difference, times = experience.difference(), experience.rollout.times
        eta = self.sampler.eta or 1.0  # a deterministic sampler has no path KL: that of the same scores at eta 1
        return {
            "kl_nats": float(path_kl(self.model.process, times, difference, eta).mean()),
            "kl_chain_nats": float(chain_kl(self.model.process, times, difference, eta).mean()),
        }

    def _learn(self, updates: Iterator[Update]) -> dict[str, float]:
        """Backward and step for each loss; the mean of each metric, and the policy's mean gradient norm."""
        seen: dict[str, list[float]] = {}
        rate = self._rate()
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = rate * (self.train.lr if name == "policy" else self.learner.lr[name])
        for update in updates:
            for name, value in update.metrics.items():
                seen.setdefault(name, []).append(value)
            if not update.loss.requires_grad:
                raise TrainingError(f"iteration {self.iteration + 1}: the {update.network} received no gradient; {NO_GRADIENT}")
            self.scaler.scale(update.loss).backward()
            if update.step:
                norm = self._step(update.network)
                if update.network == "policy" and math.isfinite(norm):
                    seen.setdefault("grad_norm", []).append(norm)
        if "grad_norm" not in seen:  # nothing to learn from (all rewards equal, fp16 overflowed): said in the log, not an error
            return {"grad_norm": 0.0, "skipped": 1.0}
        if not any(seen["grad_norm"]):
            raise TrainingError(f"iteration {self.iteration + 1}: the trained parameters received no gradient; {NO_GRADIENT}")
        return {name: sum(values) / len(values) for name, values in seen.items()}

    def _step(self, name: str) -> float:
        optimiser = self.optimisers[name]
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self.scaler.unscale_(optimiser)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.train.max_grad_norm if name == "policy" else 1e9))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise TrainingError(f"iteration {self.iteration + 1}: the gradient of the {name} is not finite; lower train.lr")
        self.scaler.step(optimiser)  # with fp16 a step whose gradient overflowed is left out, and the scale lowered
        self.scaler.update()
        optimiser.zero_grad(set_to_none=True)
        return norm

    def _rate(self) -> float:
        """The schedule's factor: cosine from 1 to 0.01 over the run."""
        if self.train.schedule == "constant":
            return 1.0
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.iteration / self.train.iterations))

    @torch.no_grad()
    def _watch(self, experience: Experience, prompts: list[Any] | None) -> dict[str, float]:
        """Diversity and held-out rewards of some of this iteration's samples."""
        n = min(self.train.held_out_rows, self.train.batch)
        samples = self.model.decode(experience.rollout.x0[:n])
        some = None if prompts is None else prompts[:n]
        distance, vendi = diversity(self.model, samples, experience.groups[:n])
        judged = {f"held_out.{name}": float(judge(samples, some).mean()) for name, judge in self.held_out.items()}
        return {"diversity": distance, "vendi": vendi, **judged}

    def _counts(self) -> dict[str, Any]:
        return {
            "reward_queries": self.reward.queries,
            "model_evaluations": self.model.evaluations.forward,
            "model_backward_rows": self.model.evaluations.backward,
            "seconds": round(self.seconds, 3),
        }

    def _log(self, metrics: dict[str, Any]) -> None:
        assert self.folder is not None
        self._write_recipe()
        with self.folder.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self._board is None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder.tensorboard), purge_step=self.iteration)
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, self.iteration)

    def _write_recipe(self) -> None:
        assert self.folder is not None
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if self.recipe is not None:  # rewritten: a resumed run may have grown
            write_whole(self.folder.recipe_path, self.recipe)

    def state(self) -> dict[str, Any]:
        """All that changes: what a resumed run needs to equal the uninterrupted one."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "policy": dict(self.model.parameters.items()),
            "average": self.model.average,
            "networks": self.learner.networks.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "learner": self.learner.state,
            "generator": self.generator.get_state(),
            "scaler": self.scaler.state_dict(),
            "queries": self.reward.queries,
            "evaluations": [self.model.evaluations.forward, self.model.evaluations.backward],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` took."""
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        with torch.no_grad():
            for name, parameter in self.model.parameters.items():
                parameter.copy_(state["policy"][name])
        average = state["average"]
        self.model.average = None if average is None else {k: v.to(self.model.device) for k, v in average.items()}
        self.learner.networks.load_state_dict(state["networks"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.learner.state = state["learner"]
        self.generator.set_state(state["generator"])
        self.scaler.load_state_dict(state["scaler"])
        self.reward.queries = state["queries"]
        self.model.evaluations.forward, self.model.evaluations.backward = state["evaluations"]

    def checkpoint(self) -> bool:
        """Saves the state, keeping the newest two; False in the middle of an iteration, whose state is of no use."""
        if self.folder is None or not self.between:
            return False
        self._write_recipe()
        if self._board is not None:
            self._board.flush()
        save_tree(self.folder.checkpoints / f"{self.iteration:06d}", self.state())
        from shutil import rmtree

        for old in self.folder.saved_checkpoints()[:-2]:
            rmtree(old)
        return True

    def resume(self) -> bool:
        """Continues from the newest checkpoint; False where there is none."""
        newest = self.folder.newest_checkpoint() if self.folder is not None else None
        if self.folder is None or newest is None:
            if self.folder is not None:
                self.folder.cut_metrics(0)
            return False
        self.load_state(load_tree(newest))
        self.folder.cut_metrics(self.iteration)
        return True

    def save(self, path: str | Path) -> Path:
        """Writes the averaged weights, the recipe and the summary of what they are into a folder; `load` reads it."""
        return save_model(self.model, self.sampler, Path(path), recipe=self.recipe)

    def summary(self) -> dict[str, Any]:
        """Measures base and tuned model from the same noise; with a folder also writes summary.json, samples/ and model/."""
        chosen = self.evaluation
        sampler = chosen.sampler(self.sampler)
        counts, queries = self._counts(), self.reward.queries
        figures: dict[str, Any] = {"iterations": self.iteration}
        for kind in ("base", "tuned"):
            found, samples = measure(
                self.model, sampler, self.reward, self.held_out,
                n=chosen.n, prompts=self.prompts, seed=chosen.seed, reference=kind == "base", chunk=self._chunk(),
            )  # fmt: skip
            figures |= {_named(name, kind): value for name, value in found.items()}
            if self.folder is not None:
                self._save_samples(kind, samples)
        self.reward.queries = queries  # measuring is not training
        figures |= measure_kl(self.model, sampler, chosen.n, self.prompts, chosen.seed, max_rows=self.train.max_rows)
        beta = chosen.beta or self.learner.beta
        task = ExactTask.of(self.model, self.reward.reward, beta)
        if task is not None:
            figures |= task.figures(self.model, sampler, chosen.n, chosen.seed)
        figures |= {"beta": beta, **counts}
        if self.folder is not None:
            self._write_recipe()
            write_whole(self.folder.summary_path, json.dumps(figures, indent=2) + "\n")
            self.save(self.folder.model)
        return figures

    def _chunk(self) -> int:
        """Rows of one sampling call: as many as fit a modest memory."""
        return max(16, min(8192, 2**21 // math.prod(self.model.shape)))

    def _save_samples(self, kind: str, samples: Tensor) -> None:
        assert self.folder is not None
        self.folder.samples.mkdir(parents=True, exist_ok=True)
        kept = samples[: 4096 if samples.ndim == 2 else 100].cpu().numpy()
        arrays = {"samples": kept}
        if self.prompts is not None:
            arrays["prompts"] = np.array([str(self.prompts[i % len(self.prompts)]) for i in range(len(kept))])
        np.savez_compressed(self.folder.samples / f"{kind}.npz", **arrays)  # type: ignore[arg-type]


def _named(name: str, kind: str) -> str:
    """`reward` of the base is `reward_base`, its standard error `reward_base_se`."""
    return f"{name.removesuffix('_se')}_{kind}_se" if name.endswith("_se") else f"{name}_{kind}"


def _adam(parameters: Any, lr: float) -> torch.optim.Adam:
    """Adam with an eps far below the scale of any gradient, so that steps do not depend on the reward's units."""
    chosen = list(parameters)
    if not chosen:
        raise ValueError("the network has no trainable parameters; unfreeze some, or set lora_rank")
    return torch.optim.Adam(chosen, lr=lr, eps=1e-12, fused=True)
