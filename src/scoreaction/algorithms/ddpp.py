"""DDPP: a masked model is fitted to its posterior from finished sequences (Rector-Brooks et al. 2024, arXiv 2410.08134)."""

from __future__ import annotations

from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreaction.algorithms._learner import LOGGED, Learner, Regularised
from scoreaction.algorithms._likelihood_ratio import transition
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._tokens import log_prob_of
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.diffusion.noise import RowNoise, Source, drawn_seed, normal
from scoreaction.diffusion.processes import Masking
from scoreaction.diffusion.reveals import chosen, position_kl, product_draws, token_log_prob
from scoreaction.networks.conditions import take
from scoreaction.networks.token_layers import TokenCritic
from scoreaction.sampling.rollout import Rollout


class DDPP(Regularised):
    """Fits `q(x0|x_t) ~ p_pre(x0|x_t) exp(r/beta)` on sequences that were masked again; one or two network calls a row.

    loss: `lb` squares `log q - log p_pre - r/beta + log Z(x_t)`, sums over masked positions, with a learned log Z; `is`
    estimates log Z from `candidates` draws of the pretrained model, which are scored; `kl` is the reverse KL at the end, its
    reward's gradient by leave-one-out over `samples` draws, which are scored. These three are as published, and aim at a
    product over positions, which is the tilted law only where data and reward are independent between positions. `balance`
    and `weighted` aim at the tilted law itself: `balance` shows one token at a time and squares
    `log q_i - log p_pre,i - (V(x_t^i) - V(x_t))/beta`; `weighted` is the cross-entropy of masked tokens with path weights
    `exp(r/beta - log p_theta/p_pre)`, and needs a solver that shows one position a step.

    >>> DDPP(loss="balance").beta
    0.5
    """

    name: Literal["ddpp"] = "ddpp"
    loss: Literal["lb", "is", "kl", "balance", "weighted"] = "lb"
    buffer: int = Field(8, ge=1, description="iterations whose sequences are remembered")
    updates: int = Field(8, ge=1, description="policy updates an iteration")
    rows: int = Field(512, ge=1, description="masked sequences in an update")
    log_z_lr: float = Field(5e-3, gt=0, description="learning rate of log Z, or of V of balance")
    candidates: int = Field(16, ge=2, description="draws that is estimates log Z from")
    samples: int = Field(4, ge=2, description="draws of kl")

    def build(self, setting: Setting) -> Learner:
        raise ValueError(
            "algorithm.name: ddpp masks tokens again and this model's states are Gaussian; use score_action, or forward"
            " regression: ram, nft or awm"
        )

    def build_on_tokens(self, setting: Setting) -> DDPPLearner:
        if setting.model.causal:
            raise ValueError(
                "algorithm.name: ddpp masks tokens anywhere, and a causal network ignores what is to the right of a mask; use"
                " score_action or dpok"
            )
        if self.loss == "weighted" and not setting.sampler.find().single:
            raise ValueError(
                f"sampler.solver: loss: weighted needs the probability of a path and {setting.sampler.solver} shows several"
                " positions a step, which is another law; use one_by_one"
            )
        return DDPPLearner(self, setting)


def posterior_ratio(log_q: Tensor, log_p: Tensor, x0: Tensor, masked: Tensor) -> Tensor:
    """`log q(x0|x_t) - log p(x0|x_t)`, both products over the masked positions: (rows,)."""
    return ((token_log_prob(log_q, x0) - token_log_prob(log_p, x0)) * masked).sum(-1)


def residual(ratio: Tensor, reward: Tensor, log_z: Tensor, beta: float) -> Tensor:
    """`log q - log p_pre - r/beta + log Z(x_t)`: 0 at all x0 where q is the tilted posterior."""
    return ratio - reward / beta + log_z


def balance(ratio: Tensor, next_value: Tensor, value: Tensor, beta: float) -> Tensor:
    """`log q_i - log p_pre,i - (V(x_t^i) - V(x_t))/beta` of one token: 0 everywhere just at the optimum's q and V."""
    return ratio - (next_value - value) / beta


def end_kl(log_q: Tensor, log_p: Tensor, masked: Tensor, rewards: Tensor, log_prob: Tensor, beta: float) -> Tensor:
    """The reverse KL at the end, up to log Z: `sum_i KL(q_i || p_i) - E_q r/beta`, (rows,), with its gradient.

    rewards and log_prob (rows, K) are those of K draws of q. The reward's gradient is REINFORCE with the mean of the other
    draws as baseline (Kool et al. 2019).
    """
    count = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)
    score = ((rewards - others).detach() * log_prob).mean(1)
    mean = rewards.mean(1).detach()
    return (position_kl(log_q, log_p) * masked).sum(-1) - (mean + score - score.detach()) / beta


