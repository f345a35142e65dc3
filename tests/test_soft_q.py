"""Truth: Tweedie's formula and the exact soft value on mixtures, the deterministic chain on Gaussians, autograd by hand."""

import pytest
import torch
from affine import LAW, REWARD, model, none, points, setting
from oracles.linear_quadratic import ScalarLQ
from twins import F64, close, f64

import scoreaction as sa
from scoreaction.algorithms._learner import Objective
from scoreaction.algorithms._soft_q import clean_sample, soft_q
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.models import gaussian_mixture

VP = sa.VP()


def on(made, reward, **options):
    """A learner of this reward, and the number of rows of each of its queries."""
    queries = []

    def score(x0, prompt):
        queries.append(len(x0))
        return reward(x0)

    return sa.SQDF().build(setting(made, **options)._replace(reward=Objective(score, True))), queries


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_it_is_the_reward_of_the_posterior_mean_and_not_the_soft_value(process):
    """On the recipe's mixture; the known bias, `beta log E exp(r/beta) - r(E x0)`, is large at noise and gone at data."""
    made = gaussian_mixture.build(gaussian_mixture.Config(process=process))
    made.reference_net.double()
    reward, law, beta = Quadratic.linear([1.0, 0.5]), made.law, 0.5
    agent, _ = on(made, reward)
    biases = []
    for t in (0.5, 0.05, 0.01):
        x = law.noised(made.process, f64(t)).sample(200, torch.Generator().manual_seed(0)).double()
        value, grad, x0 = soft_q(agent, points(x, torch.full((200,), t)), gradient=True)
        leaf = x.clone().requires_grad_()
        truth = reward(law.prediction(made.process, leaf, f64(t)).x0)
        exact = law.value(reward, beta, made.process, x, f64(t))
        close(value, truth.detach(), atol=1e-6, at_x=reward(x), soft_value=exact)
        close(x0, law.prediction(made.process, x, f64(t)).x0, atol=1e-6, x_itself=x)
        close(grad, torch.autograd.grad(truth.sum(), leaf)[0], atol=1e-5, at_x=f64([1.0, 0.5]).expand(200, 2))
        biases.append(float((exact - value).mean()))
    assert all(bias > 0 for bias in biases)  # Jensen

    def vanishes(bias):
        assert bias < 0.02 < biases[0]

    vanishes(biases[2])
    with pytest.raises(AssertionError):
        vanishes(biases[0])


def test_at_the_data_it_is_the_reward_and_no_network_is_evaluated():
    made = model(VP)
    agent, queries = on(made, REWARD)
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    value, grad, x0 = soft_q(agent, points(x, torch.zeros(5)), gradient=True)
    close(value, REWARD(x), of_the_mean=REWARD(LAW.prediction(VP, x, f64(0.3)).x0))
    close(grad, 1.2 - x, sign=x - 1.2)
    close(x0, x, of_the_mean=LAW.prediction(VP, x, f64(0.3)).x0)
    assert (made.evaluations.forward, queries) == (0, [5])


def test_parts_and_a_value_without_gradient():
    """Rows of both kinds, in parts: the same numbers; there is no query of no rows; without gradient nothing goes back."""
    x, t = torch.linspace(-1, 1, 7, dtype=F64)[:, None], f64([0.5, 0.0, 0.2, 0.0, 0.9, 0.1, 0.3])
    (whole, at_once), (parts, split), (above, one) = (on(model(VP), REWARD, max_rows=rows) for rows in (None, 2, 2))
    value, grad, x0 = soft_q(whole, points(x, t), gradient=True)
    for part, truth in zip(soft_q(parts, points(x, t), gradient=True), (value, grad, x0), strict=True):
        close(part, truth, atol=1e-12, other_rows=truth.flip(0))
    assert (at_once, split) == ([5, 2], [2, 2, 1, 2])
    only, slope, _ = soft_q(above, points(x[:1], t[:1]), gradient=False)
    close(only, value[:1], atol=1e-12, last=value[-1:])
    assert one == [1]
    assert (above.model.evaluations.forward, above.model.evaluations.backward) == (1, 0)
    assert float(slope.abs().max()) == 0
    assert whole.model.evaluations.backward == 5


def test_each_row_is_scored_for_its_own_prompt():
    """Rows of both kinds are taken apart and put back with their prompts."""
    fixed = setting(model(VP))._replace(reward=Objective(lambda x0, prompt: REWARD(x0) + 10 * prompt, True))
    x, t, prompt = torch.linspace(-1, 1, 5, dtype=F64)[:, None], f64([0.5, 0.0, 0.2, 0.0, 0.9]), torch.tensor([4, 1, 0, 3, 2])
    agent = sa.SQDF().build(fixed)
    shift = soft_q(agent, points(x, t)._replace(prompt=prompt), gradient=False).value
    shift = shift - soft_q(agent, points(x, t)._replace(prompt=none(5)), gradient=False).value
    close(shift, 10.0 * prompt, atol=1e-9, in_order_of_kinds=10.0 * prompt[[0, 2, 4, 1, 3]], other=10.0 * prompt.roll(1))


@pytest.mark.parametrize("process", [VP, sa.Flow()], ids=["VP", "Flow"])
def test_more_steps_of_the_predictor_are_its_deterministic_chain(process):
    """n - 1 DDIM steps at eta 0 of Gaussian data, each an affine map, then the posterior mean."""
    (agent, _), lq = on(model(process), REWARD), ScalarLQ(process, m=0.3, v=0.8, eta=0.0)
    x = f64([[-1.0], [0.5], [2.0]])
    for start in (1.0, 0.6):

        def closed(n, start=start):
            y, times = x, torch.linspace(start, start / n, n, dtype=F64)
            for A, b, _ in lq.steps(times):
                y = A * y + b
            return LAW.prediction(process, y, times[-1]).x0

        at = points(x, f64([start] * 3))
        for n in (1, 2, 4):
            close(clean_sample(agent, at, consistency=False, steps=n), closed(n), atol=1e-9, one_more=closed(n + 1))
