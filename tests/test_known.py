"""Truth: the conditional of a Gaussian, and of kernels at a table's rows; its guided chain in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.solvers import ddim_step, noise_std, time_grid
from scoreaction.errors import UserError
from scoreaction.models import from_data, gaussian_mixture
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.sampling.known import Known, Likelihood
from scoreaction.training.rehearsal import steering_demand

RHO, Y, TAU = 0.5, 1.5, 0.1
LAW = Mixture(f64([1.0]), f64([[0.0, 0.0]]), f64([[[1.0, RHO], [RHO, 1.0]]]))
KNOWN = Known(values=[Y, None], std=TAU)


def gaussian():
    """Two coordinates of deviation 1, of which the first tells something of the second."""
    torch.manual_seed(0)
    process = sa.VP()
    return sa.Model(gaussian_mixture.ExactPlusNet(LAW, process, 8, 1), process=process, predicts="v", shape=(2,), law=LAW)


def conditional():
    """Mean and variance of the second coordinate where the first is 1.5 with an error of 0.1: the tilted law."""
    tilted = LAW.tilted(Likelihood.of(gaussian(), KNOWN).quadratic(), 1.0)
    return float(tilted.means[0, 1]), float(tilted.covariances[0, 1, 1])


def drawn(method, n=1500, steps=50, **options):
    found = sa.steer(gaussian(), None, n=n, method=method, steps=steps, known=KNOWN, seed=1, reference=True, **options)
    assert found.figures["queries_per_sample"] == 0
    return found.x0.double(), found.figures


def test_the_likelihood_is_the_closed_form_tilt():
    """The figures of rho .5 and tau .1. Twin: an exact observation."""
    close(conditional(), (0.7426, 0.7525), atol=1e-4, exact=(0.75, 0.75))
    likelihood, x = Likelihood.of(gaussian(), KNOWN), f64([[1.2, 5.0], [1.5, -1.0]])
    alone = likelihood(x, sa.VP(), f64(0.3), end=True)
    close(alone, [-0.5 * 9.0, 0.0], atol=1e-9, of_both=[-0.5 * (9.0 + 25.0 / TAU**2), 0.0])
    sigma2 = float(sa.VP().sigma2(f64(0.3)))
    way = likelihood(x, sa.VP(), f64(0.3), end=False)
    close(way, [-0.5 * 0.09 / (TAU**2 + sigma2), 0.0], atol=1e-9, without=alone)
    close(likelihood.quadratic()(x) - likelihood.quadratic()(x)[1], alone - alone[1], atol=1e-9, half=alone / 2)
    close(likelihood.error(x), 0.3 / math.sqrt(2), atol=1e-9, unscaled=0.3)


def law_of_chain(steps):
    """The law of the pretrained chain's ends: in the axes of the covariance each variance follows a recursion."""
    times, variances = time_grid(sa.VP(), steps, name="power"), []
    for v in (1 + RHO, 1 - RHO):
        variance = 1.0
        for t, s in zip(times[:-1], times[1:], strict=True):
            (a, b), (p, q) = [(float(sa.VP().alpha(time)), float(sa.VP().sigma2(time))) for time in (t, s)]
            k2 = float(noise_std(sa.VP(), t, s, 1.0)) ** 2
            slope = (p * a * v + math.sqrt(max(q - k2, 0.0) * b)) / (a * a * v + b)
            variance = slope**2 * variance + k2
        variances.append(variance)
    plus, minus = variances
    return Mixture(f64([1.0]), f64([[0.0, 0.0]]), f64([[[plus + minus, plus - minus], [plus - minus, plus + minus]]]) / 2)


def replaced(steps, n=4000):
    """Mean and variance of the second coordinate where the first is overwritten in each step by 1.5, noised for its time."""
    generator = torch.Generator().manual_seed(0)
    times, x = time_grid(sa.VP(), steps, name="power"), torch.randn(n, 2, generator=generator, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:], strict=True):
        x[:, 0] = sa.VP().alpha(t) * Y + sa.VP().sigma(t) * torch.randn(n, generator=generator, dtype=torch.float64)
        step = ddim_step(sa.VP(), LAW.prediction(sa.VP(), x, t.expand(n)), t, s, 1.0)
        x = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return float(x[:, 1].mean()), float(x[:, 1].var())