def path_weights(rewards: Tensor, log_ratio: Tensor, prompt: Tensor, beta: float) -> Tensor:
    """Weights of mean 1 proportional to `exp(r/beta - log p_theta/p_pre)`, within each prompt, (n,).

    >>> path_weights(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1000.0]), torch.zeros(2), 1.0).tolist()
    [2.0, 0.0]
    """
    logits, weights = rewards / beta - log_ratio, torch.empty_like(rewards)
    for number in prompt.unique():
        same = prompt == number
        weights[same] = torch.softmax(logits[same], 0) * same.sum()
    return weights


class Finished(nn.Module):
    """Finished sequences of the last iterations with their rewards and path log ratios; all processes hold all of them."""

    x0: Tensor
    prompt: Tensor
    rewards: Tensor
    log_ratio: Tensor
    seen: Tensor

    def __init__(self, memory: int, length: int) -> None:
        super().__init__()
        self.register_buffer("x0", torch.zeros(memory, length, dtype=torch.long))
        self.register_buffer("prompt", torch.zeros(memory, dtype=torch.long))
        self.register_buffer("rewards", torch.zeros(memory))
        self.register_buffer("log_ratio", torch.zeros(memory))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def add(self, x0: Tensor, prompt: Tensor, rewards: Tensor, log_ratio: Tensor) -> None:
        """Adds sequences, over the oldest where full."""
        slots = (self.seen + torch.arange(len(x0), device=self.seen.device)) % len(self.x0)
        self.seen += len(x0)
        for into, values in zip(
            (self.x0, self.prompt, self.rewards, self.log_ratio), (x0, prompt, rewards, log_ratio), strict=True
        ):
            into[slots] = values.to(into)

    def __len__(self) -> int:
        return min(int(self.seen), len(self.x0))


