"""Truth: the ODE of a Gaussian is affine and that of a 1-D law its quantile map; what a few exact steps lose is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from affine import model as affine
from affine import none
from scipy.optimize import brentq
from scipy.stats import norm
from twins import F64, close, f64, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.solvers import ddim_step, time_grid
from scoreaction.training import students
from scoreaction.types import Prediction

VP = sa.VP()
M, V = 0.3, 0.8
EXACT = (0.0, 0.0)
"""The parameters at which the affine policy is the exact score of N(.3, .8)."""


def spread(t):
    return VP.alpha(t) ** 2 * V + VP.sigma2(t)


def moved(x, t, s):
    """The ODE of N(.3, .8) from x at t to s."""
    return VP.alpha(s) * M + torch.sqrt(spread(s) / spread(t)) * (x - VP.alpha(t) * M)


def distiller_of(model, *, sampler=None, **settings):
    return sa.StudentDistiller(model, sa.Student(**settings), sampler or sa.Sampler())


def test_the_teacher_is_the_ode_of_the_policy():
    """States of N(.3, .8) at the student's times. Twins: another policy, and where plain DDIM of as many steps comes."""
    distiller = distiller_of(affine(VP, EXACT), steps=4, teacher_steps=64)
    found = torch.stack(distiller.paths(8, RowNoise(0, torch.arange(8)), none(8)))
    truth = torch.stack([moved(found[0].double(), distiller.times[0], s) for s in distiller.times])
    other = torch.stack(distiller_of(affine(VP), steps=4).paths(8, RowNoise(0, torch.arange(8)), none(8)))
    plain = [found[0]]
    with torch.no_grad():
        for k in range(4):
            plain.append(distiller.step(plain[-1], k, none(8)))
    close(found, truth, atol=5e-3, another_policy=other, plain=torch.stack(plain))


def test_the_teacher_of_two_modes_is_their_quantile_map():
    """F_0^{-1}(F_1(x)). Twin: the quantiles of the two modes' own Gaussian."""
    weights, means, variances = np.array([0.3, 0.7]), np.array([-1.5, 1.0]), np.array([0.09, 0.25])
    law = Mixture(f64(weights), f64(means)[:, None], f64(variances)[:, None, None])

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros((), dtype=F64))

        def forward(self, x, t, cond):
            exact = law.prediction(VP, x, t)
            return VP.alpha(t)[:, None] * exact.eps - VP.sigma(t)[:, None] * exact.x0 + 0 * self.unused

    distiller = distiller_of(sa.Model(Exact(), process=VP, predicts="v", shape=(1,)), steps=1, teacher_steps=256)
    start, end = distiller.paths(6, RowNoise(1, torch.arange(6)), none(6))
    one = torch.ones((), dtype=F64)
    alpha, sigma2 = float(VP.alpha(one)), float(VP.sigma2(one))

    def mapped(x):
        share = (weights * norm.cdf((x - alpha * means) / np.sqrt(alpha**2 * variances + sigma2))).sum()
        return brentq(lambda y: (weights * norm.cdf((y - means) / np.sqrt(variances))).sum() - share, -9, 9)

    truth = f64([mapped(x) for x in start.flatten().tolist()])
    mean, std = (weights * means).sum(), math.sqrt((weights * (variances + means**2)).sum() - (weights * means).sum() ** 2)
    close(end.flatten(), truth, atol=0.03, one_gaussian=mean + std * start.flatten().double())


def test_what_a_step_must_say_to_land_on_the_state():
    """The slope of x0* for 1 -> .5 -> .2 -> 0, and that the DDIM step with it lands. Twin: the posterior mean's slope."""
    for begin, end, slope, posterior in (
        (1, 0.5, 0.117840, 0.005257),
        (0.5, 0.2, 0.515869, 0.228560),
        (0.2, 0, 0.959850, 0.747548),
    ):
        t, s = f64(begin), f64(end)
        x = f64([[-1.0], [0.4]])
        ratio = VP.sigma(s) / VP.sigma(t)
        target = (moved(x, t, s) - ratio * x) / (VP.alpha(s) - ratio * VP.alpha(t))
        close((target[1] - target[0]) / 1.4, slope, atol=1e-6, posterior=posterior)
        close(VP.alpha(t) * V / spread(t), posterior, atol=1e-6, of_the_step=slope)

        def landed(slope, t=t, s=s, x=x):
            x0 = M + slope * (x - VP.alpha(t) * M)
            return ddim_step(VP, Prediction(x0, (x - VP.alpha(t) * x0) / VP.sigma(t)), t, s, 0.0).mean

        close(landed(slope), moved(x, t, s), atol=1e-5, posterior=landed(posterior))


