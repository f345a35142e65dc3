"""Truth: the Girsanov integral of two Gaussian laws by quadrature, the tilted mixture's KL, chain KLs by exact moments."""

import math

import pytest
import torch
from oracles import linear_quadratic as lq
from scipy.integrate import quad
from twins import F64, accepts, close, f64

from scoreaction.diffusion.kl import chain_kl, g2_integral, path_kl, path_kl_steps
from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.diffusion.processes import VE, VP, Flow
from scoreaction.diffusion.solvers import SOLVERS, time_grid
from scoreaction.sampling.trajectory import trajectory
from scoreaction.types import Prediction


def visited(process, policy, reference, times, eta, n):
    """Difference of two exact predictions along the policy's own DDIM chain, (N, n, d)."""
    generator = torch.Generator().manual_seed(0)
    x = process.prior_std * torch.randn(n, policy.dimension, generator=generator, dtype=F64)
    out = []

    def predict(x, t):
        return policy.prediction(process, x, t)

    for visit in trajectory(predict, process, x, times, solver=SOLVERS["ddim"], eta=eta, generator=generator):
        base = reference.prediction(process, visit.x, visit.t)
        out.append(Prediction(visit.prediction.x0 - base.x0, visit.prediction.eps - base.eps))
    return Prediction(*(torch.stack(parts) for parts in zip(*out, strict=True)))


def shifted(process, times, eta, d=2):
    """N(0, 1) and N(1, 1) in d independent dimensions: the difference is the same at every x, so one path is all paths."""
    return visited(process, Mixture.isotropic([[1.0] * d], std=1.0), Mixture.isotropic([[0.0] * d], std=1.0), times, eta, 1)


CASES = [(VP(), 1.0), (VP(), 0.5), (Flow(), 1.0), (Flow(), 0.5)]


@pytest.mark.parametrize("grid", ["uniform", "power"])
@pytest.mark.parametrize(("process", "eta"), CASES)
def test_path_kl_is_girsanovs_and_does_not_depend_on_the_grid(process, eta, grid):
    truth = 2 * lq.path_kl(lq.ScalarLQ(process, eta=eta), lq.ScalarLQ(process, m=1.0, eta=eta))  # two dimensions
    found, chains, wrong_eta = [], [], []
    for steps in (25, 50, 100, 200):
        times = time_grid(process, steps, name=grid)
        difference = shifted(process, times, eta)
        found.append(float(path_kl(process, times, difference, eta)))
        chains.append(float(chain_kl(process, times, difference, eta)))
        wrong_eta.append(float(path_kl(process, times, difference, 1.0 if eta < 1 else 0.5)))
    wrong = {
        "weight_of_another_eta": wrong_eta,
        "mean_over_dimensions": [kl / 2 for kl in found],
        "without_half": [2 * kl for kl in found],
        "chain": chains,
    }
    close(found, [truth] * 4, rtol=0.02, atol=0, **wrong)
    close(found[-1], truth, rtol=2e-3, atol=0, **{name: values[-1] for name, values in wrong.items()})

    def steady(values):
        assert abs(values[0] / values[-1] - 1) < 0.05

    accepts(steady, found, chain=chains)


@pytest.mark.long
def test_path_kl_of_the_recipes_mixture():
    """The exact policy of the tilted law pays 1.2286 nats for leaving the four modes; the chain that is run pays more."""
    four = Mixture.isotropic([[2, 0], [-2, 0], [0, 2], [0, -2]], std=0.3)
    optimum = four.optimum(Quadratic.linear([1.0, 0.5]), 0.5)
    close(optimum.kl_nats, 1.228649, chain=1.61)
    found, chains = [], []
    for steps in (25, 50, 200):
        times = time_grid(VP(), steps)
        difference = visited(VP(), optimum.law, four, times, 1.0, 16384)
        per_path = path_kl(VP(), times, difference, 1.0)
        assert float(per_path.std()) / 128 < 0.009  # three standard errors are the tolerance below
        found.append(float(per_path.mean()))
        chains.append(float(chain_kl(VP(), times, difference, 1.0).mean()))
    truth = [optimum.kl_nats] * 3
    close(found, truth, atol=0.03, chain=chains, without_half=[2 * kl for kl in found], mean=[kl / 2 for kl in found])
    close(chains, [1.61, 1.45, 1.285], atol=0.03, path=found)


@pytest.mark.parametrize(
    ("process", "eta", "values"),
    [
        (VP(), 1.0, (0.69612169, 0.59812543, 0.52324296)),
        (Flow(), 1.0, (0.62164738, 0.55656696, 0.51323683)),
        (VP(), 0.5, (1.25419922, 1.00593119, 0.83201588)),
    ],
)
def test_chain_kl_of_whole_chains(process, eta, values):
    found, wrong_eta = [], []
    for steps in (25, 50, 200):
        times = time_grid(process, steps)
        difference = shifted(process, times, eta, d=1)
        found.append(float(chain_kl(process, times, difference, eta)))
        wrong_eta.append(float(chain_kl(process, times, difference, 1.0 if eta < 1 else 0.5)))
    close(found, values, weight_of_another_eta=wrong_eta, without_half=[2 * kl for kl in found])


