"""Truth: the ODE of Gaussian data in closed form, and many steps of the teacher."""

from __future__ import annotations

import pytest
import torch
from distilling import plain, small
from torch import nn
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.diffusion.predictions import expand, from_prediction
from scoreaction.diffusion.solvers import time_grid
from scoreaction.models import gaussian_mixture, linear_quadratic
from scoreaction.networks.model import Model
from scoreaction.training.distillation import endpoint_errors, follow
from scoreaction.types import Prediction

M, V = 0.3, 0.8


def end(process, x, t):
    """Where the probability-flow ODE of data N(M, V) ends: `m + sqrt(v/P) (x - alpha m)`, P = alpha^2 v + sigma^2."""
    alpha, sigma2 = process.alpha(t), process.sigma2(t)
    return M + expand(torch.sqrt(V / (alpha**2 * V + sigma2)), x) * (x - expand(alpha, x) * M)


def points(process, n=512):
    """(x, t) where the process goes, over all times."""
    generator = torch.Generator().manual_seed(5)
    t = torch.linspace(0.05, 1, n, dtype=torch.float64)
    x0 = M + V**0.5 * torch.randn(n, 1, generator=generator)
    return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * torch.randn(n, 1, generator=generator), t


def within(truth, tolerance):
    def check(value):
        assert float((value - truth).square().mean().sqrt()) < tolerance

    return check