def test_replacement_is_biased():
    """The figure that the page quotes. Twin: the conditional law."""
    close(replaced(50)[0], 0.4, atol=0.05, exact=conditional()[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["twisted", "smc"])
def test_the_rest_has_its_conditional_law(method):
    """That of the chain of 30 steps, with its log Z. Twins: the chain's own law, and replacement, whose bias stays."""
    law, tilt = law_of_chain(30), Likelihood.of(gaussian(), KNOWN).quadratic()
    best = law.optimum(tilt, 1.0)
    mean, variance = float(best.law.means[0, 1]), float(best.law.covariances[0, 1, 1])
    x, figures = drawn(method, n=1500, steps=30, returns="weighted", particles=8 if method == "twisted" else 32)

    def right(found):
        assert abs(found[0] - mean) < 0.1
        assert abs(found[1] - variance) < 0.1

    accepts(
        right,
        (float(x[:, 1].mean()), float(x[:, 1].var())),
        model=(0.0, float(law.covariances[0, 1, 1])),
        replaced=replaced(30),
    )
    close(x[:, 0].mean(), float(best.law.means[0, 0]), atol=0.03, model=0.0)
    constant = float(tilt(f64([[Y, 0.0]]))[0])  # of the quadratic, which the likelihood does not have
    close(figures["log_z"], best.log_z - constant, atol=0.12, nothing=0.0)


@pytest.mark.slow
def test_guidance_with_what_is_not_known_yet_is_near_the_conditional():
    """The chain's closed form at 200 steps, N(.727, .732). Twin: the model's own law."""
    x, _ = drawn("guidance", n=2000, steps=200)
    close([x[:, 1].mean(), x[:, 1].var()], [0.7274, 0.7317], atol=0.08, model=[0.0, 1.0])
    assert drawn("guidance", n=8, steps=20, eta=0.0)[0].shape == (8, 2)


@pytest.mark.slow
def test_a_row_of_a_table_is_filled_in_its_own_units(tmp_path):
    """Where the first column is known, the second is of the kernels there. Twin: the table's mean."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(300, generator=generator)
    rows = torch.stack([100 + 20 * first, 3 - 0.5 * first + 0.1 * torch.randn(300, generator=generator)], 1)
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{a},{b}\n" for a, b in rows.tolist()))
    settings = ["sampler.steps=25", "evaluation.steps=25", "evaluation.n=256", f"model.data={tmp_path / 't.csv'}"]
    known = "steer.known={values: [130, null]}"
    assert main(["steer", "moons", *settings, known, "--n", "100", "--output", str(tmp_path / "filled")]) == 0
    samples = np.load(tmp_path / "filled" / "samples" / "steered.npz")["samples"]
    figures = json.loads((tmp_path / "filled" / "summary.json").read_text())
    close(samples[:, 0].mean(), 130.0, atol=1.5, of_table=100.0)
    close(samples[:, 1].mean(), 3 - 0.5 * 1.5, atol=0.12, of_table=3.0)
    close(figures["known_error"], 0.05, atol=0.02, of_base=1.8)
    assert figures["distance_steered"] < 3 * figures["distance_steered_floor"]
    same(figures["queries_per_sample"], 0, asked=16)


@pytest.mark.slow
def test_pixels_of_a_picture_are_known_from_a_file(tmp_path):
    """A mask of a sample's shape, in pixels of [0, 1]. Twin: samples without it."""
    from scoreaction.models import digits

    model = digits.build(digits.Config())
    values, mask = np.zeros((1, 16, 16)), np.zeros((1, 16, 16), dtype=bool)
    mask[:, :, :8] = True
    np.savez(tmp_path / "left.npz", values=values, mask=mask)
    known = Known(values=tmp_path / "left.npz", std=0.2)
    found = sa.steer(model, None, n=4, method="guidance", steps=12, known=known, prompts=["7"], reference=True)
    likelihood = Likelihood.of(model, known)
    with torch.no_grad():
        error = likelihood.error(model.decode(found.x0))
        plain = likelihood.error(sa.sample(model, n=4, steps=15, prompts=["7"], reference=True))

    def agrees(error):
        assert error < 0.35

    accepts(agrees, error, plain=plain)


def test_a_plan_of_it_counts_no_query_on_the_way():
    """Twin: the same walk by a reward."""
    sampler = sa.Sampler(steps=4)
    with_known, without = (
        steering_demand(
            sa.VP(), sampler, sa.Steering(method="smc", known=known).settled(differentiable=True, sampler=sampler, beta=beta),
            n=10, prompts=None,
        )
        for known, beta in ((KNOWN, None), (None, 1.0))
    )  # fmt: skip
    same(with_known.queries, 10, by_reward=without.queries)
    same(with_known.points, without.points, fewer=without.points - 1)


BAD = {
    "steer.known={values: [1.0]}": r"^steer.known.values: must have the shape of a sample, \(2,\) \(got \(1,\)\)",
    "steer.known={values: [1.0, 2.0]}": r"^steer.known.values: must have some values that are known and some that are not",
    "steer.known={values: [null, null]}": r"^steer.known.values: must have some",
    "steer.known={values: nowhere.npz}": r"^steer.known.values: must be an .npz with the arrays values and mask",
    "steer={known: {values: [1, null]}, beta: 0.5}": r"^steer.beta: what is known has a scale of its own",
    "steer.known={values: [1, null], std: 0}": r"^steer.known.std: must be greater than 0",
    "steer.known={value: [1, null]}": r"^steer.known.value: unknown key",
}


@pytest.mark.parametrize("setting", BAD)
def test_what_cannot_be_known_is_refused_before_any_work(setting):
    """Twin: a part that is one."""
    with pytest.raises(UserError, match=BAD[setting]) as caught:
        build(load_recipe("mixture", [setting]))
    assert "\n" not in str(caught.value)
    build(load_recipe("mixture", ["steer.known={values: [1, null]}"]))
    with pytest.raises(ValueError, match="^reward: steering needs one, or known="):
        sa.steer(from_data.build(from_data.Config(data="moons")), None, n=2)
