"""Truth: the advantage over neighbours, by enumeration: performance difference, policy gradient, improvement in L sweeps."""

import numpy as np
import pytest
import torch
from token_laws import enumerated, even_chance, potts, sequences
from twins import close, f64

from scoreaction.algorithms._tokens import neighbours, to_go, token_advantage
from scoreaction.diffusion.reveals import position_kl
from scoreaction.diffusion.sequences import total_variation

BETA = 0.5


class Task:
    """A law of 4 positions and 3 tokens, two policies drawn at random, and their values by recursion."""

    def __init__(self) -> None:
        law, x = potts(np.random.default_rng(1), 4, 3), sequences(4, 3)
        self.rewards = f64(0.8 * (x[:, 0] == x[:, 2]) + 0.6 * (x[:, 3] == 1) - 0.5 * (x[:, 1] == x[:, 3]))
        self.law = enumerated(law, 4)
        self.space, self.chance = self.law.space, even_chance(self.law.space)
        self.reference = self.law.log_conditionals(self.space.states)
        masked = self.space.masked[..., None]
        self.next = torch.where(masked, self.space.filled(torch.arange(len(self.space.states))), 0)
        generator = torch.Generator().manual_seed(0)
        shape = self.reference.shape
        self.logits = [size * torch.randn(shape, generator=generator, dtype=torch.float64) for size in (0.4, 0.9)]
        self.old, self.new = map(self.policy, self.logits)

    def policy(self, logits):
        return torch.log_softmax(self.reference + logits, -1)

    def value(self, log_prob):
        """V of a policy: the reward minus beta times the KL to go, from the states with no masks up."""
        states, masked = len(self.space.states), self.space.masked
        value = torch.zeros(states, dtype=torch.float64).index_put(((~masked.any(1)).nonzero().flatten(),), self.rewards)
        for masks in range(1, 5):
            here = (masked.sum(1) == masks).nonzero().flatten()
            cost = BETA * position_kl(log_prob[here], self.reference[here])
            inner = (log_prob[here].exp() * value[self.next[here]]).sum(-1) - cost
            value = value.index_put((here,), (inner * self.chance[here]).sum(1))
        return value

    def advantages(self, log_prob, value):
        gain = value[self.next] - value[:, None, None]
        return token_advantage(log_prob, gain=gain, pretrained=self.reference, beta=BETA)

    def total(self, visits, advantage):
        return (visits[:, None] * self.chance * advantage).sum()


@pytest.fixture(scope="module")
def task():
    return Task()


def test_the_performance_difference(task):
    """`J(new) - J(old) = E_new sum of the old policy's advantages`, -.39495047; its own advantages are 0 on average."""
    old, new = task.value(task.old), task.value(task.new)
    visits = task.space.visits(task.new, task.chance)
    found = task.total(visits, task.advantages(task.new, old))
    without_kl = task.total(visits, task.advantages(task.new, old) + BETA * position_kl(task.new, task.reference))
    of_the_old = task.total(task.space.visits(task.old, task.chance), task.advantages(task.new, old))
    close(found, -0.39495047, atol=1e-8, without_kl=without_kl, visits_of_the_old=of_the_old)
    close(new[-1] - old[-1], -0.39495047, atol=1e-8, flipped=old[-1] - new[-1])
    own = (task.chance * task.advantages(task.old, old)).sum(1)[task.space.masked.any(1)]
    close(own, 0.0, atol=1e-12, of_the_new=(task.chance * task.advantages(task.new, old)).sum(1)[task.space.masked.any(1)])


def test_the_policy_gradient(task):
    """The gradient of the visits' mean advantage at the old policy is that of J through the recursion."""
    leaf = task.logits[0].clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(task.value(task.policy(leaf))[-1], leaf)
    old, visits = task.value(task.old).detach(), task.space.visits(task.old, task.chance)

    def gradient(visits):
        own = task.logits[0].clone().requires_grad_(True)
        return torch.autograd.grad(task.total(visits, task.advantages(task.policy(own), old)), own)[0]

    close(gradient(visits), exact, atol=1e-12, visits_of_the_new=gradient(task.space.visits(task.new, task.chance)))


def test_the_improvement_is_the_optimum_in_as_many_sweeps_as_positions(task):
    """The loss of an update with trust k is least at `p_pre^(b/(b+k)) p_old^(k/(b+k)) exp(V/(b+k))`; without, L sweeps do."""
    value = task.value(task.old)

    def best(value, old, trust):
        mixed = BETA * task.reference + trust * old + value[task.next]
        return torch.log_softmax(mixed / (BETA + trust), -1)

    def slope(log_prob, trust):
        leaf = log_prob.clone().requires_grad_(True)
        policy = torch.log_softmax(leaf, -1)
        loss = trust * position_kl(policy, task.old) - task.advantages(policy, value)
        return torch.autograd.grad(loss[task.space.masked].sum(), leaf)[0].abs().max()

    close(slope(best(value, task.old, 0.7), 0.7), 0.0, atol=1e-12, without_trust=slope(best(value, task.old, 0.0), 0.7))
    tilted = task.law.optimum(lambda x, prompts: task.rewards, BETA).law.law
    policy, away = task.old, []
    for _ in range(4):
        policy = best(task.value(policy), policy, 0.0)
        away.append(total_variation(task.space.visits(policy, task.chance)[~task.space.masked.any(1)], tilted))
    assert away[0] < 0.2
    close(away[3], 0.0, atol=1e-12, one_sweep_less=away[2])


def test_neighbours_and_what_is_to_go():
    found = neighbours(torch.tensor([[3, 0, 3], [1, 3, 3]]), torch.tensor([[0, 2], [1, 1]]), 3)
    truth = torch.tensor([[[[v, 0, 3] for v in range(3)], [[3, 0, v] for v in range(3)]], [[[1, v, 3] for v in range(3)]] * 2])
    close(found, truth, atol=0, other_positions=found.flip(1))
    costs = f64([[1.0, 2.0], [3.0, 4.0]])
    close(to_go(costs), [[4.0, 6.0], [3.0, 4.0], [0.0, 0.0]], atol=0, so_far=costs.cumsum(0)[[0, 1, 1]])
