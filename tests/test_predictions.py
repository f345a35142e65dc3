"""Truth: x, x0 and eps drawn first; every kind of prediction must give them back."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins import F64, accepts, close, f64

from scoreaction.diffusion.predictions import Predicts, expand, from_prediction, row, score, to_prediction
from scoreaction.diffusion.processes import VE, VP, CosineVP, Flow, TableVP
from scoreaction.types import Prediction

KINDS = get_args(Predicts)
PROCESSES = [VP(), CosineVP(), TableVP.scaled_linear(), VE(), Flow()]


def draw(process, t, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, *shape, generator=generator, dtype=F64)
    return expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * eps, Prediction(x0, eps)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    process=st.sampled_from(PROCESSES),
    times=st.lists(st.floats(0.02, 0.98), min_size=4, max_size=4),
    shape=st.sampled_from([(4, 4), (4, 1), (4, 4, 4), (4, 3, 2, 2)]),
    seed=st.integers(0, 1000),
)
def test_round_trip(kind, process, times, shape, seed):
    t = f64(times)
    x, truth = draw(process, t, shape, seed)
    y = from_prediction(process, kind, t, truth)
    back = to_prediction(process, kind, x, t, y)
    size = max(1.0, float(x.abs().max()))
    close(back.x0 / size, truth.x0 / size, atol=1e-9, noise=truth.eps / size)
    close(back.eps / size, truth.eps / size, atol=1e-7, clean=truth.x0 / size)


def test_batch_of_four_by_four_does_not_broadcast_sideways():
    process, t = VP(), f64([0.1, 0.3, 0.6, 0.9])
    x, truth = draw(process, t, (4, 4))

    def check(coefficient):
        for i in range(4):
            one = from_prediction(process, "v", t[i], Prediction(truth.x0[i : i + 1], truth.eps[i : i + 1]))
            row_i = (process.alpha(t) * 0 + coefficient(process.alpha(t), truth.eps) * truth.eps)[i] - (
                coefficient(process.sigma(t), truth.x0) * truth.x0
            )[i]
            assert torch.allclose(row_i, one[0], atol=1e-12)

    accepts(check, expand, along_the_last_dimension=lambda coefficient, like: coefficient)
    with pytest.raises(ValueError, match="expected a coefficient"):
        expand(torch.ones(3, dtype=F64), x)
    with pytest.raises(ValueError, match="expected a coefficient"):
        expand(torch.ones(4, 4, dtype=F64), x)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_rows_are_their_definitions(process):
    t = f64([0.2, 0.7])
    x, truth = draw(process, t, (2, 3))
    a, s = expand(process.alpha(t), x), expand(process.sigma(t), x)
    close(
        from_prediction(process, "v", t, truth), a * truth.eps - s * truth.x0, atol=1e-12, negative=s * truth.x0 - a * truth.eps
    )
    conditional = -(x - a * truth.x0) / s**2  # score of p(x_t | x0)
    close(from_prediction(process, "score", t, truth), conditional, rtol=1e-9, noise=truth.eps)
    close(score(process, t, truth), conditional, rtol=1e-9, wrong_sign=truth.eps / s)
    h = 1e-6
    path = [expand(process.alpha(t + d), x) * truth.x0 + expand(process.sigma(t + d), x) * truth.eps for d in (h, -h)]
    velocity = (path[0] - path[1]) / (2 * h)
    close(from_prediction(process, "velocity", t, truth), velocity, atol=1e-5, rtol=1e-5, towards_data=-velocity)


def test_flow_velocity_is_noise_minus_data_even_at_the_ends():
    for time in (0.0, 0.5, 1.0):
        t = f64(time)
        x, truth = draw(Flow(), t, (3, 2))
        velocity = truth.eps - truth.x0
        close(from_prediction(Flow(), "velocity", t, truth), velocity, atol=1e-12, towards_data=-velocity)
        back = to_prediction(Flow(), "velocity", x, t, velocity)
        close(back.x0, truth.x0, atol=1e-12, eps=truth.eps)
        close(back.eps, truth.eps, atol=1e-12, x0=truth.x0)


def test_singular_ends_are_not_hidden():
    t = f64(1.0)
    x, truth = draw(Flow(), t, (3, 2))

    def not_finite(prediction):
        assert not bool(torch.isfinite(prediction.x0).any())

    accepts(not_finite, to_prediction(Flow(), "eps", x, t, truth.eps), velocity=to_prediction(Flow(), "velocity", x, t, x))


@pytest.mark.parametrize("process", [CosineVP(), TableVP((1.0, 0.8, 0.5, 0.2, 0.0)), Flow()], ids=lambda p: type(p).__name__)
def test_a_velocity_says_what_the_sample_is_at_pure_noise(process):
    """There all sampling begins; x is eps alone. Twin: a velocity without its part of x0, by which x0 is 0/0."""
    t = f64(1.0)
    x, truth = draw(process, t, (3, 2))
    y = from_prediction(process, "velocity", t, truth)
    back = to_prediction(process, "velocity", x, t, y)
    without = process.sigma_rate(t) * truth.eps
    close(back.x0, truth.x0, atol=1e-9, without=to_prediction(process, "velocity", x, t, without).x0)
    close(back.eps, truth.eps, atol=1e-9, clean=truth.x0)


def test_dtype_follows_the_sample_and_names_are_checked():
    t = f64([0.3, 0.4])
    x, truth = draw(VP(), t, (2, 3))
    single = to_prediction(VP(), "v", x.float(), t, from_prediction(VP(), "v", t, truth).float())
    assert single.x0.dtype == torch.float32
    close(single.x0, truth.x0, atol=1e-5, noise=truth.eps)
    with pytest.raises(ValueError, match="choose from"):
        row(VP(), "noise", t)
