"""Truth: the autoregressive law by enumeration; masks, weights and threshold decoding by sums over what they are defined by."""

from contextlib import ExitStack
from functools import cache, partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from token_laws import enumerated, first, reward_of
from torch import nn
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.algorithms._pairs import CausalRatio, PathRatio, pair_update, path_ratio
from scoreaction.algorithms._setting import Objective, Setting
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.sequences import total_variation
from scoreaction.diffusion.tails import causal_loss, context_weights, soft_tail_masking
from scoreaction.networks.causal import CausalTransformer
from scoreaction.sampling.draw import run
from scoreaction.sampling.rollout import once
from scoreaction.sampling.sampler import act, follow
from scoreaction.training.errors import TrainingError
from scoreaction.training.token_task import exact_task

LAW, REWARDS = first()
LENGTH, VOCABULARY, MASK, BETA = 4, 3, 3, 0.5


def network(kind=CausalTransformer, **options):
    torch.manual_seed(0)
    net = kind(VOCABULARY, LENGTH, width=16, layers=2, heads=2, **options)
    nn.init.normal_(net.head.weight, std=0.3)
    nn.init.normal_(net.token.weight)
    return net


def causal(net=None, **options):
    net = net or network()
    return sa.MaskedModel(net, process=sa.Masking(VOCABULARY), length=LENGTH, causal=True, **options)


class ExactCausal(nn.Module):
    """The exact conditionals of a law given what is shown before each position, and a change of each state's own."""

    def __init__(self):
        super().__init__()
        self.law = enumerated(LAW, LENGTH)
        self.change = nn.Parameter(torch.zeros(len(self.law.space.states), LENGTH, VOCABULARY))

    def forward(self, x, t, cond):
        logits = []
        for n in range(LENGTH):
            before = torch.where(torch.arange(LENGTH) < n, x, MASK)
            number = self.law.space.numbers(before)
            logits.append(self.law.log_conditionals(before)[:, n].to(self.change) + self.change[number, n])
        return torch.stack(logits, 1)


def exact_model():
    net = ExactCausal()
    return sa.MaskedModel(net, process=sa.Masking(VOCABULARY), length=LENGTH, causal=True, law=net.law)


def test_a_position_sees_what_is_before_it_and_no_more():
    """By changed tokens. Twins: attention to all positions; an input that is not shifted."""
    x = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))

    def check(make):
        net = make()
        whole = net(x, torch.ones(1), None)
        for n in range(LENGTH):
            other = torch.where(torch.arange(LENGTH) >= n, (x + 1) % VOCABULARY, x)
            changed = net(other, torch.ones(1), None)
            assert torch.equal(changed[:, : n + 1], whole[:, : n + 1])
            if n + 1 < LENGTH:
                assert not torch.allclose(changed[:, n + 1], whole[:, n + 1]), "nothing is seen"

    class Unshifted(CausalTransformer):
        def forward(self, tokens, t, cond):
            return self.logits(tokens, cond, [None] * 2, 0)

    accepts(check, network, unshifted=lambda: network(Unshifted))
    whole = torch.nn.functional.scaled_dot_product_attention
    everywhere = partial(patch, "scoreaction.networks.causal.F.scaled_dot_product_attention")
    with everywhere(lambda q, k, v, is_causal: whole(q, k, v)), pytest.raises(AssertionError):
        check(network)