def kept_variance(steps, variance, eta=0.0, end=0.0):
    """Share of the variance at `end`, of a law of this variance, that comes from the start of exact DDIM steps."""
    times = time_grid(VP, steps, name="power") * (1 - end) + end
    slope = torch.ones((), dtype=F64)
    for t, s in zip(times[:-1], times[1:], strict=True):
        total = VP.alpha(t) ** 2 * variance + VP.sigma2(t)
        one = slope.reshape(1, 1)
        prediction = Prediction(VP.alpha(t) * variance / total * one, VP.sigma(t) / total * one)
        slope = ddim_step(VP, prediction, t, s, eta).mean.squeeze()
    first, last = (VP.alpha(t) ** 2 * variance + VP.sigma2(t) for t in (times[0], times[-1]))
    return float(slope**2 * first / last)


def test_what_few_steps_and_noise_lose():
    """Exact DDIM in 1, 2, 4, 8, 16 steps keeps these shares of the variance; with noise the start is all but forgotten."""
    counts = (1, 2, 4, 8, 16)
    close([kept_variance(k, 0.8) for k in counts], [0, 0.18, 0.45, 0.68, 0.82], atol=6e-3, narrow=[0, 0.03, 0.27, 0.55, 0.75])
    close([kept_variance(k, 0.09) for k in counts], [0, 0.03, 0.27, 0.55, 0.75], atol=6e-3, wide=[0, 0.18, 0.45, 0.68, 0.82])
    ends = {0.8: 0.027, 0.5: 0.0005}
    for end, share in ends.items():
        close(kept_variance(300, 0.8, eta=1.0, end=end), share, atol=0.05 * share + 1e-4, ode=kept_variance(300, 0.8, end=end))


def test_the_discriminator_at_its_optimum_measures_a_divergence(monkeypatch):
    """2 log 2 - 2 JS of N(.3, 1) against N(0, 1), JS .011125; 2 log 2 without a gradient where both agree. Twin: a sign."""
    distiller = distiller_of(sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), steps=1, adversarial=1.0)
    generator, n = torch.Generator().manual_seed(0), 400_000
    real, fake = torch.randn(n, 1, generator=generator), 0.3 + torch.randn(n, 1, generator=generator)
    monkeypatch.setattr(students, "R1", 0.0)

    def at(sign):
        distiller.judge = lambda x, y, k, prompt: sign * (0.045 - 0.3 * y).squeeze(1)
        return float(distiller.critic_loss(0, real, fake, real, none(n)).detach())

    close(at(1), 2 * math.log(2) - 2 * 0.011125, atol=1.5e-3, sign=at(-1), blind=2 * math.log(2))
    blind = distiller_of(sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), steps=1, adversarial=1.0)
    y = torch.randn(4, 2, requires_grad=True)
    loss = blind.critic_loss(0, torch.randn(4, 2), y, torch.randn(4, 2), none(4))
    close(loss, 2 * math.log(2), atol=1e-6, one=math.log(2))
    torch.nn.functional.softplus(-blind.judge(torch.randn(4, 2), y, 0, none(4))).sum().backward()
    close(y.grad, torch.zeros(4, 2), atol=1e-12, any=torch.ones(4, 2))


def test_the_discriminator_is_told_the_time_of_the_step():
    distiller = distiller_of(
        sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), steps=2, paths=4, adversarial=0.1, iterations=1
    )
    seen = []
    right = distiller.critic.forward
    distiller.critic.forward = lambda x, t, prompt: seen.append(float(t[0])) or right(x, t, prompt)
    list(distiller)
    same(set(seen), set(distiller.times[:2].tolist()), next_time=set(distiller.times[1:].tolist()))


