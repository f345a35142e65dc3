"""The loop's part of an update. Truth: the gradient and the figures of all rows at once, by hand."""

import math
import re

import pytest
import torch
from driving import count, evaluated, total
from parameters import with_slow
from torch import nn
from tuning import ALGORITHMS, reward_of, tune
from twins import accepts, close

import scoreaction as sa
from scoreaction.algorithms._updates import Largest, Term, Update
from scoreaction.training.errors import TrainingError, check_first_ratio
from scoreaction.training.optimizer import Optimisation, Train


class Weights(nn.Module):
    """`w x`, whose parameter has a gradient that is known."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, x, t, cond):
        return self.w * x


def optimisation(max_rows=None, **networks):
    model = sa.Model(Weights(), process=sa.VP(), predicts="eps", shape=(2,))
    model.max_rows = max_rows
    return Optimisation(Train(), model, networks, dict.fromkeys(networks, 1e-3), scaled=False)


A, B = (torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows)) for rows in (23, 10))


def term(net, x, *, calls=1, sizes=None, power=2):
    """The mean of `sum (w x)^power` over these rows, with a figure that is averaged and one of which the largest is kept."""

    def loss(numbers):
        (sizes if sizes is not None else []).append(len(numbers))
        y = (net.w * x[numbers]).sum(1)
        return y**power, {"mean": y, "largest": Largest(y)}

    return Term(len(x), loss, calls)


def two_terms(net, **options):
    return Update("policy", [term(net, A, calls=3, **options), term(net, B, power=1, **options)])


def backward(optimisation, update):
    """The gradient that an update leaves, and its figures."""
    figures = optimisation._backward(update, 0)
    return optimisation.model.net.w.grad.clone(), figures


@pytest.mark.parametrize("max_rows", [1, 7, 22, None])
def test_the_gradient_and_the_figures_do_not_depend_on_max_rows(max_rows):
    """Of two terms, one of which calls the network three times a row; a mean of the parts' means is another number."""
    here = optimisation(max_rows)
    net = here.model.net
    update = two_terms(net)
    truth = torch.autograd.grad(total(update), net.w)[0]
    y = (net.w * A).sum(1).detach()
    parts = [2 * (y[rows, None] * A[rows]).mean(0) for rows in torch.arange(23).split(5)]
    first = torch.stack(parts).mean(0)  # the last part has three rows and would count as five
    grad, figures = backward(here, update)
    close(grad, truth, atol=1e-5, first_alone=first, summed=truth * 23, of_equal_parts=first + B.mean(0))
    means, largest = [(net.w * x).sum(1).detach().double().mean() for x in (A, B)], [(net.w * x).sum(1).max() for x in (A, B)]
    close(figures["mean"], sum(means), atol=1e-6, first=means[0], both_as_one=(23 * means[0] + 10 * means[1]) / 33)
    close(figures["largest"], max(largest).detach(), smallest=min(largest).detach(), mean=means[0])


def test_a_term_that_calls_the_network_more_often_has_smaller_parts():
    """max_rows is of one call: three calls with a graph keep three calls' activations; a critic's term is not split by it."""
    for max_rows, truth in ((7, [2] * 11 + [1] + [7, 3]), (1, [1] * 33), (22, [7, 7, 7, 2, 10]), (None, [23, 10])):
        here, sizes = optimisation(max_rows), []
        backward(here, two_terms(here.model.net, sizes=sizes))

        def split(value, truth=truth):
            assert value == truth

        accepts(split, sizes, as_one_call=[7, 7, 7, 2, 7, 3], other_order=[*sizes[1:], 0])
    here, sizes = optimisation(7), []
    backward(here, Update("policy", [term(here.model.net, A, calls=0, sizes=sizes)]))
    assert sizes == [23]


def test_the_largest_is_that_of_all_parts_whatever_their_order():
    values = torch.tensor([-5.0, -3.0, -1.0, -2.0, -4.0])
    here = optimisation(1)

    def loss(numbers):
        return here.model.net.w.sum() * torch.ones(len(numbers)), {"largest": Largest(values[numbers])}

    figures = here._backward(Update("policy", [Term(5, loss)]), 0)
    close(figures["largest"], -1.0, last=values[-1], first=values[0], above_zero=0.0, mean=values.mean())


def test_a_term_without_rows_adds_nothing():
    """As where every step has a ratio and none is left for the KL alone."""
    here = optimisation()
    net = here.model.net
    called = []
    empty = Term(0, called.append)
    grad, figures = backward(here, Update("policy", [term(net, B), empty]))
    close(grad, torch.autograd.grad(total(Update("policy", [term(net, B)])), net.w)[0], none=torch.zeros(2))
    assert (called, set(figures)) == ([], {"mean", "largest"})