@pytest.mark.parametrize("lora", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_is_the_whole_pass(lora):
    """Predictions along paths, of policy and reference, guided by classes. Twin: those of another role, of no guidance."""
    options = {"encode": lambda prompts: torch.tensor([int(p) for p in prompts]), "null": torch.tensor([3])}
    model = causal(network(classes=3), lora_rank=lora, lora_targets=["to_q", "to_v"] if lora else None, **options)
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    sampler = sa.Sampler(**model.sampling, guidance=2.0)
    conditions, prompt = model.conditions(["0", "2"]), torch.tensor([0, 1, 1])

    @torch.no_grad()
    def paths(reference=False, guidance=2.0):
        before = model.evaluations.forward
        settings = sampler.model_copy(update={"guidance": guidance})
        predict = follow(model, settings, conditions, prompt, reference=reference)
        x, log_probs = model.start(3, torch.Generator()), []
        for n in range(LENGTH):
            log_probs.append(predict(x, torch.tensor(1 - n / LENGTH)).log_prob[:, n])
            x = torch.where(torch.arange(LENGTH) == n, (torch.arange(3)[:, None] + n) % VOCABULARY, x)
        assert model.evaluations.forward - before == (2 if guidance > 1 else 1) * 3 * LENGTH
        return torch.stack(log_probs, 1), x

    for reference in (False, True):
        found, x0 = paths(reference)
        predict = model.reference if reference else model.predict
        whole = predict(x0, torch.tensor(0.0), conditions, prompt=prompt, guidance=2.0).log_prob
        close(found, whole, atol=1e-5, other=paths(not reference)[0], unguided=paths(reference, 1.0)[0])
    assert "stream" in follow(model, sampler, conditions, prompt).__qualname__
    model.max_rows = 5
    assert "stream" not in str(follow(model, sampler, conditions, prompt)), "more rows than a call may have"


def test_samples_by_the_stream_are_those_without():
    model = causal()
    sampler, prompt = sa.Sampler(**model.sampling), torch.zeros(16, dtype=torch.long)
    drawn = sa.sample(model, n=16, seed=3)
    with torch.no_grad():
        plain = run(model, sampler, lambda x, t: act(model, sampler, x, t), 16, RowNoise(3, torch.arange(16)))
    same(drawn, plain, other_seed=sa.sample(model, n=16, seed=4))
    assert len(prompt) == 16


def test_left_to_right_it_is_the_law_and_one_pass_has_its_probability():
    """`sum_n log p(x_n | x_<n)` of all sequences. Twin: the last position left out; the law of a random order, TV above .01."""
    model = exact_model()
    every = model.net.law.space.sequences
    found = model.path_log_prob(every)
    close(found, torch.tensor(LAW).log(), atol=1e-5, without_the_last=model.path_log_prob(every[:, [0, 1, 2, 2]]))
    steps = torch.zeros(len(every), dtype=torch.float64)
    for n in range(LENGTH):
        state = torch.where(torch.arange(LENGTH) < n, every, MASK)
        log_prob = model.predict(state, torch.tensor(1 - n / LENGTH)).log_prob[:, n]
        steps += log_prob.gather(1, every[:, n : n + 1])[:, 0]
    close(found, steps, atol=1e-5, one_step_less=steps - log_prob.gather(1, every[:, -1:])[:, 0])
    task = exact_task(model, reward_of(REWARDS, VOCABULARY), BETA)
    policy, _, _ = task.exact(model, sa.Sampler(**model.sampling))
    close(
        total_variation(policy.law, torch.tensor(LAW)), 0.0, atol=1e-6, tilted=total_variation(policy.law, policy.law.flip(0))
    )
    with pytest.raises(ValueError, match="causal: one pass has the probability of a path"):
        sa.MaskedModel(network(), process=sa.Masking(VOCABULARY), length=LENGTH).path_log_prob(every)


@pytest.mark.slow
def test_a_causal_model_is_tuned_from_left_to_right(tmp_path):
    """The gap by enumeration falls from .51, and what is saved is causal again. Twin: the sign of the reward."""
    gaps = []
    for sign in (1, -1):
        model = exact_model()
        tuner = sa.Finetuner(
            model,
            reward=lambda x, p, sign=sign: sign * reward_of(REWARDS, VOCABULARY)(x, p),
            algorithm=sa.DPOK(beta=BETA),
            train=sa.Train(iterations=10, batch=96, lr=0.05),
        )
        same(tuner.sampler.solver, "left_to_right", random="one_by_one")
        list(tuner)
        task = exact_task(model, reward_of(REWARDS, VOCABULARY), BETA)
        gaps.append(task.distances(model, tuner.sampler, 64, 0)["objective_gap"])

    def falls(gap):
        assert 0 <= gap < 0.3, gap

    accepts(falls, gaps[0], flipped=gaps[1])
    trained = sa.Finetuner(causal(), reward=lambda x, p: x.sum(1), train=sa.Train(iterations=1, batch=4), algorithm=sa.DPOK())
    list(trained)
    trained.save(tmp_path / "model")
    loaded = sa.load(tmp_path / "model")
    assert loaded.causal
    same(sa.sample(loaded, n=4), sa.sample(trained.model, n=4), reference=sa.sample(loaded, n=4, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [sa.DPOK(minibatches=2), sa.DDPO(minibatches=1, clip=0.1), sa.ScoreAction(rows=64, updates=2, critic_updates=2)],
    ids=["dpok", "ddpo", "score_action"],
)
def test_an_update_asks_once_for_the_steps_of_a_path(algorithm):
    """Metrics of two iterations are those of a row a step, by fewer evaluations. Twin: the first step for the latest."""

    def metrics():
        tuner = sa.Finetuner(
            causal(), reward=lambda x, p: x.sum(1), algorithm=algorithm, train=sa.Train(iterations=2, batch=12, lr=0.01)
        )
        figures = list(tuner)[-1]
        kept = [figures[name] for name in ("reward_mean", "kl_nats", "log_ratio") if name in figures]
        return torch.tensor(kept), tuner.model.evaluations

    def earliest(model, predict, steps):
        return once(model, predict, steps._replace(step=LENGTH - steps.step))

    homes = ("_learner", "_likelihood_ratio", "_tokens")
    found, cost = metrics()
    with ExitStack() as stack:
        for home in homes:
            stack.enter_context(
                patch(f"scoreaction.algorithms.{home}.once", lambda model, predict, steps: predict(*steps.states))
            )
        truth, whole = metrics()
    with ExitStack() as stack:
        for home in homes:
            stack.enter_context(patch(f"scoreaction.algorithms.{home}.once", earliest))
        try:
            wrong, _ = metrics()
        except TrainingError:  # a first log-ratio beyond rounding
            wrong = torch.full_like(truth, torch.nan)
    close(found, truth, atol=1e-4, earliest=wrong)
    assert cost.forward < whole.forward
    assert cost.backward < 0.6 * whole.backward


def test_pairs_ask_a_causal_network_once_for_a_path():
    """Truth: `path_log_prob`, and the loss and gradient of a row a step. Twins: pairs exchanged, no gradient, no fewer rows."""
    torch.manual_seed(0)
    model, pairs = causal(), torch.randint(0, VOCABULARY, (2, 6, LENGTH))
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    sampler = sa.Sampler(**model.sampling)
    setting = Setting(model, sampler, Objective(lambda x, prompt: x.sum(1), False), 4, None)
    learner = model.learner(sa.DPO(beta=BETA), setting)
    stops = setting._replace(sampler=sampler.model_copy(update={"off_below": 0.5}))
    kinds = [type(path_ratio(each)) for each in (setting, stops)]
    same(kinds, [CausalRatio, PathRatio], of_a_path_that_is_off=[CausalRatio, CausalRatio])

    def measured(ratio, pairs=pairs):
        before, generator = (model.evaluations.forward, model.evaluations.backward), torch.Generator().manual_seed(0)
        fixed = {"total": 6, "scale": BETA, "reference": learner.pretrained, "generator": generator}
        (term,) = pair_update(learner, ratio, pairs, torch.zeros(6, dtype=torch.long), **fixed).terms
        values, figures = term.loss(torch.arange(len(term.rows)))
        gradient = torch.autograd.grad(values.mean(), list(model.parameters.values()))
        cost = model.evaluations.forward - before[0], model.evaluations.backward - before[1]
        return figures["margin"][:6], torch.cat([part.flatten() for part in gradient]), cost

    (margin, gradient, cost), (truth, whole, many) = measured(CausalRatio()), measured(PathRatio(True))
    with torch.no_grad():
        win, lose = (model.path_log_prob(x) - model.path_log_prob(x, reference=True) for x in pairs)
    close(margin, BETA * (win - lose), atol=1e-5, exchanged=BETA * (lose - win))
    close(margin, truth, atol=1e-5, exchanged=measured(CausalRatio(), pairs.flip(0))[0])
    close(gradient, whole, atol=1e-5, none=0 * whole)
    same(many, tuple(LENGTH * count for count in cost), no_fewer=cost)


@pytest.mark.parametrize(("spread", "t"), [(1.0, 0.5), (1.5, 0.25), (1.5, 0.5), (1.5, 0.8)])
def test_soft_tails_are_masked_evenly_and_before_them_nothing_is(spread, t):
    """`N/W` in the last W positions. Twin: N/L everywhere, the next spread."""
    length, n = 16, 20_000
    masks = max(1, int(length * t))
    tail = min(length, int(spread * masks))
    truth = np.where(np.arange(length) >= length - tail, masks / tail, 0.0)
    x0, times = torch.zeros(n, length, dtype=torch.long), torch.full((n,), t)
    masked = soft_tail_masking(x0, times, torch.Generator().manual_seed(0), mask=2, spread=spread) == 2
    even = np.full(length, masks / length)
    close(masked.double().mean(0), truth, atol=0.015, even=even if tail < length else truth / 2)
    same(masked.sum(1).unique().tolist(), [masks], one_more=[masks + 1])


def test_averaged_over_t_the_last_positions_are_masked_most():
    """At L = 64 and spread 1.5: .27, .49 and .74 of the time at the first, middle and last position."""
    x0, t = torch.zeros(20_000, 64, dtype=torch.long), (torch.arange(20_000) + 0.5) / 20_000
    shares = (soft_tail_masking(x0, t, torch.Generator().manual_seed(0), mask=2) == 2).double().mean(0)
    close(shares[[0, 31, 63]], [0.267, 0.49, 0.738], atol=0.012, even=[0.5, 0.5, 0.5])


def test_context_weights_are_sums_over_what_is_missing_before():
    """`1/(1 + sum_{i<n} C_i (1-p)^(n-1-i))`. Twins: with the position itself; a power more."""
    masked = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    m = masked.numpy().astype(float)
    cost = m * (1 + np.pad(m, ((0, 0), (1, 0)))[:, :-1])

    def weights(shift, power):
        sums = [sum(cost[:, i] * 0.5 ** (n - 1 - i + power) for i in range(min(40, n + shift))) for n in range(40)]
        return 1 / (1 + np.stack([np.broadcast_to(s, (5,)) for s in sums], 1))

    close(context_weights(masked), weights(0, 0), atol=1e-6, itself=weights(1, 0), one_power_more=weights(0, 1))
    logits, x0 = torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(5, 40, dtype=torch.long)
    errors = -torch.log_softmax(logits, 2)[..., 0].numpy()
    truth = (weights(0, 0) * errors).sum() / weights(0, 0).sum()
    close(
        causal_loss(logits, x0, masked), truth, atol=1e-5, unweighted=errors.mean(), not_normalised=truth * weights(0, 0).mean()
    )


@cache
def threshold_law(threshold):
    """The law of showing all that is surer than a threshold, else the first, by enumeration; and the mean of calls."""
    model = exact_model()
    space = model.net.law.space
    probabilities = model.predict(space.states, torch.tensor(0.5)).log_prob.detach().exp().numpy()
    visits, calls = np.zeros(len(space.states)), 0.0
    visits[-1] = 1
    for state in np.argsort(-space.masked.sum(1).numpy(), kind="stable"):
        places = np.flatnonzero(space.masked[state])
        if visits[state] == 0 or not len(places):
            continue
        calls += visits[state]
        shown = [i for i in places if i == places[0] or probabilities[state, i].max() > threshold]
        following = {int(state): visits[state]}
        for i in shown:
            following = {
                int(space.filled(torch.tensor([number]))[0, i, v]): mass * probabilities[state, i, v]
                for number, mass in following.items()
                for v in range(VOCABULARY)
            }
        for number, mass in following.items():
            visits[number] += mass
    return visits[~space.masked.any(1).numpy()], calls


@pytest.mark.slow
def test_threshold_decoding_has_its_own_law_in_fewer_calls():
    """By enumeration. Twins: the law itself, the decoding of another threshold."""
    model, n = exact_model(), 20_000
    law, calls = threshold_law(0.7)
    assert calls < LENGTH - 0.3, calls
    assert np.abs(law - LAW).sum() / 2 > 0.05, "it is another law"
    close(np.abs(threshold_law(1.01)[0] - LAW).sum(), 0.0, atol=1e-5, lower=np.abs(law - LAW).sum())
    powers = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)

    def drawn(threshold):
        x0 = sa.sample(model, n=n, threshold=threshold)
        return (torch.bincount((x0 * powers).sum(1), minlength=len(LAW)).double() / n).numpy()

    def near(found):
        assert np.abs(found - law).sum() / 2 < 0.03

    accepts(near, drawn(0.7), one_by_one=drawn(1.0))


REFUSED = {
    "sampler.solver: a causal network ignores what one_by_one shows": lambda: sa.sample(causal(), n=1, solver="one_by_one"),
    "sampler.solver: a causal network ignores what ancestral": lambda: sa.sample(causal(), n=1, solver="ancestral", steps=2),
    "sampler.solver: a causal network ignores what confident": lambda: sa.sample(causal(), n=1, solver="confident"),
    "threshold: must be above 0": lambda: sa.sample(causal(), n=1, threshold=0.0),
    "threshold: decodes models whose tokens": lambda: sa.sample(
        sa.MaskedModel(network(), process=sa.Masking(3), length=4), n=1, threshold=0.9
    ),
    "algorithm.name: ddpp masks tokens anywhere": lambda: sa.Finetuner(
        causal(), reward=lambda x, p: x.sum(1), algorithm=sa.DDPP()
    ),
    "width: must be a multiple of heads": lambda: CausalTransformer(3, 4, width=10, heads=4),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_causal_model_cannot_do_is_refused(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        REFUSED[message]()