@pytest.mark.parametrize("settings", [{"optimizer": "adam"}, {"optimizer": "rk1"}, {"optimizer": "rk2"}, {"optimizer": "rk4"}])
@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_every_optimizer_moves_the_student(settings, adversarial):
    """And the discriminator where there is one; the reference never. What trains is what trained before."""
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config(hidden=16))
    before = {name: p.detach().clone() for name, p in model.parameters.items()}
    distiller = distiller_of(
        model, steps=2, teacher_steps=4, paths=8, iterations=3, lr=1e-2, adversarial=adversarial, **settings
    )
    opinion = [p.detach().clone() for p in distiller.critic.parameters()]
    metrics = list(distiller)
    assert all(math.isfinite(row["loss"]) for row in metrics)
    assert all(p.requires_grad for p in model.parameters.values())
    assert any(not torch.equal(p, before[name]) for name, p in model.parameters.items())
    told = [torch.equal(a, b) for a, b in zip(opinion, distiller.critic.parameters(), strict=True)]
    same(all(told), adversarial == 0, the_other_way=adversarial > 0)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.items())


@pytest.mark.long
def test_a_student_lands_nearer_than_plain_steps():
    """Root mean square distance to the teacher's ends, 60 iterations. Twin: the policy itself in as many steps."""
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    distiller = distiller_of(model, steps=4, iterations=60, paths=64, teacher_steps=32, lr=5e-3)
    truth = distiller.paths(512, RowNoise(5, torch.arange(512)), none(512))

    def distance():
        y = truth[0]
        with torch.no_grad():
            for k in range(4):
                y = distiller.step(y, k, none(512))
        return float((y - truth[-1]).square().mean().sqrt())

    plain = distance()
    list(distiller)
    close(distance() / plain, 0.45, atol=0.2, plain=1.0)
    close(
        sa.sample(model, n=4, seed=3),
        sa.sample(model, n=4, seed=3, steps=4, eta=0.0),
        fifty=sa.sample(model, n=4, seed=3, steps=50),
    )


@pytest.mark.slow
def test_a_student_of_a_run_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is sampled, loaded, evaluated and reported, by its own sampler; what it cannot be is refused in one line."""
    monkeypatch.chdir(tmp_path)
    small = ["train.iterations=1", "train.batch=8", "sampler.steps=4", "evaluation.n=32", "evaluation.steps=4"]
    assert main(["train", "mixture", "algorithm.name=ddpo", *small, "--output", "run"]) == 0
    quick = ["student.iterations=2", "student.paths=4", "student.teacher_steps=6"]
    assert main(["distill", "run", "--steps", "3", *quick]) == 0
    figures = json.loads(Path("run-student/student.json").read_text())
    same([row["model"] for row in figures["rows"]], ["pretrained", "teacher", "policy", "policy", "policy", "student"], none=[])
    assert figures["rows"][-1]["evaluations"] == 3
    assert figures["rows"][-1]["rms"] > 0
    assert main(["sample", "run-student", "--n", "4"]) == 0
    with np.load("run-student/samples.npz") as file:
        drawn = torch.from_numpy(file["samples"])
    student = sa.load("run-student")
    close(sa.sample(student, n=4), drawn, atol=1e-5, of_the_run=sa.sample(sa.load("run"), n=4))
    assert main(["evaluate", "run-student", "--steps", "3", "--eta", "0", "--n", "8"]) == 0
    assert main(["report", "run-student"]) == 0
    assert "A student of 3 steps" in Path("run-student/report.html").read_text()
    for arguments, line in (
        (["run", "--steps", "3"], "--output: run-student already holds a run"),
        (["run", "train.lr=1", "--output", "b"], "train.lr=1: of a run only student.* can be set"),
        (["run", "--steps", "99", "--output", "b"], "student.steps: a student has no more than its teacher"),
        (["mixture", "--steps", "3"], "--steps: is of students"),
    ):
        capsys.readouterr()
        assert main(["distill", *arguments]) == 2
        assert capsys.readouterr().err.startswith(line)


def test_tokens_have_no_student():
    from token_laws import enumerated, model_of, potts

    model = model_of(enumerated(potts(np.random.default_rng(0), 2, 3), 2))
    with pytest.raises(ValueError, match="a student, whose teacher is an ODE, is for models of Gaussian states"):
        sa.StudentDistiller(model, sa.Student(), sa.Sampler(**model.sampling))
