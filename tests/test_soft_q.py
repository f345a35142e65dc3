"""Truth: Tweedie's formula and the exact soft value on mixtures, the deterministic chain on Gaussians, autograd by hand."""

from dataclasses import replace

import pytest
import torch
from affine import LAW, REWARD, model, points, setting
from oracles.linear_quadratic import ScalarLQ
from twins import F64, close, f64

import scoreaction as sa
from scoreaction.algorithms._learner import Judge
from scoreaction.algorithms._soft_q import clean_sample, soft_q
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.models import gaussian_mixture
from scoreaction.sampling.experience import Points

VP = sa.VP()


def on(made, reward, **options):
    """A learner that asks this reward; its `asked` says of how many rows at a time."""
    asked = []

    def score(x0, groups):
        asked.append(len(x0))
        return reward(x0)

    found = sa.SQDF().build(replace(setting(made, **options), judge=Judge(score, True)))
    found.asked = asked
    return found


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_it_is_the_reward_of_the_posterior_mean_and_not_the_soft_value(process):
    """On the recipe's mixture; the known bias, `beta log E exp(r/beta) - r(E x0)`, is large at noise and gone at data."""
    made = gaussian_mixture.build(gaussian_mixture.Config(process=process))
    made.reference_net.double()
    reward, law, beta = Quadratic.linear([1.0, 0.5]), made.law, 0.5
    found = on(made, reward)
    biases = []
    for t in (0.5, 0.05, 0.01):
        x = law.noised(made.process, f64(t)).sample(200, torch.Generator().manual_seed(0)).double()
        at = Points(x, torch.full((200,), t, dtype=F64), None)
        value, grad, _ = soft_q(found, at, torch.zeros(200, dtype=torch.long), slope=True)
        leaf = x.clone().requires_grad_()
        truth = reward(law.prediction(made.process, leaf, f64(t)).x0)
        exact = law.value(reward, beta, made.process, x, f64(t))
        close(value, truth.detach(), atol=1e-6, at_x=reward(x), soft_value=exact)
        close(grad, torch.autograd.grad(truth.sum(), leaf)[0], atol=1e-5, at_x=f64([1.0, 0.5]).expand(200, 2))
        biases.append(float((exact - value).mean()))
    assert all(bias > 0 for bias in biases)  # Jensen

    def vanishes(bias):
        assert bias < 0.02 < biases[0]

    vanishes(biases[2])
    with pytest.raises(AssertionError):
        vanishes(biases[0])


def test_at_the_data_it_is_the_reward_and_no_network_is_asked():
    made = model(VP)
    found = on(made, REWARD)
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    value, grad, _ = soft_q(found, points(x, torch.zeros(5)), torch.zeros(5, dtype=torch.long), slope=True)
    close(value, REWARD(x), of_the_mean=REWARD(LAW.prediction(VP, x, f64(0.3)).x0))
    close(grad, 1.2 - x, sign=x - 1.2)
    assert (made.evaluations.forward, found.asked) == (0, [5])


def test_pieces_and_a_value_without_gradient():
    """Rows of both kinds, in pieces: the same numbers; nobody is asked about no rows; without slope nothing goes back."""
    x, t = torch.linspace(-1, 1, 7, dtype=F64)[:, None], f64([0.5, 0.0, 0.2, 0.0, 0.9, 0.1, 0.3])
    groups = torch.zeros(7, dtype=torch.long)
    whole, parts, above = on(model(VP), REWARD), on(model(VP), REWARD, max_rows=2), on(model(VP), REWARD, max_rows=2)
    value, grad, _ = soft_q(whole, points(x, t), groups, slope=True)
    split, slopes, _ = soft_q(parts, points(x, t), groups, slope=True)
    close(split, value, atol=1e-12, other_rows=value.flip(0))
    close(slopes, grad, atol=1e-12, other_rows=grad.flip(0))
    assert (whole.asked, parts.asked) == ([5, 2], [2, 2, 1, 2])
    only, none, _ = soft_q(above, points(x[:1], t[:1]), groups[:1], slope=False)
    close(only, value[:1], atol=1e-12, last=value[-1:])
    assert above.asked == [1]
    assert (above.setting.model.evaluations.forward, above.setting.model.evaluations.backward) == (1, 0)
    assert float(none.abs().max()) == 0
    assert whole.setting.model.evaluations.backward == 5


@pytest.mark.parametrize("process", [VP, sa.Flow()], ids=["VP", "Flow"])
def test_more_steps_of_the_predictor_are_its_deterministic_chain(process):
    """n - 1 DDIM steps at eta 0 of Gaussian data, each an affine map, then the posterior mean."""
    found, lq = on(model(process), REWARD), ScalarLQ(process, m=0.3, v=0.8, eta=0.0)
    x = f64([[-1.0], [0.5], [2.0]])
    for start in (1.0, 0.6):

        def closed(n, start=start):
            y, times = x, torch.linspace(start, start / n, n, dtype=F64)
            for A, b, _ in lq.steps(times):
                y = A * y + b
            return LAW.prediction(process, y, times[-1]).x0

        at = points(x, f64([start] * 3))
        for n in (1, 2, 4):
            said = clean_sample(found, at, consistency=False, steps=n)
            close(said, closed(n), atol=1e-9, one_more=closed(n + 1))
