"""Truth: Bayes' rule, exact Gaussian flows and laws, measured orders, diffusers and torchdiffeq on the same network."""

import math

import pytest
import torch
from oracles.linear_quadratic import ScalarLQ
from torchdiffeq import odeint
from twins import F64, accepts, close, f64

from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import to_prediction
from scoreaction.diffusion.processes import VE, VP, CosineVP, Flow, Process, TableVP
from scoreaction.diffusion.solvers import SOLVERS, Past, Solver, ddim_step, find_solver, jittered, noise_std, time_grid
from scoreaction.diffusion.transitions import Transition
from scoreaction.types import Prediction

PROCESSES = [VP(), VE(sigma_min=0.1, sigma_max=3.0), Flow()]
by_name = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
GAUSS = Mixture.isotropic([[0.3]], std=0.8)
TWO = Mixture(f64([0.4, 0.6]), f64([[-1.0], [0.7]]), f64([[[0.3]], [[0.2]]]))


def run(solver, process, predict, x, times, *, eta=0.0, noise=None):
    """The solver's own steps down the grid; noise (N, *x.shape), or none."""
    past = None
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        prediction = predict(x, t)
        step = solver.step(process, predict, prediction, x, t, s, eta, past)
        past = Past(t, prediction)
        x = step.mean if noise is None else step.mean + step.std * noise[i]
    return x


# --- one step -------------------------------------------------------------------------------------------------


@by_name
def test_eta_one_is_the_posterior_by_bayes(process):
    """q(x_s | x_t, x0) is proportional to N(x_s; alpha_s x0, sigma_s^2) N(x_t; a x_s, rest), a = alpha_t/alpha_s."""
    t, s = f64(0.6), f64(0.45)
    prediction = Prediction(f64([[0.7, -0.2]]), f64([[-1.1, 0.4]]))
    x = process.alpha(t) * prediction.x0 + process.sigma(t) * prediction.eps
    a = process.alpha(t) / process.alpha(s)
    rest = process.sigma2(t) - a**2 * process.sigma2(s)
    precision = 1 / process.sigma2(s) + a**2 / rest
    mean = (process.alpha(s) * prediction.x0 / process.sigma2(s) + a * x / rest) / precision
    step, half = ddim_step(process, prediction, t, s, 1.0), ddim_step(process, prediction, t, s, 0.5)
    close(
        step.mean,
        mean,
        atol=1e-12,
        eta_half=half.mean,
        swapped=ddim_step(process, Prediction(prediction.eps, prediction.x0), t, s, 1.0).mean,
    )
    close(step.std, precision**-0.5, atol=1e-12, eta_half=half.std, variance=1 / precision)
    close(half.std, 0.5 * step.std, atol=1e-12, quarter=0.25 * step.std)


@by_name
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_keeps_the_noise_level(process, eta):
    """With x0 known, x_s has noise sigma_s whatever eta: k^2 + direction^2 = sigma_s^2."""
    t, s = f64(0.6), f64(0.45)
    step = ddim_step(process, Prediction(f64([[0.0]]), f64([[1.0]])), t, s, eta)
    total = torch.sqrt(step.mean**2 + step.std**2)
    close(total, process.sigma(s), atol=1e-12, at_t=process.sigma(t))


def test_from_pure_noise_and_onto_data():
    first = ddim_step(Flow(), Prediction(f64([[2.0]]), f64([[1.0]])), f64(1.0), f64(0.9), 1.0)
    close(first.mean, 0.2, atol=1e-12, eps_kept=0.2 + 0.9)
    close(first.std, 0.9, atol=1e-12, no_noise=0.0)
    last = ddim_step(VP(), Prediction(f64([[2.0]]), f64([[1.0]])), f64(0.02), f64(0.0), 1.0)
    close(last.mean, 2.0, atol=1e-12, eps=1.0)
    close(last.std, 0.0, atol=0.0, previous=noise_std(VP(), f64(0.02), f64(0.01), 1.0))