def test_every_update_steps_its_own_network_and_gets_its_figures():
    """The generator goes on after the step, with the figures of what it yielded."""
    critic = nn.Linear(2, 1)
    here, sent, seen = optimisation(7, critic=critic), [], []
    net = here.model.net

    def updates():
        def regression(numbers):
            error = critic(A[numbers]).squeeze(1) ** 2
            return error, {"critic_loss": error}

        for update in (Update("critic", [Term(23, regression, 0)]), two_terms(net)):
            weights = [p.detach().clone() for p in (critic.weight, net.w)]
            sent.append((yield update))
            seen.append([not torch.equal(a, b) for a, b in zip(weights, (critic.weight, net.w), strict=True)])

    before = (critic(A).squeeze(1) ** 2).detach().mean()
    figures = here.learn(updates(), 0, equal=False)

    def own_alone(moved):
        assert moved == [[True, False], [False, True]]

    accepts(own_alone, seen, both=[[True, True]] * 2, before_the_step=[[False, False]] * 2)
    close(sent[0]["critic_loss"], before, after_the_step=(critic(A).squeeze(1) ** 2).detach().mean())
    assert set(sent[1]) == {"mean", "largest"}
    assert figures["critic_loss"] == sent[0]["critic_loss"]
    assert set(figures) == {"grad_norm", "critic_loss", "mean", "largest"}


def test_figures_of_several_updates_are_averaged():
    """In the log an update counts once, whatever its rows."""
    here = optimisation()
    net = here.model.net

    def updates():
        for rows, value in ((1, 4.0), (3, 8.0)):

            def loss(numbers, value=value):
                return net.w.sum() * torch.ones(len(numbers)), {"figure": torch.full((len(numbers),), value)}

            yield Update("policy", [Term(rows, loss)])

    close(here.learn(updates(), 0, equal=False)["figure"], 6.0, by_rows=7.0, last=8.0, summed=12.0)


NO_UPDATES = [("policy", []), None, Term(1, lambda numbers: (numbers, {})), Update("policy", []), Update("policy", [3])]


@pytest.mark.parametrize("wrong", NO_UPDATES, ids=["tuple", "None", "Term", "no terms", "number"])
def test_what_is_no_update_is_refused_with_words(wrong):
    def updates(value):
        yield value

    message = r"updates must yield Update\(network, \[Term\(rows, loss\), \.\.\.\]\), and gave "
    with pytest.raises(TypeError, match=message):
        optimisation().learn(updates(wrong), 0, equal=False)
    here = optimisation()
    here.learn(updates(two_terms(here.model.net)), 0, equal=False)
    with pytest.raises(TypeError, match="updates must be a generator, `yield Update\\(...\\)`, and gave list"):
        here.learn([two_terms(here.model.net)], 0, equal=False)


@pytest.mark.parametrize("network", ["policy", "critic"])
def test_a_loss_without_a_gradient_names_its_network(network):
    here = optimisation(critic=nn.Linear(2, 1))

    def updates(detached):
        weights = here.model.net.w if network == "policy" else next(iter(here.optimisers["critic"].param_groups[0]["params"]))
        value = weights.detach() if detached else weights
        yield Update(network, [Term(4, lambda numbers: (value.sum() * torch.ones(len(numbers)), {}))])

    with pytest.raises(TrainingError, match=rf"iteration 3: the {network} received no gradient; check that") as error:
        here.learn(updates(True), 2, equal=False)
    assert "\n" not in str(error.value)
    assert math.isfinite(here.learn(updates(False), 2, equal=False)["grad_norm"])


@pytest.mark.parametrize("name", with_slow(ALGORITHMS, "score_action", "score_action_prompts"))
def test_the_loss_of_every_algorithm_is_a_function_of_its_rows(name):
    """The same in parts, in any order and again: all that is drawn is drawn before, so that memory changes no run."""
    algorithm, prompts = ALGORITHMS[name]
    tuner = tune(algorithm, prompts=prompts, reward=reward_of(name))
    rollout, _ = tuner._collect()
    updates = tuner.learner.updates(rollout, tuner.generator)
    update, networks = next(updates), set()
    try:
        while True:
            networks.add(update.network)
            for rows, loss in ((count(term.rows), term.loss) for term in update.terms):
                order = torch.arange(rows).flip(0)
                values = loss(torch.arange(rows))[0].detach()
                parts = torch.cat([loss(part)[0].detach() for part in order.split(5)]) if rows else values
                assert values.shape == (rows,)
                if len(values.unique()) > 1:  # a critic's two rows may be one, drawn twice
                    close(parts, values[order], rtol=1e-4, atol=1e-4 * float(values.abs().max()), in_order=values)
            update = updates.send(evaluated(update)[1])
    except StopIteration:
        assert networks == {"policy", *tuner.learner.lr}


