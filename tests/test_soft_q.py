"""Truth: Tweedie's formula and the exact soft value on mixtures, the deterministic chain on Gaussians, autograd by hand."""

import pytest
import torch
from affine import LAW, REWARD, model, none, points, setting
from oracles.linear_quadratic import ScalarLQ
from torch import nn
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms._setting import Objective
from scoreaction.algorithms._soft_q import Belief, clean_sample, soft_q
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.diffusion.predictions import from_prediction
from scoreaction.models import gaussian_mixture
from scoreaction.networks.layers import VectorNet

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


# An eps network near pure noise


@pytest.mark.parametrize("process", [VP, sa.VE(), sa.TableVP.scaled_linear()], ids=lambda process: type(process).__name__)
def test_of_gaussian_samples_the_belief_is_the_posterior_mean_itself(process):
    """`g = m + alpha v/(alpha^2 v + sigma^2) (x - alpha m)` at every t. Twins: no mean, variance 1."""
    generator = torch.Generator().manual_seed(0)
    samples = 2.0 + 0.5 * torch.randn(4000, 3, generator=generator, dtype=F64)
    belief, t = Belief(process, (3,)).double(), torch.linspace(0.01, 1, 50, dtype=F64)
    belief.calibrate(samples)
    belief.calibrate(samples + 1)  # and stays
    alpha, sigma2 = process.alpha(t)[:, None], process.sigma2(t)[:, None]
    x = alpha * samples[:50] + sigma2.sqrt() * torch.randn(50, 3, generator=generator, dtype=F64)

    def mean(m, v):
        return m + alpha * v / (alpha**2 * v + sigma2) * (x - alpha * m)

    own = mean(samples.mean(0), samples.var(0, correction=0).mean())
    close(belief(own, x, t), own, atol=1e-5, centred=mean(0.0, 0.25), wide=mean(2.0, 1.0))


def test_a_belief_ends_three_deviations_from_the_line():
    """By hand, at alpha = sigma of Flow with samples N(0, 1/4): D = 3, so `3 sqrt(3/4 * 4/5)`, weighed by `1/(1 + .05 * 4)`.

    Twins: x0_hat believed as it is, and one that is not weighed.
    """
    process, t = sa.Flow(), torch.full((2,), 0.5, dtype=F64)
    belief = Belief(process, (3,)).double()
    belief.variance.fill_(0.25)
    x = torch.zeros(2, 3, dtype=F64)  # where the line is 0 too
    far, near = torch.tensor([[100.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=F64)
    reach, weight = 3 * (3 / 4 * 4 / 5) ** 0.5, 1 / (1 + 0.05 * 4)
    found = belief(torch.stack([far, near]), x, t)[:, 0]
    close(found, [weight * reach, weight], atol=1e-9, whole=[weight * 100, weight], not_weighed=[reach, 1.0])


def test_an_error_of_eps_does_not_grow_near_pure_noise():
    """Truth: the exact posterior mean of the mixture, at SD's and DDPM's last times. Twin: x0_hat as the network has it."""
    law, generator = gaussian_mixture.Config().law(), torch.Generator().manual_seed(0)
    for process in (VP, sa.TableVP.scaled_linear()):
        belief, t = Belief(process, (2,)), torch.tensor([1.0, 0.9, 0.2, 0.02], dtype=F64).repeat_interleave(500)
        belief.calibrate(law.sample(2000, generator).float())
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        eps = torch.randn(2000, 2, generator=generator, dtype=F64)
        x = alpha * law.sample(2000, generator) + sigma * eps
        exact = law.prediction(process, x, t).x0
        wrong = (exact - 0.2 * sigma / alpha * torch.sin(2 * x.flip(1))).float()

        def near(x0_hat, exact=exact):
            error = (x0_hat - exact).square().sum(1).reshape(4, -1).mean(1).sqrt()
            assert bool((error < 1.0).all()), error

        accepts(near, belief(wrong, x.float(), t), raw=wrong)


class Crooked(nn.Module):
    """The mixture's exact prediction with an error of 0.1, plus a perceptron that begins at 0."""

    def __init__(self, predicts):
        super().__init__()
        torch.manual_seed(0)
        self.law, self.predicts, self.net = gaussian_mixture.Config().law(), predicts, VectorNet(VP, 2, 2)
        nn.init.zeros_(self.net.last.weight)
        nn.init.zeros_(self.net.last.bias)

    def forward(self, x, t, cond):
        exact = from_prediction(VP, self.predicts, t.double(), self.law.prediction(VP, x, t.double()))
        return exact + 0.1 * torch.sin(2 * x.flip(1)) + self.net(x, t)


@pytest.mark.slow
def test_sqdf_of_an_eps_network_goes_no_further_than_that_of_a_v_network():
    """Twin: the soft Q of x0_hat as an eps network has it, which runs away."""
    reward = sa.Reward(lambda x, _: -(x - torch.tensor([2.0, 0.0])).square().sum(1) / 4, differentiable=True)

    def farthest(predicts, *, believes=True):
        made = sa.Model(Crooked(predicts), process=VP, predicts=predicts, shape=(2,))
        train = sa.Train(iterations=12, batch=64, lr=2e-3, device="cpu")
        sqdf, sampler = sa.SQDF(beta=0.5, updates=8), sa.Sampler(steps=15)
        tuner = sa.Finetuner(made, reward=reward, algorithm=sqdf, sampler=sampler, train=train)
        if not believes:
            tuner.learner.belief = None
        return max(metrics["kl_nats"] for metrics in tuner)

    truth = farthest("v")

    def holds(nats):
        assert nats < 2 * truth, (nats, truth)

    accepts(holds, farthest("eps"), as_it_is=farthest("eps", believes=False))