def test_rows_may_have_their_own_times():
    t, s = f64([0.9, 0.5]), f64([0.8, 0.1])
    prediction = Prediction(torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64))
    both = ddim_step(VP(), prediction, t, s, 0.7)
    rows = [ddim_step(VP(), Prediction(prediction.x0[i : i + 1], prediction.eps[i : i + 1]), t[i], s[i], 0.7) for i in (0, 1)]
    close(both.mean, torch.cat([row.mean for row in rows]), atol=1e-12, swapped=torch.cat([row.mean for row in rows[::-1]]))
    close(both.std, torch.stack([row.std for row in rows]), atol=1e-12, swapped=both.std.flip(0))


# --- measured orders ------------------------------------------------------------------------------------------


def slope(errors: list[float]) -> float:
    """Order from the error on grids that double: the least-squares slope of log2."""
    y = [math.log2(e) for e in errors]
    n = len(y)
    middle = (n - 1) / 2
    return -sum((i - middle) * v for i, v in enumerate(y)) / sum((i - middle) ** 2 for i in range(n))


def ode_order(solver: Solver, process) -> float:
    """On [0.9, 0.1] with the exact score of Gaussian data, whose flow is `alpha_s m + sqrt(P_s/P_t)(x - alpha_t m)`."""
    start, end, x = f64(0.9), f64(0.1), f64([[-1.0], [0.2], [1.7]])
    a = GAUSS.noised(process, start), GAUSS.noised(process, end)
    truth = a[1].means + torch.sqrt(a[1].covariances[0] / a[0].covariances[0]) * (x - a[0].means)
    errors = []
    for n in (64, 128, 256):
        times = torch.linspace(0.9, 0.1, n + 1, dtype=F64)
        errors.append(float((run(solver, process, lambda x, t: GAUSS.prediction(process, x, t), x, times) - truth).abs().max()))
    return slope(errors)


def _is_order(measured, declared):
    assert abs(measured - declared) < 0.2, f"measured {measured:.2f}, declared {declared}"