@pytest.mark.parametrize("wrong", ["loss", "figure", "largest"])
def test_a_mean_in_the_place_of_a_number_a_row_is_refused(wrong):
    """The loop takes the mean over all rows: of a mean over a part it would learn a share, and log it."""
    here = optimisation(7)

    def updates(right):
        def loss(numbers):
            y = (here.model.net.w * A[numbers]).sum(1)
            mean = {name: y if right or name != wrong else y.mean() for name in ("loss", "figure", "largest")}
            return mean["loss"], {"figure": mean["figure"], "largest": Largest(mean["largest"])}

        yield Update("policy", [Term(23, loss)])

    named = "the loss" if wrong == "loss" else f"the figure '{wrong}'"
    with pytest.raises(ValueError, match=rf"updates: {named} of 7 rows must have one number for each, and has shape \(\)"):
        here.learn(updates(False), 0, equal=False)
    here.learn(updates(True), 0, equal=False)


def test_a_network_without_a_rate_is_named():
    here = optimisation(critic=nn.Linear(2, 1))

    def updates(name):
        yield Update(name, [term(here.model.net, A)])

    with pytest.raises(ValueError, match="updates: 'actor' is not trained; choose from policy, critic"):
        here.learn(updates("actor"), 0, equal=False)
    here.learn(updates("policy"), 0, equal=False)


def test_a_loss_that_runs_out_of_something_is_no_end_of_the_updates():
    """A StopIteration of the loss was taken for that of the generator: nothing learned, and no word of it."""
    here = optimisation()
    source = iter([1.0])

    def updates():
        for _ in range(2):
            yield Update("policy", [Term(23, lambda numbers: (next(source) * (here.model.net.w * A[numbers]).sum(1), {}))])

    with pytest.raises(RuntimeError, match="StopIteration"):
        here.learn(updates(), 0, equal=False)


REASON = "iteration 1: the policy that trains is not the one that sampled: .* log-ratio is [1-9].*scoreaction doctor"


class Grown(nn.Module):
    """`w x`, and more where a graph is built: what samples is not what trains."""

    def __init__(self, more):
        super().__init__()
        self.w, self.more = nn.Parameter(torch.tensor([0.5, -1.0])), more

    def forward(self, x, t, cond):
        return (self.w + (self.more if torch.is_grad_enabled() else 0.0)) * x


@pytest.mark.parametrize("algorithm", [sa.DDPO(), sa.DPOK(beta=0.5), sa.ScoreAction(beta=0.5, estimator="likelihood_ratio")])
@pytest.mark.slow
def test_a_policy_that_trains_and_is_not_the_one_that_sampled_stops_the_run(algorithm):
    """Before the first step, with the reason. Twin: the network that is the same in both, whose run ends."""

    def stops(more):
        model = sa.Model(Grown(more), process=sa.VP(), predicts="v", shape=(2,))
        before = model.net.w.detach().clone()
        train = sa.Train(iterations=1, batch=64, device="cpu")
        tuner = sa.Finetuner(model, reward=lambda x, _: x[:, 0], algorithm=algorithm, sampler=sa.Sampler(steps=5), train=train)
        try:
            list(tuner)
            said = "it goes on"
        except TrainingError as error:
            said = str(error)
        assert re.match(REASON, said), said
        assert torch.equal(model.net.w, before)

    accepts(stops, 1.0, the_same=0.0)


def test_the_first_ratio_may_be_as_far_as_rounding():
    """Truth: of two Gaussian laws K nats apart the log-ratio is N(K, 2 K): a million draws never stop. Twin: a floor of 0."""

    def never_stops(floor):
        nats, generator = 0.3, torch.Generator().manual_seed(0)
        ratios = nats + math.sqrt(2 * nats) * torch.randn(1_000_000, generator=generator)
        try:
            check_first_ratio(float(ratios.abs().max()), floor, 0)
        except TrainingError as error:
            raise AssertionError from error

    accepts(never_stops, 0.3, no_rounding=0.0)
    for undefined in (math.nan, math.inf):
        with pytest.raises(TrainingError, match="not the one that sampled"):
            check_first_ratio(undefined, 0.3, 0)
