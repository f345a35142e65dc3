"""Online black-box optimisation: rounds of queries to an expensive oracle, and a proxy of it that training follows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from scoreaction.diffusion.noise import RowNoise, drawn_seed
from scoreaction.disk import write_whole
from scoreaction.networks.model import Model
from scoreaction.networks.proxy import Kind, Proxy
from scoreaction.rewards import CountedReward
from scoreaction.rewards._weighted import WeightedSum, settle
from scoreaction.settings import Settings
from scoreaction.types import Values
from scoreaction.world import ALONE, World


class Online(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """The reward is an expensive oracle, asked in `rounds`; training follows a proxy that is refitted after each.

    A round draws samples of the policy as it is, asks the oracle `rounds[i]` of them, refits the proxy on every answer so
    far, and trains `iterations_per_round` iterations against it (by default all iterations are shared out evenly; what
    is left belongs to the last round). The proxy is differentiable whatever the oracle is. Policy
    and optimiser go on from round to round, and the KL is always to the pretrained model, so the optimum stays
    `p_pre exp(r/beta)/Z`. After Uehara et al. 2024 (SEIKO, arXiv 2402.16359), around any algorithm.

    optimism: how many standard deviations of the proxy's own doubt are added to its mean, below 0 taken off it; by default 1
    for `ucb`, which has its name from that, and 0 for `ensemble`.
    noise_std: Gaussian noise put on each answer, to try a loop out on a known reward. features: what the proxy sees,
    `model.features` or the samples themselves.

    budget: the most questions of a run, whoever asks: the rounds, the measurement at the end, a call that is repeated after an
    interruption. A run that it does not pay for is refused before it begins, and a question before it is asked.

    >>> sum(Online().rounds)
    1536
    """

    rounds: tuple[int, ...] = Field((256, 384, 384, 512), min_length=1)
    budget: int | None = None
    iterations_per_round: int | None = Field(None, ge=1)
    proxy: Kind = "ensemble"
    optimism: float | None = None
    noise_std: float = Field(0.0, ge=0)
    features: Literal["model", "samples"] = "model"
    members: int = Field(8, ge=2, le=1000, description="networks of the ensemble")
    hidden: int = Field(32, ge=0, le=2**14, description="width of the proxy's two hidden layers; 0 is linear in the features")

    @field_validator("rounds")
    @classmethod
    def _large_enough(cls, rounds: tuple[int, ...]) -> tuple[int, ...]:
        if min(rounds) < 8:
            raise ValueError(f"a round asks at least 8 samples, fewer say nothing of the reward (got {min(rounds)})")
        return rounds

    @field_validator("budget")
    @classmethod
    def _pays(cls, budget: int | None, info: ValidationInfo) -> int | None:
        rounds = info.data.get("rounds", ())
        if budget is not None and budget < sum(rounds):
            what = f"the first round of {rounds[0]}" if budget < rounds[0] else f"the {sum(rounds)} of all rounds"
            raise ValueError(f"{budget} queries do not pay for {what}; raise it, or ask for less in online.rounds")
        return budget

    def length(self, iterations: int) -> int:
        """Iterations of a round in a run of this many; ValueError where a round would have none.

        >>> Online(rounds=(64, 128)).length(11)
        5
        """
        count = len(self.rounds)
        each = self.iterations_per_round or max(1, iterations // count)
        if iterations <= (count - 1) * each:
            raise ValueError(
                f"train.iterations: {iterations} end before round {count} begins; raise it to {count * each}, or ask in fewer"
                " online.rounds"
            )
        return each


class QueryLog:
    """Log of the oracle's answers, a line each in queries.jsonl: round (from 1), prompt, value, features.

    Of a weighted sum also the `moments` of its parts, by which the value was made. Lines are on disk before anyone sees the
    answers. Without a path nothing is written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[Values] = []

    def read(self) -> None:
        """Takes over the answers of an interrupted run, also without a checkpoint; a line whose writing was cut off goes."""
        self.records = []
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        for number, line in enumerate(whole, 1):
            try:
                record = json.loads(line)
                own = {key: record[key] for key in ("round", "value", "features")}
                self.records.append(own | {"moments": record.get("moments")})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} line {number}: not an answer of the oracle; mend it or remove it") from error
        if len(whole) < len(lines):
            write_whole(self.path, "".join(whole))

    def add(
        self, number: int, prompts: list[Any] | None, values: Tensor, features: Tensor, moments: Tensor | None = None
    ) -> None:
        """Writes answers to disk, then remembers them: values (n,), features (n, F), moments (parts, 2) of a weighted sum."""
        more = {} if moments is None else {"moments": moments.tolist()}
        records = [
            # nine digits are a float32 to the bit
            {"round": number, "prompt": prompt, "value": value, "features": [float(f"{part:.9g}") for part in row]} | more
            for prompt, value, row in zip(
                [None] * len(values) if prompts is None else map(str, prompts), values.tolist(), features.tolist(), strict=True
            )
        ]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        self.records += records

    def upto(self, number: int) -> tuple[Tensor, Tensor]:
        """Features (n, F) and values (n,) of the rounds up to this one."""
        known = [record for record in self.records if record["round"] <= number]
        return torch.tensor([record["features"] for record in known]), torch.tensor([record["value"] for record in known])