@pytest.mark.slow
@by_name
@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.order])
def test_declared_ode_order_is_the_measured_one(name, process):
    solver = SOLVERS[name]
    measured = ode_order(solver, process)
    accepts(lambda declared: _is_order(measured, declared), solver.order, one_more=solver.order + 1, one_less=solver.order - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heun", "dpmpp_2m"])
def test_a_broken_corrector_loses_the_order(name):
    """The same check rejects Heun without its second slope and the multistep with its difference reversed."""

    def broken(*arguments):
        process, _, prediction, _, t, s, *_ = arguments
        right = SOLVERS[name].step(*arguments)
        plain = ddim_step(process, prediction, t, s, 0.0)
        return Transition(2 * plain.mean - right.mean, right.std)

    wrong = Solver(broken, 2, 0, True, 1, "broken")
    accepts(lambda solver: _is_order(ode_order(solver, VP()), 2), SOLVERS[name], broken=wrong)


def final_law(solver: Solver, process, times, eta) -> tuple[float, float]:
    """Mean and variance at the last time, exactly: a step is affine in (x, x0 of the step before), so probes give its map."""
    law = GAUSS.noised(process, times[0])
    mean, cov = torch.stack([law.means[0, 0], f64(0.0)]), torch.zeros(2, 2, dtype=F64)
    cov[0, 0] = law.covariances[0, 0, 0]
    probes = f64([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    before = None
    for t, s in zip(times[:-1], times[1:], strict=True):
        x, x0_past = probes[:, :1], probes[:, 1:]
        prediction = GAUSS.prediction(process, x, t)
        past = None if before is None else Past(before, Prediction(x0_past, x0_past))
        step = solver.step(process, lambda x, t: GAUSS.prediction(process, x, t), prediction, x, t, s, eta, past)
        out = torch.cat([step.mean, prediction.x0], 1)  # (probe, (x_s, x0 at t))
        matrix = (out[1:] - out[0]).T
        mean, cov = out[0] + matrix @ mean, matrix @ cov @ matrix.T
        cov[0, 0] += step.std**2
        before = t
    return float(mean[0]), float(cov[0, 0])


def weak_order(solver: Solver, process, eta) -> float:
    law = GAUSS.noised(process, f64(0.1))
    errors = []
    for n in (256, 512):
        mean, variance = final_law(solver, process, torch.linspace(0.9, 0.1, n + 1, dtype=F64), eta)
        errors.append(abs(mean - float(law.means)) + abs(variance - float(law.covariances)))
    return slope(errors)


@pytest.mark.slow
@by_name
@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.weak_order and solver.process is Process])
def test_declared_weak_order_is_the_measured_one(name, process):
    solver = SOLVERS[name]
    for eta in (1.0, 0.5):
        measured = weak_order(solver, process, eta)
        accepts(lambda declared, m=measured: _is_order(m, declared), solver.weak_order, one_more=solver.weak_order + 1, none=0)


def test_sde_multistep_is_of_second_weak_order_on_a_mixture_too():
    """E x^2 of the chain by quadrature over pairs (x_t, x before), so that no sampling noise hides the order."""
    process, x = VP(), torch.linspace(-5, 5, 101, dtype=F64)
    n, dx = len(x), float(x[1] - x[0])
    truth = float(TWO.weights @ (TWO.noised(process, f64(0.2)).means ** 2 + TWO.noised(process, f64(0.2)).covariances[:, :, 0]))

    def second_moment_error(steps, looks_back):
        times = torch.linspace(0.8, 0.2, steps + 1, dtype=F64)
        joint, past = TWO.noised(process, times[0]).log_prob(x[:, None]).exp()[None, :] * dx, None  # (x before, x now)
        for t, s in zip(times[:-1], times[1:], strict=True):
            now = TWO.prediction(process, x[:, None], t)
            m = len(joint)
            pairs = Prediction(now.x0.repeat(m, 1), now.eps.repeat(m, 1))
            step = SOLVERS["sde_dpmpp"].step(process, None, pairs, x.repeat(m)[:, None], t, s, 1.0, past)
            mean, std = step.mean.view(m, n), float(step.std)
            moved = [torch.exp(-((x - mean[:, i, None]) ** 2) / (2 * std**2)) for i in range(n)]
            joint = torch.stack([joint[:, i] @ moved[i] for i in range(n)]) * dx / (std * (2 * torch.pi) ** 0.5)
            if looks_back:
                past = Past(t, Prediction(now.x0.repeat_interleave(n, 0), now.eps.repeat_interleave(n, 0)))
            else:
                joint = joint.sum(0, keepdim=True)
        return abs(float(joint.sum(0) @ x**2) - truth)

    orders = {back: slope([second_moment_error(steps, back) for steps in (16, 32)]) for back in (True, False)}
    accepts(lambda measured: _is_order(measured, 2), orders[True], without_the_past=orders[False])


@pytest.mark.slow
def test_wrong_noise_has_no_weak_order():
    """Noise of eta 1 with the mean of eta 0.5 does not converge at all."""

    def broken(*arguments):
        process, _, prediction, _, t, s, eta, _ = arguments
        return Transition(ddim_step(process, prediction, t, s, eta).mean, noise_std(process, t, s, 1.0))

    wrong = Solver(broken, 1, 1, True, 1, "broken")
    accepts(lambda solver: _is_order(weak_order(solver, VP(), 0.5), 1), SOLVERS["ddim"], broken=wrong)


def test_final_variance_of_ddim_on_known_grids():
    """VP, std-0.3 data, exact score: 29 % too small at 50 uniform steps, 15 % on (i/N)^2, 10 % at 200 uniform."""
    narrow, law = ScalarLQ(VP(), v=0.09), Mixture.isotropic([[0.0]], std=0.3)
    cases = [time_grid(VP(), 50), time_grid(VP(), 50, name="power", rho=2.0), time_grid(VP(), 200)]
    missing = []
    for times in cases:
        variance = 1.0
        for t, s in zip(times[:-1], times[1:], strict=True):
            step = ddim_step(VP(), law.prediction(VP(), f64([[1.0]]), t), t, s, 1.0)
            variance = float(step.mean) ** 2 * variance + float(step.std) ** 2
        close(variance, narrow.chain_moments(times)[1], atol=1e-10, data=0.09)
        missing.append(1 - variance / 0.09)
    close(missing, [0.29, 0.15, 0.10], atol=0.005, other_order=missing[::-1])


# --- independent libraries ------------------------------------------------------------------------------------


@pytest.mark.slow
@by_name
@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.order])
def test_ode_solvers_agree_with_torchdiffeq(name, process):
    """Probability flow `dx/dt = f x - 1/2 g^2 score` of a two-mode mixture, by dopri5."""
    x = f64([[-1.2], [0.1], [0.9]]) * process.prior_std

    def flow(t, x, half=0.5):
        return process.f(t) * x - half * process.g2(t) * TWO.score(process, x, t)

    ends = f64([0.95, 0.05])
    truth = odeint(flow, x, ends, rtol=1e-9, atol=1e-9, method="dopri5")[-1]
    times = torch.linspace(0.95, 0.05, 401, dtype=F64)
    ours = run(SOLVERS[name], process, lambda x, t: TWO.prediction(process, x, t), x, times)
    full = odeint(lambda t, x: flow(t, x, 1.0), x, ends, rtol=1e-6, atol=1e-6, method="dopri5")[-1]
    tolerance = 0.03 if SOLVERS[name].order == 1 else 1e-3
    close(ours, truth, atol=tolerance, score_without_half=full)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x, index):
    """Any smooth function will do; index is the scheduler's own time."""
    return torch.tanh(x * (1 + index / 1000)) - 0.3 * torch.sin(3 * x + index / 300)