def test_chain_kl_of_laws_of_unequal_width():
    """Here the difference depends on x: the mean over paths against exact moments, in standard errors."""
    pre, tuned, times = lq.ScalarLQ(VP(), m=0.3, v=0.8), lq.ScalarLQ(VP(), m=-0.4, v=0.5), time_grid(VP(), 20)
    laws = [Mixture.isotropic([[p.m]], std=math.sqrt(p.v)) for p in (tuned, pre)]
    per_path = chain_kl(VP(), times, visited(VP(), *laws, times, 1.0, 20_000), 1.0)
    error = float(per_path.std()) / math.sqrt(20_000)
    truth = lq.chain_kl(pre, tuned, times, start=(0.0, VP().prior_std ** 2))
    backwards = lq.chain_kl(tuned, pre, times)
    close(float(per_path.mean()), truth, atol=3 * error, backwards=backwards, without_half=2 * float(per_path.mean()))


def test_first_flow_step_is_in_the_x0_form():
    """At t = 1 of a flow the log SNR is minus infinity; the eps form there is not a number."""
    times = time_grid(Flow(), 25)
    difference = shifted(Flow(), times, 1.0, d=1)
    steps = path_kl_steps(Flow(), times, difference, 1.0)
    first = quad(lambda t: 0.5 * float(Flow().g2(f64(t))) * ((1 - t) / ((1 - t) ** 2 + t**2)) ** 2, float(times[1]), 1)[0]
    log_snr, eps = Flow().log_snr(times), difference.eps[:2, 0, 0] ** 2
    eps_form = 0.25 * (log_snr[1] - log_snr[0]) * (eps[0] + eps[1])
    close(steps[0, 0], first, rtol=0.1, atol=0, eps_form=eps_form, nothing=0.0)
    one = time_grid(Flow(), 1)
    assert bool(torch.isfinite(path_kl(Flow(), one, shifted(Flow(), one, 1.0), 1.0)).all())


@pytest.mark.parametrize("process", [VP(), Flow()])
def test_nothing_below_t_min_counts(process):
    """A network whose eps differs by a constant e has path KL `(e^2/2)(lambda(t_min) - lambda(t_max))`, infinite at t_min 0."""

    def kl(steps, t_min=1e-3):
        times = time_grid(process, steps, name="power")[1:]  # from below t = 1, where the log SNR is finite
        constant = torch.full((steps - 1, 1, 3), 0.7, dtype=F64)
        ends = process.log_snr(torch.stack([f64(t_min), times[0]]))
        truth = 3 * 0.49 / 2 * float(ends[0] - ends[1])
        return float(path_kl(process, times, Prediction(constant, constant), 1.0, t_min)) / truth, truth

    fine = kl(400)[0]
    down_to_zero = kl(400, 1e-6)[0] * kl(400, 1e-6)[1] / kl(400)[1]
    close([fine, kl(200)[0], kl(100)[0]], 1.0, atol=0.03, no_t_min=[down_to_zero, kl(200)[0], kl(100)[0]])


def test_the_last_interval_of_a_bounded_score_difference():
    """The score difference held from t down to t_min: `1/2 int_t_min^t g^2 du ||ds||^2`."""
    times = f64([0.3, 0.0])
    ds = torch.ones(1, 1, 1, dtype=F64)
    difference = Prediction(ds, -ds * VP().sigma(f64(0.3)))
    truth = 0.5 * quad(lambda t: float(VP().g2(f64(t))), 1e-3, 0.3)[0]
    found = float(path_kl(VP(), times, difference, 1.0))
    close(found, truth, rtol=1e-3, atol=0, left_end=0.5 * 0.3 * float(VP().g2(f64(0.3))), without_half=2 * found)


@pytest.mark.parametrize("process", [VP(), Flow(), VE()])
def test_g2_integral_is_the_integral_of_g2(process):
    for s, t in ((0.3, 0.32), (0.9, 0.91)):
        truth = quad(lambda u: float(process.g2(f64(u))), s, t)[0]
        left = (t - s) * float(process.g2(f64(t)))
        close(g2_integral(process, f64(t), f64(s)), truth, rtol=5e-3, atol=0, left_end=left)
    assert math.isfinite(float(g2_integral(process, f64(1.0), f64(0.9))))


def test_a_deterministic_sampler_has_no_path_kl():
    times = time_grid(VP(), 4)
    with pytest.raises(ValueError, match="eta > 0"):
        path_kl(VP(), times, shifted(VP(), times, 1.0), 0.0)
