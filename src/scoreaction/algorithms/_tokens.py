"""Score as Action on tokens: the action is the law of each masked token, and its advantage is over neighbouring states."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._likelihood_ratio import minibatches, ratio_term, transition
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.algorithms._value import critic_updates
from scoreaction.diffusion.noise import RowNoise, drawn_seed
from scoreaction.diffusion.reveals import Reveal, chosen, position_kl
from scoreaction.networks.conditions import take
from scoreaction.networks.token_layers import ONE_HOT, TokenCritic
from scoreaction.sampling.rollout import Rollout, States, Steps, once
from scoreaction.types import Prediction, Tokens
from scoreaction.world import Rows

NEIGHBOURS = 32
"""Neighbours of a state whose values are taken at a time: those of as many positions as they make, one at least."""


class TokenSettings(NamedTuple):
    """The settings of `ScoreAction` and `VARD` that this learner uses."""

    beta: float
    kl_target: float | None
    updates: int
    rows: int
    critic_updates: int
    critic_lr: float
    trust: float
    trust_region: float
    kl_to_go: bool = True


def log_prob_of(prediction: Prediction) -> Tensor:
    """The log probabilities (rows, length, vocabulary) of a prediction of tokens."""
    return cast(Tokens, prediction).log_prob


def token_advantage(log_prob: Tensor, *, gain: Tensor, pretrained: Tensor, beta: float) -> Tensor:
    """The advantage of showing a position by these probabilities a, where V is the old policy's, (...,).

    `sum_v a(v) (V(x^{iv}) - V(x)) - beta KL(a || p_pre,i)`: closed form, and no gradient in x. Times the rate at which
    positions are shown, and summed over masked ones, it is the advantage rate: `J(theta) - J(old) = E_theta integral of q`. All
    tensors (..., vocabulary); gain is `V(x^{iv}) - V(x)`.
    """
    return (log_prob.exp() * gain).sum(-1) - beta * position_kl(log_prob, pretrained)


def neighbours(x: Tensor, position: Tensor, vocabulary: int) -> Tensor:
    """The states x (rows, length) with each token at each of these positions (rows, k): (rows, k, vocabulary, length).

    >>> neighbours(torch.tensor([[2, 2]]), torch.tensor([[1]]), 2).tolist()
    [[[[2, 0], [2, 1]]]]
    """
    every = x[:, None, None].expand(-1, position.shape[1], vocabulary, -1).clone()
    tokens = torch.arange(vocabulary, device=x.device).expand(*position.shape, -1)
    return every.scatter(3, position[..., None, None].expand(-1, -1, vocabulary, 1), tokens[..., None])


def token_costs(learner: Learner, rollout: Rollout) -> Tensor:
    """The KL in nats of each step of the policy to the pretrained model, (n, batch)."""
    steps = rollout.steps()
    assert steps.pretrained is not None
    here, there = (transition(learner, prediction, steps) for prediction in (steps.old, steps.pretrained))
    return here.kl(there).reshape(rollout.size)


def to_go(costs: Tensor) -> Tensor:
    """The costs (n, batch) from each state to the end, the end among them: (n + 1, batch)."""
    return torch.cat([costs.flip(0).cumsum(0).flip(0), torch.zeros_like(costs[:1])])


class TokenLearner(Learner):
    """A scalar critic V of all visited states, and a policy that follows its values at neighbours within a trust region."""

    late_rewards = True
    state: TrustState

    def __init__(self, config: TokenSettings, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.state = config, TrustState(config.beta, trust=config.trust)
        self.trust_region = config.trust_region
        self.vocabulary: int = cast(Any, self.process).vocabulary
        self.critic = TokenCritic(cast(Any, self.process), self.model.shape[0], conditions=self.conditions)
        self.networks["critic"], self.lr["critic"] = self.critic, config.critic_lr

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The critic at all states of the paths, then the policy at random ones."""
        config, figures = self.config, {}
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        yield from self.fit(rollout, generator)
        steps = rollout.steps()
        chosen_rows = self.world.dealt(*rollout.size, config.updates * config.rows, generator)
        noise = RowNoise(drawn_seed(generator), chosen_rows.place)
        count = min(self.model.shape[0], max(1, NEIGHBOURS // self.vocabulary))
        uniform = torch.special.ndtr(noise.normal((len(chosen_rows), count), torch.float32).double())
        first = 0
        for rows in chosen_rows.chunk(config.updates):
            figures = yield self._improvement(steps, rows, uniform[first : first + len(rows)])
            first += len(rows)
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def fit(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """V at the states of the policy's steps and at the end of the last: of the reward less beta times the KL to go."""
        n, batch = rollout.size
        states = States(rollout.x[: n + 1].flatten(0, 1), rollout.acted.repeat_interleave(batch), rollout.prompt.repeat(n + 1))
        target = rollout.rewards.expand(n + 1, batch)
        if self.config.kl_to_go:
            target = target - self.beta * to_go(token_costs(self, rollout)).to(target)
        rows = self.world.rows((n + 1) * batch * self.world.size)
        count = self.config.critic_updates
        yield from critic_updates(self.critic, states, rows, None, target.flatten(), updates=count, generator=generator)

    def _improvement(self, steps: Steps, rows: Rows, uniform: Tensor) -> Update:
        """Minus the advantage at positions drawn by their chances, and trust times beta the KL to the old policy."""

        def loss(numbers: Tensor) -> Loss:
            part = take(steps, rows.own[numbers])
            assert part.pretrained is not None
            chance = cast(Reveal, transition(self, part.old, part)).chance
            position = chosen(chance[:, None], take(uniform, numbers).to(chance.device))
            gain, prediction = self._gain(part, position), once(self.model, self.policy, part)
            policy, pretrained, old = (_at(log_prob_of(law), position) for law in (prediction, part.pretrained, part.old))
            weight = part.weight.to(policy) * chance.sum(1).to(policy)
            kl_to_old = position_kl(policy, old).mean(1)
            value = token_advantage(policy, gain=gain, pretrained=pretrained, beta=self.beta).mean(1)
            return weight * (self.state.trust * self.beta * kl_to_old - value), {"kl_to_old": weight * kl_to_old}

        return Update("policy", [Term(rows, loss)])

    @torch.no_grad()
    def _gain(self, steps: Steps, position: Tensor) -> Tensor:
        """`V(x^{iv}) - V(x)` of the critic, (rows, k, vocabulary)."""
        every = neighbours(steps.x, position, self.vocabulary)
        size = every.shape[1] * every.shape[2]
        values = self.critic(every.flatten(0, 2), steps.s.repeat_interleave(size), steps.prompt.repeat_interleave(size))
        return values.reshape(every.shape[:3]) - self.critic(*steps.states)[:, None, None]


def _at(log_prob: Tensor, position: Tensor) -> Tensor:
    """The rows of these positions (rows, k): (rows, k, vocabulary)."""
    return log_prob.gather(1, position[..., None].expand(-1, -1, log_prob.shape[-1]))


class TokenRatioLearner(TokenLearner):
    """The likelihood ratio of what was shown, weighed by `V(x_s) - V(x_t) - beta KL_step`, lambda-averaged, with PPO's clip."""

    def __init__(self, config: TokenSettings, setting: Setting, *, clip: float, gae_lambda: float) -> None:
        super().__init__(config, setting)
        self.clip, self.gae_lambda = clip, gae_lambda

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The critic, and the policy over all steps in shuffled minibatches."""
        config, steps, figures = self.config, rollout.steps(), {}
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        advantage = self._advantages(rollout)  # before the critic has seen what it is a baseline of
        yield from self.fit(rollout, generator)
        n, batch = rollout.size
        batches = minibatches(self.world, n, batch, epochs=1, count=config.updates, generator=generator)
        fixed: dict[str, Any] = {"law": partial(transition, self), "outcome": steps.x_next, "penalty": self._penalty}
        for i, rows in enumerate(batches):
            figures = yield Update("policy", [ratio_term(self, steps, rows, advantage, clip=self.clip, first=i == 0, **fixed)])
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    @torch.no_grad()
    def _advantages(self, rollout: Rollout) -> Tensor:
        n, batch = rollout.size
        values = self.critic(*rollout.steps().states).reshape(n, batch)
        values = torch.cat([values, rollout.rewards[None].to(values)])
        gain = values[1:] - values[:-1] - self.beta * token_costs(self, rollout).to(values)
        advantages, ahead = torch.empty_like(gain), torch.zeros_like(gain[0])
        for step in reversed(range(n)):
            ahead = gain[step] + self.gae_lambda * ahead
            advantages[step] = ahead
        return advantages.flatten()

    def _penalty(self, prediction: Prediction, steps: Steps) -> Loss:
        """`beta (KL to the pretrained model + trust KL to the old policy)` of the step."""
        assert steps.pretrained is not None
        laws = (transition(self, law, steps) for law in (prediction, steps.pretrained, steps.old))
        here, pretrained, old = laws
        kl, kl_to_old = here.kl(pretrained), here.kl(old)
        return self.beta * (kl + self.state.trust * kl_to_old), {"kl_to_old": steps.weight.to(kl) * kl_to_old}


def refuse_large_vocabulary(setting: Setting) -> None:
    """ValueError where a state has more neighbours at a position than are worth a critic's call."""
    vocabulary = cast(Any, setting.model.process).vocabulary
    if vocabulary > ONE_HOT:
        raise ValueError(
            f"algorithm.estimator: pathwise takes the value at every token of a position and there are {vocabulary}; set it to"
            " likelihood_ratio"
        )