def predict_with(process):
    return lambda x, t: to_prediction(process, "eps", x, t, network(x, process.timestep(t)))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_agrees_with_diffusers(eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")
    scheduler.set_timesteps(20)
    process = TableVP.from_scheduler(scheduler.alphas_cumprod, ends_at_data=True)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, f64([0.0])])
    close(process.timestep(times[:-1]), scheduler.timesteps, atol=1e-9, off_by_one=times[:-1] * 1000)
    noise = torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = theirs = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    for i, index in enumerate(scheduler.timesteps):
        output = network(theirs, index.double())
        still = scheduler.step(output, index, theirs, eta=eta, variance_noise=torch.zeros_like(theirs)).prev_sample
        unit = scheduler.step(output, index, theirs, eta=eta, variance_noise=torch.ones_like(theirs)).prev_sample
        step = ddim_step(process, predict_with(process)(theirs, times[i]), times[i], times[i + 1], eta)
        close(step.mean, still, atol=1e-4, no_step=theirs)
        close(step.std, (unit - still).mean(), atol=1e-4, off=(unit - still).mean() + 2e-3)
        theirs = still + (unit - still) * noise[i]
    ours = run(SOLVERS["ddim"], process, predict_with(process), x, times, eta=eta, noise=noise)
    other = run(SOLVERS["ddim"], process, predict_with(process), x, times, eta=0.5, noise=noise)
    close(ours, theirs, atol=1e-4, other_eta=other)