class DDPPLearner(Learner):
    """DDPP at work: the sequences it remembers, and log Z or V where it is learned."""

    def __init__(self, config: DDPP, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config, self.masking = config, cast(Masking, self.process)
        self.reference_rows = None if config.loss == "weighted" else LOGGED
        length = self.model.shape[0]
        self.finished = Finished(config.buffer * setting.batch, length)
        self.networks["finished"] = self.finished
        self.critic = TokenCritic(self.masking, length, conditions=self.conditions)
        if config.loss in ("lb", "balance"):
            self.networks["log_z"], self.lr["log_z"] = self.critic, config.log_z_lr

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """Remembers the batch, then fits the policy to sequences that are masked again, at times uniform in [0, 1]."""
        config, gather = self.config, self.world.gather
        ratio = self._path_ratio(rollout) if config.loss == "weighted" else torch.zeros_like(rollout.rewards)
        batch = [gather(values) for values in (rollout.x0, rollout.prompt.to(rollout.x0.device), rollout.rewards, ratio)]
        self.finished.add(*batch)
        self.critic.scale.calibrate(batch[2])
        known, kept = len(self.finished), self.finished
        weights = path_weights(kept.rewards[:known], kept.log_ratio[:known], kept.prompt[:known], self.beta)
        for _ in range(config.updates):
            rows = self.world.rows(config.rows)
            slots = torch.randint(known, (config.rows,), generator=generator)[rows.place].to(self.finished.x0.device)
            points = _Masked(self, slots, weights[slots], RowNoise(drawn_seed(generator), rows.place, ahead=1))
            yield Update("policy", [Term(rows, points.loss, calls=1)])
            if "log_z" in self.networks:
                yield Update("log_z", [Term(rows, points.fit, calls=0)])

    @torch.no_grad()
    def _path_ratio(self, rollout: Rollout) -> Tensor:
        """`log p_theta/p_pre` of the tokens that each path showed, (batch,)."""
        steps = rollout.steps()
        assert steps.pretrained is not None
        here, there = (transition(self, prediction, steps) for prediction in (steps.old, steps.pretrained))
        return here.log_ratio(there, steps.x_next).reshape(rollout.size).sum(0)


class _Masked:
    """Rows of an update: remembered sequences x0 that were masked again, x, with what was drawn for them."""

    def __init__(self, learner: DDPPLearner, slots: Tensor, weights: Tensor, noise: Source) -> None:
        process, finished = learner.masking, learner.finished
        self.learner, self.weights = learner, weights
        self.x0, self.prompt, self.rewards = (part[slots] for part in (finished.x0, finished.prompt, finished.rewards))
        rows, length = self.x0.shape
        uniform = torch.special.ndtr(normal((rows, 2), noise).double())
        self.t = uniform[:, 0]
        x = process.forward(self.x0, self.t, noise)
        one = uniform[:, 1].to(x.device)
        place = (one * length).long().clamp(max=length - 1)  # none masked teaches nothing: then this one is
        empty = ~(x == process.mask).any(1)
        self.x = torch.where(empty[:, None] & (torch.arange(length, device=x.device) == place[:, None]), process.mask, x)
        self.masked = self.x == process.mask
        self.shown = chosen(self.masked.double(), one)
        draws = {"is": learner.config.candidates, "kl": learner.config.samples}.get(learner.config.loss, 0)
        self.uniform = torch.special.ndtr(normal((rows, draws, length), noise).double()) if draws else uniform[:, :0]
        self.constant = torch.zeros(rows, device=x.device)
        """The residual without log Z, or that of balance without V, from the policy's update."""

    def loss(self, numbers: Tensor) -> Loss:
        """The loss of the policy at these rows."""
        learner, beta = self.learner, self.learner.beta
        x, x0, masked, prompt = (take(part, numbers) for part in (self.x, self.x0, self.masked, self.prompt))
        t, rewards = take(self.t, numbers), take(self.rewards, numbers)
        log_q = log_prob_of(learner.policy(x, t, prompt))
        with torch.no_grad():
            log_p = log_prob_of(learner.pretrained(x, t, prompt))
        match learner.config.loss:
            case "weighted":
                weights = take(self.weights, numbers)
                value = -weights * (token_log_prob(log_q, x0) * masked).sum(1)
                return value, {"ddpp_loss": value, "weight_square": weights.square()}
            case "balance":
                ratio = posterior_ratio(log_q, log_p, x0, torch.nn.functional.one_hot(take(self.shown, numbers), x.shape[1]))
                value = balance(ratio, *self._values(numbers, ratio), beta).square()
            case "kl":
                drawn = self._drawn(log_q.detach(), numbers)
                scores = self._scores(torch.where(masked[:, None], drawn, x0[:, None]), prompt).to(log_q)
                tokens = token_log_prob(log_q[:, None].expand(-1, drawn.shape[1], -1, -1), drawn)
                value = end_kl(log_q, log_p, masked, scores, (tokens * masked[:, None]).sum(2), beta)
            case "is":
                drawn = torch.where(masked[:, None], self._drawn(log_p, numbers), x0[:, None])
                log_z = torch.logsumexp(self._scores(drawn, prompt) / beta, 1) - torch.log(torch.tensor(float(drawn.shape[1])))
                value = residual(posterior_ratio(log_q, log_p, x0, masked), rewards, log_z.to(log_q), beta).square()
            case "lb":
                ratio = posterior_ratio(log_q, log_p, x0, masked)
                self.constant[numbers] = ratio.detach().to(self.constant)
                with torch.no_grad():
                    log_z = learner.critic(x, t, prompt) / beta
                value = residual(ratio, rewards, log_z, beta).square()
        return value, {"ddpp_loss": value}

    def fit(self, numbers: Tensor) -> Loss:
        """The loss of log Z, or of V of balance, where the policy was."""
        learner, beta = self.learner, self.learner.beta
        ratio = take(self.constant, numbers)
        if learner.config.loss == "balance":
            error = balance(ratio, *self._values(numbers, ratio, graph=True), beta)
        else:
            x, t, prompt = (take(part, numbers) for part in (self.x, self.t, self.prompt))
            error = residual(ratio, take(self.rewards, numbers), learner.critic(x, t, prompt) / beta, beta)
        return error.square(), {"log_z_loss": error.square()}

    def _values(self, numbers: Tensor, ratio: Tensor, *, graph: bool = False) -> tuple[Tensor, Tensor]:
        """V after one token is shown, r where that finishes the sequence, and before."""
        self.constant[numbers] = ratio.detach().to(self.constant)
        x, x0, t, prompt = (take(part, numbers) for part in (self.x, self.x0, self.t, self.prompt))
        place = take(self.shown, numbers)[:, None]
        after = x.scatter(1, place, x0.gather(1, place))
        finished = (after != self.learner.masking.mask).all(1)
        with torch.set_grad_enabled(graph):
            values = self.learner.critic(after, t, prompt), self.learner.critic(x, t, prompt)
        return torch.where(finished, take(self.rewards, numbers), values[0]), values[1]

    def _drawn(self, log_prob: Tensor, numbers: Tensor) -> Tensor:
        """Sequences drawn from the product of these probabilities, (rows, draws, length)."""
        return product_draws(log_prob, take(self.uniform, numbers).to(log_prob.device))

    @torch.no_grad()
    def _scores(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """The rewards of sequences (rows, draws, length): each is a query."""
        draws = x0.shape[1]
        return self.learner.reward(x0.flatten(0, 1), prompt.repeat_interleave(draws)).reshape(-1, draws)


Config = DDPP