def lq(process="vp", **settings):
    return linear_quadratic.build(linear_quadratic.Config(process=process, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("process", ["vp", pytest.param("flow", marks=pytest.mark.long)])
def test_a_distilled_gaussian_is_the_ode_in_closed_form(process):
    """Tolerance 0.06 (the data's spread is 0.89). Twins: the mean of x0 given x_t, which it began as, and too few steps."""
    torch.manual_seed(0)
    model = lq(process, hidden=64)
    before = lq(process, hidden=64)
    for _ in sa.Distiller(model, sa.Distill(iterations=170, paths=64, lr=5e-3)):
        pass
    for _ in sa.Distiller(before, sa.Distill(iterations=5, paths=64, lr=5e-3)):
        pass
    x, t = points(model.process)
    said = model.consistency(x, t)
    assert not said.requires_grad, "gradients reach no parameter"
    early = before.consistency(x, t)
    accepts(within(end(model.process, x, t), 0.06), said, tweedie=model.reference(x, t).x0, untrained=early)


def test_the_teacher_walks_its_ode():
    """Truth: the closed form at every point of a path. Twin: the stochastic path's law, which forgets where it began."""
    model = lq()
    times = time_grid(model.process, 16, name="log_snr")
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    states = follow(model.reference, model.process, x, times)
    truth = end(model.process, x, times[0])
    accepts(within(truth, 0.02), states[-1], forgets=states[-1].flip(0), stays=states[8])
    finer = follow(model.reference, model.process, x, time_grid(model.process, 64, name="log_snr"))
    error = lambda s: float((s[-1] - truth).abs().max())  # noqa: E731
    assert error(finer) < error(states) / 8  # second order


class Exact(nn.Module):
    """A network that says the end of the ODE."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t, cond):
        t = t.double()
        x0 = end(self.process, x, t)
        sigma = expand(self.process.sigma(t), x)
        return from_prediction(self.process, "v", t, Prediction(x0, (x - expand(self.process.alpha(t), x) * x0) / sigma))


@pytest.mark.parametrize("leap", [1, 3, None])
def test_what_is_learnt_is_consistent_at_every_leap(leap):
    """Truth: the exact consistency function is its own target. Twin: the reference's x0 in its place."""
    loss = {}
    for name in ("exact", "tweedie"):
        model = lq()
        distiller = sa.Distiller(model, sa.Distill(paths=64, steps=32, leap=leap))
        if name == "exact":
            model.consistency_net = Exact(model.process)
        loss[name] = f64(distiller._loss(*distiller._states()).item())
    close(loss["exact"], 0, atol=0.004, tweedie=loss["tweedie"])


def test_small_batches_give_the_gradient_of_the_whole():
    """Truth: one batch. Twin: the sum over batches in place of the mean."""

    def gradient(max_rows):
        distiller = sa.Distiller(plain(), sa.Distill(paths=5, steps=4, leap=2, max_rows=max_rows))
        learned = distiller._states()
        torch.nn.ParameterList(distiller.parameters.values()).requires_grad_(True)
        loss = distiller._backward(*learned)
        return torch.cat([f64([loss]), *[p.grad.double().flatten() for p in distiller.parameters.values()]])

    whole = gradient(100)
    close(gradient(7), whole, atol=1e-6, summed=3 * whole)


@pytest.mark.slow
def test_guidance_of_the_teacher_is_in_it():
    """Truth: the guided reference's own ODE at the prompt's guidance. Twin: the unguided one."""

    class Told(nn.Module):
        """x0 is what it was told: the ODE ends there."""

        def __init__(self):
            super().__init__()
            self.scale, self.process = nn.Parameter(torch.ones(2)), sa.VP()

        def forward(self, x, t, cond):
            return (self.scale * cond[:, None].to(x)).expand_as(x)

    model = Model(Told(), process=sa.VP(), predicts="x0", shape=(2,), null=torch.tensor([1.0]),
                  encode=lambda prompts: torch.tensor([float(p) for p in prompts]))  # fmt: skip
    for _ in sa.Distiller(model, sa.Distill(iterations=100, paths=8, lr=0.05), guidance=2.0, prompts=["3"]):
        pass
    found = model.consistency(torch.zeros(4, 2), f64(0.5), model.conditions(["3"] * 4))
    close(found, torch.full((4, 2), 1 + 2.0 * (3 - 1)), atol=0.1, unguided=torch.full((4, 2), 3.0))
    assert model.consistency_guidance == 2.0


@pytest.mark.long
def test_a_distilled_mixture_is_near_the_ends_of_its_ode():
    """Truth: 100 steps of the teacher. The mean of x0 given x_t, which it begins as, is a twin at every t from 0.6."""
    torch.manual_seed(0)
    model = gaussian_mixture.build(gaussian_mixture.Config())
    for _ in sa.Distiller(model, sa.Distill(iterations=220, paths=32)):
        pass
    errors = endpoint_errors(model, 512)
    for t, ours, tweedie in zip(errors["t"], errors["consistency"], errors["tweedie"], strict=True):
        if t > 0.5:
            close(ours / tweedie, 0, atol=0.4, tweedie=1.0)


def test_an_adapter_that_cannot_learn_is_said_so():
    with pytest.raises(ValueError, match=r"distill\.rank: .*null"):
        next(iter(sa.Distiller(small(), sa.Distill(rank=2, paths=4))))


def test_another_guidance_than_the_teachers_is_refused_when_the_run_is_built():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3, 2)

        def forward(self, x, t, cond):
            return self.last(torch.cat([x, cond[:, None].to(x)], 1))

    def build(guidance, prompts=("1", "2")):
        model = Model(Conditional(), process=sa.VP(), predicts="v", shape=(2,), null=torch.tensor([0.0]),
                      encode=lambda texts: torch.tensor([float(text) for text in texts]))  # fmt: skip
        sa.Distiller(model, guidance=2.0, prompts=["1"])
        return sa.Finetuner(
            model, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), sampler=sa.Sampler(guidance=guidance), prompts=prompts
        )

    build(2.0)
    with pytest.raises(ValueError, match=r"^model\.consistency: was distilled at guidance 2, and sampler\.guidance is 3"):
        build(3.0)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("diffusers")
    from scoreaction.models import digits

    return digits.build(digits.Config(consistency="shipped"))


@pytest.mark.slow
def test_the_shipped_one_of_the_digits_is_near_the_ends_of_its_ode(digits):
    """Truth: 40 steps of the guided teacher. Twin: its x0, at every t above 0.5."""
    assert digits.consistency_guidance == 2.0
    errors = endpoint_errors(digits, 20, guidance=2.0, prompts=list(range(10)), steps=40)
    for t, ours, tweedie in zip(errors["t"], errors["consistency"], errors["tweedie"], strict=True):
        if t > 0.5:
            close(ours / tweedie, 0, atol=0.45, tweedie=1.0)
        assert ours < tweedie


class Towards(nn.Module):
    """A network whose prediction of x0 is the prompt's condition: a path of the ODE ends there."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return self.w * cond.expand_as(x)


def test_each_state_of_a_path_has_the_prompt_of_the_path():
    model = sa.Model(
        Towards(), process=sa.VP(), predicts="x0", shape=(2,), encode=lambda p: torch.tensor([[float(x)] for x in p])
    )
    states, ends = sa.Distiller(model, sa.Distill(paths=7, steps=4), prompts=["1", "2", "3"])._states()
    close(ends[:, 0], states.prompt + 1.0, atol=1e-3, of_the_next_path=states.prompt.roll(1) + 1.0)