@pytest.mark.parametrize(
    ("name", "algorithm", "eta"), [("dpmpp_2m", "dpmsolver++", 0.0), ("sde_dpmpp", "sde-dpmsolver++", 1.0)]
)
def test_multistep_agrees_with_diffusers(name, algorithm, eta):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        **BETAS, solver_order=2, algorithm_type=algorithm, solver_type="midpoint", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(20)
    process = TableVP.from_scheduler(scheduler.alphas_cumprod, ends_at_data=True)
    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, f64([0.0])])
    noise = torch.randn(20, 6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = theirs = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    for i, index in enumerate(scheduler.timesteps):
        output = network(theirs, index.double())
        theirs = scheduler.step(output, index, theirs, variance_noise=noise[i]).prev_sample.double()
    ours = run(SOLVERS[name], process, predict_with(process), x, times, eta=eta, noise=noise)
    first_order = run(SOLVERS["ddim"], process, predict_with(process), x, times, eta=eta, noise=noise)
    close(ours, theirs, atol=1e-4, first_order=first_order)


# --- grids and refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [*PROCESSES, CosineVP(), TableVP.scaled_linear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", ["uniform", "power", "log_snr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_fall_from_one_to_zero(process, name, steps):
    times = time_grid(process, steps, name=name)

    def check(times):
        assert times.dtype == F64
        assert len(times) == steps + 1
        assert float(times[0]) == 1.0
        assert float(times[-1]) == 0.0
        assert bool((times.diff() < 0).all())

    accepts(check, times, one_short=times[1:], reversed=times.flip(0))
    accepts(check, jittered(times, torch.Generator().manual_seed(0)), doubled=torch.cat([times[:1], times]))


def test_grids_are_uniform_in_what_they_say():
    def even(values):
        steps = values.diff()
        assert float((steps - steps.mean()).abs().max()) < 1e-6 * float(steps.abs().mean())

    vp = VP()
    grids = {name: time_grid(vp, 20, name=name) for name in ("uniform", "power", "log_snr", "karras")}
    accepts(even, grids["uniform"], power=grids["power"])
    accepts(even, grids["power"] ** (1 / 1.5), uniform=grids["uniform"] ** (1 / 1.5))
    accepts(even, vp.log_snr(grids["log_snr"][:-1]), karras=vp.log_snr(grids["karras"][:-1]))
    rho = torch.exp(-vp.log_snr(grids["karras"][:-1]) / 14)
    accepts(even, rho, log_snr=torch.exp(-vp.log_snr(grids["log_snr"][:-1]) / 14))
    close(grids["karras"][-2], 1e-3, atol=1e-12, uniform=grids["uniform"][-2])


def test_karras_grid_agrees_with_diffusers():
    from diffusers import EulerDiscreteScheduler

    times = time_grid(VP(), 21, name="karras")[:-1]
    levels = torch.exp(-VP().log_snr(times) / 2)
    scheduler = EulerDiscreteScheduler(sigma_min=float(levels[-1]), sigma_max=float(levels[0]))
    theirs = scheduler._convert_to_karras(in_sigmas=levels.flip(0), num_inference_steps=21)
    log_snr = torch.exp(-VP().log_snr(time_grid(VP(), 21, name="log_snr")[:-1]) / 2)
    close(levels, torch.as_tensor(theirs), rtol=1e-6, atol=0, log_snr=log_snr)


def test_grid_of_leading_scheduler_is_the_uniform_one():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    process = TableVP.from_scheduler(scheduler.alphas_cumprod, ends_at_data=True)
    uniform, power = (process.timestep(time_grid(process, 20, name=name)[:-1]) for name in ("uniform", "power"))
    close(uniform, scheduler.timesteps, atol=1e-9, power=power)


def test_jitter_moves_inner_times_only_and_by_the_seed():
    times = time_grid(VP(), 30)
    moved = jittered(times, torch.Generator().manual_seed(0))
    assert float((moved - times).abs().max()) < 0.5 / 30
    assert float((moved - times)[1:-1].abs().min()) > 0

    def same(other):
        assert torch.equal(moved, other)

    accepts(same, jittered(times, torch.Generator().manual_seed(0)), seed=jittered(times, torch.Generator().manual_seed(1)))


def test_refusals_name_the_key_and_the_remedy():
    cases = [
        (lambda: find_solver("euler", 0.0), "sampler.solver: unknown solver 'euler'"),
        (lambda: find_solver("ddim", 1.1), "sampler.eta"),
        (lambda: find_solver("heun", 1.0), "use ddim or sde_dpmpp"),
        (lambda: find_solver("sde_dpmpp", 0.0), "use ddim, heun or dpmpp_2m"),
        (lambda: time_grid(VP(), 0), "sampler.steps"),
        (lambda: time_grid(VP(), 5, name="cosine"), "sampler.grid"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    prediction = Prediction(f64([[0.0]]), f64([[1.0]]))
    for process in (Flow(), CosineVP()):
        with pytest.raises(ValueError, match="infinite at t = 1"):
            SOLVERS["euler_maruyama"].step(process, None, prediction, f64([[1.0]]), f64(1.0), f64(0.9), 1.0, None)
    assert find_solver("ddim", 0.3) is SOLVERS["ddim"]
