"""Truth: tilted laws of sequences by enumeration, and a chain of 64 positions and 20 tokens by transfer matrices."""

import numpy as np
import pytest
import torch
from token_laws import enumerated, first, reward_of, sequences
from twins import close, f64

from scoreaction.diffusion.sequences import Chain, Enumerated, Scores

BETA = 0.5


def chain_of(seed, length, vocabulary, *, alpha, width):
    rng = np.random.default_rng(seed)
    initial = rng.dirichlet(np.ones(vocabulary))
    transition = np.array([rng.dirichlet(alpha * np.ones(vocabulary)) for _ in range(vocabulary)])
    scores = Scores(f64(rng.standard_normal(vocabulary) * width), f64(rng.standard_normal((vocabulary, vocabulary)) * width))
    return Chain.markov(f64(initial), f64(transition), length), scores


class Rewarded:
    def __init__(self, scores):
        self.scores = scores

    def __call__(self, samples, prompts):
        return self.scores(samples)


def figures(best):
    return best.log_z, best.reward, best.kl_nats, best.objective


def test_the_tilted_law_by_enumeration():
    law, rewards = first()
    best = enumerated(law, 4).optimum(reward_of(rewards, 3), BETA)
    flipped = enumerated(law, 4).optimum(reward_of(-rewards, 3), BETA)
    close(figures(best), [4.13483893, 2.32399850, 0.51315806, 2.06741947], atol=1e-8, flipped=figures(flipped))
    weights = law * np.exp(rewards / BETA)
    close(best.law.law, weights / weights.sum(), atol=1e-12, untilted=law)
    close(
        best.kl_nats,
        (weights / weights.sum() * np.log(weights / weights.sum() / law)).sum(),
        atol=1e-12,
        bits=best.kl_nats / np.log(2),
    )


def test_conditionals_are_those_of_the_sequences_that_agree():
    law = first()[0]
    x, exact = sequences(4, 3), enumerated(law, 4)
    states = torch.tensor([[3, 0, 3, 2], [3, 3, 3, 3], [1, 2, 3, 0]])
    found = exact.log_conditionals(states).exp()

    def truth(state, position):
        agrees = np.all([(x[:, j] == s) | (s == 3) for j, s in enumerate(state) if j != position], axis=0)
        total = np.array([law[agrees & (x[:, position] == v)].sum() for v in range(3)])
        return total / total.sum()

    by_hand = f64(np.array([[truth(state, position) for position in range(4)] for state in states.numpy()]))
    product = f64(np.array([[truth([3, 3, 3, 3], position) for position in range(4)]] * 3))
    close(found, by_hand, atol=1e-12, independent=product)
    close(exact.log_partial(states[1:2]), 0.0, atol=1e-12)


def test_the_optimal_policy_is_the_neighbours_values():
    """`p*_i(v|x) = p_i(v|x) exp((V(x^{iv}) - V(x))/beta)`, and V of all masks is `beta log Z`."""
    law, rewards = first()
    exact = enumerated(law, 4)
    best, states = exact.optimum(reward_of(rewards, 3), BETA), exact.space.states
    value = exact.value(states, best)
    next_value = value[torch.where(exact.space.masked[..., None], exact.space.filled(torch.arange(256)), 0)]
    masked = exact.space.masked
    policy = exact.log_conditionals(states) + (next_value - value[:, None, None]) / BETA
    truth = best.law.log_conditionals(states)
    close(policy[masked], truth[masked], atol=1e-10, without_beta=(policy * BETA)[masked])
    close(value[-1], best.objective, atol=1e-12, in_nats=best.log_z)


@pytest.mark.parametrize("length", [2, 5])
def test_a_chain_is_its_enumeration(length):
    chain, scores = chain_of(4, length, 3, alpha=0.7, width=0.5)
    every = chain.enumerated()
    x = every.space.states
    other = Chain(chain.unary, chain.pair.transpose(1, 2)).enumerated()
    close(chain.log_partial(x), every.log_partial(x), atol=1e-12, backwards=other.log_partial(x))
    close(chain.log_conditionals(x), every.log_conditionals(x), atol=1e-12, backwards=other.log_conditionals(x))
    best, truth = chain.optimum(Rewarded(scores), BETA), every.optimum(Rewarded(scores), BETA)
    close(figures(best), figures(truth), atol=1e-12, flipped=figures(every.optimum(lambda x, prompts: -scores(x), BETA)))
    close(chain.value(x, best), every.value(x, truth), atol=1e-11, without_norm=BETA * best.law.log_partial(x))


def test_a_chain_at_a_length_that_cannot_be_enumerated():
    chain, scores = chain_of(5, 64, 20, alpha=0.5, width=0.05)
    best = chain.optimum(Rewarded(scores), BETA)
    truth = [2.209955, 1.464719, 0.719484, 1.104978]
    close(
        figures(best),
        truth,
        atol=1e-6,
        shorter=figures(chain_of(5, 63, 20, alpha=0.5, width=0.05)[0].optimum(Rewarded(scores), BETA)),
    )
    assert chain.enumerated() is None
    with pytest.raises(ValueError, match="log_weights: must have one size"):
        Enumerated(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="at most"):
        Enumerated(torch.zeros((2,) * 14))
    assert chain.optimum(lambda x, prompts: x.sum(1), BETA) is None