class Rounds:
    """Rounds of queries to the oracle, by `query`; as a reward it is the proxy."""

    differentiable = True
    rows = None
    name = "online.proxy"

    def __init__(
        self,
        config: Online,
        iterations: int,
        model: Model,
        oracle: CountedReward,
        prompts: list[Any] | None,
        queries: Path | None,
        world: World = ALONE,
    ) -> None:
        self.config, self.model, self.oracle, self.prompts, self.world = config, model, oracle, prompts, world
        self.length = config.length(iterations)
        self.log = QueryLog(queries)
        self.round = 0
        self.figures: dict[str, float] = {}
        self.progress: Callable[[str], None] = lambda done: None
        """Told what is asked, as it goes."""
        # a prompt given twice is one to the proxy
        self.slots = torch.tensor([0] if prompts is None else [prompts.index(prompt) for prompt in prompts])
        clean = model.example(1, torch.Generator().manual_seed(0))
        clean.requires_grad_(clean.is_floating_point())  # to tokens there is no gradient
        seen = self._features(model.decode(clean))
        if clean.requires_grad and not seen.requires_grad:
            raise ValueError("online.features: no gradient reaches the samples through this model's features; take samples")
        self.proxy = Proxy(
            seen.shape[1],
            kinds=len(prompts or []),
            kind=config.proxy,
            members=config.members,
            hidden=config.hidden,
            optimism=float(config.proxy == "ucb") if config.optimism is None else config.optimism,
        ).to(model.device)

    def __call__(self, samples: Tensor, prompts: list[Any] | None) -> Tensor:
        """The proxy's reward, (batch,)."""
        groups = torch.zeros(len(samples), dtype=torch.long)
        if prompts is not None and self.prompts is not None:
            groups = torch.tensor([self.prompts.index(prompt) for prompt in prompts])
        return self.proxy(self._features(samples), groups)

    def begin_decoded(self, x0: Tensor, decode: Callable[[Tensor], Tensor], prompts: list[Any] | None) -> Callable[[], Tensor]:
        """The proxy's reward of decode(x0), as `CountedReward` has it."""
        scores = self(decode(x0), prompts)
        return lambda: scores

    def _features(self, samples: Tensor) -> Tensor:
        seen = self.model.features(samples) if self.config.features == "model" else samples
        return seen.flatten(1).float()

    def due(self, iteration: int) -> bool:
        """True if a round begins with this iteration (from 0)."""
        return self.round < len(self.config.rounds) and iteration >= self.round * self.length

    @torch.no_grad()
    def query(self, draw: Callable[[Tensor, RowNoise], Tensor], rows: int, generator: torch.Generator) -> None:
        """One round: `draw(groups, noise) -> samples` of the policy, `rows` at a time; the answers; the proxy refitted.

        Answers that the log already has are not asked for again; samples and noise are drawn all the same, so that a run
        taken up again is the uninterrupted one.
        """
        number = self.round + 1
        before = len(self.log.upto(self.round)[1])
        known = len(self.log.upto(number)[1]) - before
        if before != sum(self.config.rounds[: self.round]):
            raise ValueError(
                f"{self.log.path}: lacks answers of the rounds before {number}; put the file back, or begin a new run"
            )
        n, reward = self.config.rounds[self.round], self.oracle.reward
        if isinstance(reward, WeightedSum) and reward.unsettled and known and self.log.records[0]["moments"] is not None:
            reward.moments = torch.tensor(self.log.records[0]["moments"], dtype=torch.float64)
        groups, seed, world = self._groups(before + n)[before:], drawn_seed(generator), self.world
        for piece in torch.arange(n).split(rows):
            own = piece[piece % world.size == world.rank]
            samples = world.together(partial(draw, groups[own], RowNoise(seed, own)), sends=self.model.sharded)
            noise = self.config.noise_std * torch.randn(len(piece), generator=generator)
            fresh = piece[piece >= known]
            self.oracle.queries += int((own < known).sum())
            if len(fresh):
                new = own >= known
                waiting = world.together(partial(self._ask, samples[new], groups[own[new]]))
                settle(reward, world, len(fresh))
                answers = world.together(partial(self._answers, waiting, samples[new]))
                values, features = (world.merged(answer, own[new] - fresh[0], len(fresh)) for answer in answers)
                values, moments = values + noise[piece >= known], getattr(reward, "moments", None)
                world.together(partial(self.log.add, number, self._prompts(groups[fresh]), values, features, moments))
            self.progress(f"round {number} of {len(self.config.rounds)}: {int(piece[-1]) + 1:,} of {n:,} answers")
        self._refit(number, before, generator)
        world.share(self.proxy.state_dict().values())
        self.round = number

    def _prompts(self, groups: Tensor) -> list[Any] | None:
        return None if self.prompts is None else [self.prompts[group] for group in groups.tolist()]

    def _ask(self, samples: Tensor, groups: Tensor) -> Callable[[], Tensor]:
        """Asks the oracle, where there is anything to ask; calling the result waits for the answers."""
        return self.oracle.begin(samples, self._prompts(groups)) if len(samples) else lambda: samples.new_zeros(0)

    def _answers(self, waiting: Callable[[], Tensor], samples: Tensor) -> tuple[Tensor, Tensor]:
        """The oracle's answers and the features, on the CPU."""
        return waiting().float().cpu(), self._features(samples).cpu()

    def _groups(self, n: int) -> Tensor:
        """The prompts of the first n queries of all rounds, in turn: each as often as the others."""
        return self.slots[torch.arange(n) % len(self.slots)]

    def _refit(self, number: int, before: int, generator: torch.Generator) -> None:
        features, values = self.log.upto(number)
        groups, fresh = self._groups(len(values)), slice(before, None)
        proxy = self.proxy.cpu()  # few rows and small networks: as fast as anywhere, and the same everywhere
        self.figures = {"round": float(number), "oracle_mean": float(values[fresh].mean())}
        if before:
            foreseen = proxy.judge(features[fresh], groups[fresh])[0]
            self.figures["proxy_error"] = float((foreseen - values[fresh]).square().mean().sqrt())
        proxy.fit(features, groups, values, generator)
        self.figures["proxy_std"] = float(proxy.judge(features[fresh], groups[fresh])[1].mean())
        proxy.to(self.model.device)

    def state(self) -> dict[str, Any]:
        """All that changes but the answers, which are in the log."""
        return {"round": self.round, "figures": self.figures, "proxy": self.proxy.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a `state`."""
        self.round, self.figures = state["round"], state["figures"]
        self.proxy.load_state_dict(state["proxy"])
