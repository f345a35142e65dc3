"""The one loop: sample, score, learn, again. It is a generator of metrics; whoever iterates logs, draws or stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._likelihood_ratio import spread_is_rounding
from scoreaction.networks.weights import Evaluations
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.sampling.draw import no_samples
from scoreaction.sampling.rollout import Rollout
from scoreaction.training.checkpoints import load_newest, load_tree, prune, save_tree
from scoreaction.training.clusters import cluster_figures
from scoreaction.training.collector import check_finite
from scoreaction.training.errors import GradientError
from scoreaction.training.evaluation import diversity, rounding_floor
from scoreaction.training.run import Run
from scoreaction.training.summary import summarise
from scoreaction.world import OtherProcess, Stranded


class Finetuner(Run):
    """Fine-tunes a model on a reward: iterate over it, one dict of metrics an iteration.

    reward: `fn(samples, prompts) -> (batch,)`, a plain function (black-box) or a `Reward`. prompts: what samples are
    conditioned on, drawn uniformly, or by its weight where one is a `Prompt`. output: the run folder, None writes nothing.
    held_out: rewards that are only reported. online: the reward is an oracle, asked in rounds; training follows a proxy of it.
    data: what algorithms without a reward learn from, `Pairs` or `Samples`.
    ValueError, with the remedy, where the algorithm's needs are not met; TrainingError or RewardError where it fails.

    >>> import scoreaction as sa
    >>> model = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    >>> tuner = Finetuner(model, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), train=sa.Train(iterations=1, batch=8))
    >>> [metrics["iteration"] for metrics in tuner]
    [1]
    """

    between = True
    """False within an iteration, whose state is of no use to a checkpoint."""
    owns_folder = False
    """True once the folder is known to hold this run and no other."""
    saved: Path | None = None
    """The checkpoint that holds the state as it is, where there is one."""
    collected = False
    """True once all processes have the iteration's samples and rewards."""
    updating = False
    """True once the iteration's updates have begun."""
    before: tuple[Tensor, list[Any], Evaluations, int, dict[str, Any]]
    """The state an iteration is taken back to: of the generator, batches that wait, evaluations, queries, the selection."""
    spread = 1.0
    """The standard deviation of the first rewards, those of the pretrained model, where this process has seen them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self._locked():
            yield from self._iterations()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks the folder, if there is one; ValueError where it holds another run."""
        with ExitStack() as stack:
            self.world.together(partial(self._lock, stack))
            yield

    def _lock(self, stack: ExitStack) -> None:
        if self.folder is None:
            return
        stack.enter_context(self.folder.locked())
        if not self.owns_folder and self.folder.exists:
            raise ValueError(
                f"output: {self.folder.path} already holds a run; go on with it by resume(), or name another folder"
            )
        self.owns_folder = True
        if self.has_answers:
            self.write_recipe()

    def _iterations(self) -> Iterator[dict[str, Any]]:
        while self.iteration < self.train.iterations:
            began = time.perf_counter()
            self.between = False
            try:
                metrics = self._iterate()
            except GradientError as error:
                raise error.explained(self.spread) from error
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
        with self._taken_back():
            return self._iteration()

    def _iteration(self) -> dict[str, Any]:
        rollout, measured = self._collect()
        if rollout is None:
            return {"skipped": 1.0, **measured}
        if self.half and self.learner.state.kl_floor is None:
            self.learner.state.kl_floor = rounding_floor(
                self.model,
                self.sampler,
                self.conditions,
                rollout,
                self.train.seed,
                rows=min(4, self.train.batch),
                world=self.world,
            )
        self._select(measured)
        metrics = {name: measured[name] for name in ("reward_mean", "reward_std")} | self._kl(rollout)
        # without a spread there is nothing to learn; of data there is not once every pair is told apart
        equal = self.learner.data is not None or spread_is_rounding(self.world.gather(rollout.rewards))
        self.updating = True
        updates, floor = self.learner.updates(rollout, self.generator), self.learner.kl_floor
        metrics |= self.optimisation.learn(updates, self.iteration, equal=equal, kl_floor=floor, learner=self.learner)
        self.learner.updated()
        self.learner.adapt_beta(metrics["kl_nats"])
        if self.train.ema:
            self.model.average_weights(self._decay(self.iteration))
        metrics |= {name: value for name, value in vars(self.learner.state).items() if isinstance(value, float)}
        metrics |= {} if self.rounds is None else self.rounds.figures
        return metrics | measured

    def _decay(self, iteration: int) -> float:
        """The decay of the averages after this iteration (from 0)."""
        return min(self.train.ema_decay, (1 + iteration) / (10 + iteration)) if self.train.ema else 0.0

    def _select(self, measured: dict[str, float]) -> None:
        """Keeps the weights where the samples that they have drawn are the best so far, but not the pretrained ones.

        Before the update, whose weights no sample has shown yet.
        """
        chosen, learned = self.selection, self.iteration - self.train.reward_delay
        # diversity is not among the metrics where no prompt came twice
        if chosen is None or learned < 1 or chosen.metric not in measured:
            return
        if chosen(measured[chosen.metric], self.iteration, self._decay(self.iteration - 1)):
            self.model.select_weights()

    @contextmanager
    def _taken_back(self) -> Iterator[None]:
        """Takes an iteration back that fails before any network moved, and saves what was learned before it.

        But not that of a policy that diverged, nor where the other processes cannot know of the failure.
        """
        self._mark()
        self.collected = self.updating = self.optimisation.moved = False
        try:
            yield
        except Exception as error:
            kinds = error.kinds if isinstance(error, OtherProcess) else [kind.__name__ for kind in type(error).__mro__]
            # until all is collected a failure is that of every process; later that of a reward is
            if (
                isinstance(error, Stranded)
                or "TrainingError" in kinds
                or self.optimisation.moved
                or (self.updating and not self.learner.asks_in_its_update)
                or (self.collected and "RewardError" not in kinds)
            ):
                raise
            state, waiting, evaluations, queries, chosen = self.before
            if self.selection is not None:
                self.selection.load_state(chosen)
            if isinstance(self.reward.reward, WeightedSum):
                self.reward.reward.forget()
            self.generator.set_state(state)
            self.late.waiting = waiting
            counted = self.model.evaluations
            counted.forward, counted.backward, self.reward.queries = evaluations.forward, evaluations.backward, queries
            self.between = True
            if self.iteration > 0:
                self.checkpoint()
            raise

    def _mark(self) -> None:
        """Notes what an iteration is taken back to."""
        state, counted = self.generator.get_state(), replace(self.model.evaluations)
        chosen = {} if self.selection is None else self.selection.state(None)
        self.before = state, [*self.late.waiting], counted, self.reward.queries, chosen

    def _collect(self) -> tuple[Rollout | None, dict[str, float]]:
        """Trajectories complete for learning, None while no rewards are due, and the metrics of the new samples."""
        if self.rounds is not None and self.rounds.due(self.iteration):
            self.world.together(self.before_asking)
            self.rounds.query(partial(self.collector.samples, self.learner), self.train.batch, self.generator)
            self._mark()  # a round is not taken back
        rollout: Rollout | None
        if self.late.delay:
            fresh = self.late.add(self.learner, self.generator, self.iteration)
            rollout = self.late.due()
        else:
            fresh = rollout = self.collector.rollout(self.learner, self.generator, self.iteration)
        measured = self._measure(fresh)
        if rollout is not None:
            every = self.world.gather(rollout.rewards)
            if self.iteration == 0:  # later it is also the policy's doing
                self.spread = float(every.double().std())
            measured = {"reward_mean": float(every.mean()), "reward_std": float(every.std()), **measured}
            again = partial(self.collector.again, rollout, self.generator, self.iteration)
            rollout, figures = self.learner.redraw(rollout, again)
            measured |= figures
        self.collected = True
        return None if rollout is None else self.learner.prepare(rollout, self.generator), measured

    def _kl(self, rollout: Rollout) -> dict[str, float]:
        both = zip(("kl_nats", "kl_chain_nats"), self.learner.kls(rollout), strict=True)
        nats = {name: self.world.gather(own).mean() for name, own in both}
        check_finite("KLs", torch.stack([*nats.values()]), self.iteration)
        return {name: float(value) for name, value in nats.items()}

    @torch.no_grad()
    def _measure(self, rollout: Rollout) -> dict[str, float]:
        """Diversity, held-out rewards and, where there are clusters, their entropy, of some of this iteration's samples."""
        n, world = min(self.train.held_out_rows, self.train.batch), self.world
        own = len(world.stripe(n))

        def judged() -> tuple[Tensor, list[Tensor]]:
            if not own:  # fewer samples than processes
                return no_samples(self.model), [torch.empty(0, device=self.model.device) for _ in self.held_out]
            samples, prompts = self.model.decode(rollout.x0[:own]), self.collector.texts(rollout.prompt[:own])
            if self.clusters is not None:
                counts.add_(self.clusters.assign(samples, self.model, rollout.x0[:own]).bincount(minlength=len(counts)).cpu())
            return samples, [reward(samples, prompts) for reward in self.held_out.values()]

        counts = torch.zeros(0 if self.clusters is None else len(self.clusters), dtype=torch.long)
        samples, scores = world.together(judged)
        groups = world.gather(rollout.prompt)[:n]
        rewards = [float(world.gather(values, n).mean()) for values in scores]
        names = [f"held_out.{name}" for name in self.held_out]
        figures = {**diversity(self.model, samples, groups, world=world), **dict(zip(names, rewards, strict=True))}
        if self.clusters is not None:
            figures["cluster_entropy"] = cluster_figures(counts, world)["cluster_entropy"]
        return figures

    def checkpoint(self) -> bool:
        """Saves the state, keeping the newest two; False in the middle of an iteration, whose state is of no use."""
        if not self.kept or not self.between:
            return False
        with self._locked():
            state = self.state()
            self.world.together(partial(self._write_checkpoint, state))
        return True

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        if self.folder is None or self.journal is None:
            return
        self.write_recipe()
        self.journal.flush()
        path, run = self.folder.checkpoints / f"{self.iteration:06d}", self.identity()
        if path != self.saved or not path.exists():
            save_tree(path, state, run)
            self.saved = path
        prune([old for old in self.folder.saved_checkpoints() if int(old.name) <= self.iteration], run)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        return None if self.folder is None else load_newest(self.folder.saved_checkpoints(), self.identity())

    def resume(self) -> bool:
        """Continues from the newest undamaged checkpoint; False where there is none, and the run starts afresh.

        UserError where the checkpoint is of a run with other settings or shapes, or all are damaged.
        """
        self.owns_folder = True
        with self._locked():
            newest = self.world.together(self._newest)
            path = self.world.broadcast(None if newest is None else newest[0])
            if path is not None:
                newest = self.world.together(lambda: newest if self.world.leads else (path, load_tree(path)))
            if self.rounds is not None:
                self.world.together(self.rounds.log.read)
                self.rounds.log.records = self.world.broadcast(self.rounds.log.records)
            if newest is not None:
                self.saved, state = newest
                self.load_state(state)
            if self.folder is not None:
                self.folder.clear_parts()
                self.folder.cut_metrics(self.iteration)
        return newest is not None

    def summary(self, progress: Callable[[str], None] = lambda done: None) -> dict[str, Any]:
        """Measures base and tuned model from the same noise; with a folder also writes summary.json, samples/ and model/."""
        with self._locked():
            return summarise(self, progress)
