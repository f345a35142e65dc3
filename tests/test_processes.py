"""Truth: autograd of the defining functions, the forward moment equation, the table itself, an independent float64 alpha."""

import math

import pytest
import torch
from twins import F64, accepts, close, f64

from scoreaction.diffusion.processes import VE, VP, CosineVP, Flow, TableVP

SD = TableVP.scaled_linear()


def zero_terminal(table: TableVP) -> TableVP:
    """The table moved and scaled so that its last alpha is 0 and its first stays (Lin et al. 2023, algorithm 1)."""
    alpha = f64(table.alphas_cumprod).sqrt()
    return TableVP((((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2).tolist(), spacing="trailing")


ZERO = zero_terminal(SD)
PROCESSES = [VP(), CosineVP(), SD, ZERO, VE(), Flow()]
INNER = torch.tensor([0.0123, 0.1, 0.25, 0.5037, 0.77, 0.95, 0.985], dtype=F64)
every = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def derivative(function, t=INNER):
    t = t.clone().requires_grad_()
    y = function(t).sum()
    return torch.autograd.grad(y, t)[0] if y.requires_grad else torch.zeros_like(t)


@every
def test_rates_are_the_derivatives(process):
    t = INNER
    close(
        process.f(t),
        derivative(process.log_alpha),
        atol=1e-10,
        rtol=1e-9,
        of_alpha=derivative(process.alpha) + (process.alpha(t) == 1),
    )
    close(process.sigma2_rate(t), derivative(process.sigma2), atol=1e-9, rtol=1e-9, of_sigma=process.sigma_rate(t))
    close(
        process.alpha_rate(t),
        derivative(process.alpha),
        atol=1e-10,
        rtol=1e-9,
        of_log_alpha=process.f(t) + (process.alpha(t) == 1),
    )
    close(process.sigma_rate(t), derivative(process.sigma), atol=1e-9, rtol=1e-9, of_variance=process.sigma2_rate(t))
    close(
        process.alpha(t) ** 2 / process.sigma2(t),
        torch.exp(process.log_snr(t)),
        rtol=1e-10,
        root=torch.exp(process.log_snr(t) / 2),
    )


@every
def test_noise_rate_is_the_fall_of_log_snr(process):
    ratio = process.g2(INNER) / process.sigma2(INNER)
    close(ratio, -derivative(process.log_snr), rtol=1e-8, drift_forgotten=process.sigma_rate(INNER) / process.sigma2(INNER))


@every
def test_forward_sde_has_the_marginals(process):
    """`dP/dt = 2 f P + g^2` keeps `P = alpha^2 v + sigma^2`, for any data variance v."""
    for v in (0.0, 0.7):
        P = process.alpha(INNER) ** 2 * v + process.sigma2(INNER)
        rate = derivative(lambda t, v=v: process.alpha(t) ** 2 * v + process.sigma2(t))
        f, g2 = process.f(INNER), process.g2(INNER)
        close(2 * f * P + g2, rate, atol=1e-9, rtol=1e-9, g_not_squared=2 * f * P + g2.sqrt())


@every
def test_ends_and_prior(process):
    start, end = f64(0.0), f64(1.0)
    reaches = {"VP": True, "CosineVP": True, "TableVP": False, "VE": False, "Flow": True}[type(process).__name__]
    assert process.reaches_data is reaches
    close(
        process.alpha(start),
        math.sqrt(1 - 0.00085) if isinstance(process, TableVP) else 1.0,
        atol=1e-12,
        end=process.alpha(end) + 2,
    )
    accepts(lambda sigma: _zero_iff(sigma, reaches), process.sigma(start), at_the_other_end=0.5 if reaches else 0.0)
    prior = {"VE": math.sqrt(1 + 50.0**2)}.get(type(process).__name__, 1.0)
    close(process.prior_std, prior, atol=1e-9, signal_twice=math.sqrt(prior**2 + 1))


def _zero_iff(sigma, expected):
    assert (float(sigma) == 0) is expected


def test_known_values():
    close(VP().alpha(f64(1.0)), math.exp(-10.05 / 2), atol=1e-14, squared=math.exp(-10.05))
    close(
        VP().alpha(f64(0.3)) ** 2 + VP().sigma2(f64(0.3)),
        1.0,
        atol=1e-14,
        not_squared=VP().alpha(f64(0.3)) + VP().sigma2(f64(0.3)),
    )
    close(Flow().g2(f64(0.25)), 2 * 0.25 / 0.75, atol=1e-14, half=0.25 / 0.75)
    close(VE().sigma(f64(0.5)), math.sqrt(0.01 * 50), atol=1e-12, arithmetic=25.005)
    t = f64(0.4)
    cosine = math.cos(math.pi / 2 * 0.408 / 1.008) / math.cos(math.pi / 2 * 0.008 / 1.008)
    close(CosineVP().alpha(t), cosine, atol=1e-14, no_offset=math.cos(math.pi / 2 * 0.4))
    close(CosineVP().alpha(f64(1.0)), 0.0, atol=0.0, rounding=math.cos(math.pi / 2))
    close(
        CosineVP().sigma2(INNER),
        1 - CosineVP().alpha(INNER) ** 2,
        atol=1e-14,
        unscaled=torch.sin(CosineVP()._angle(INNER)) ** 2,
    )


def test_small_times_keep_their_digits():
    t = f64(1e-12)
    close(VP().sigma2(t), 1e-13, rtol=1e-6, atol=0, cancelled=1 - VP().alpha(t) ** 2)
    slope = math.pi / 1.008 * math.tan(math.pi / 2 * 0.008 / 1.008)
    close(CosineVP().sigma2(t), slope * 1e-12, rtol=1e-6, atol=0, cancelled=1 - CosineVP().alpha(t) ** 2)
    assert math.isfinite(float(VP().sigma2_rate(f64(0.0))))


def test_table_is_met_at_its_nodes():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    table = torch.cumprod(1 - betas, 0)
    t = torch.arange(1000, dtype=F64) / 999
    close(SD.alpha(t) ** 2, table, atol=1e-13, shifted=table.roll(1))
    close(SD.sigma(f64(0.0)), 0.0291548, atol=1e-6, data=0.0)
    clean = TableVP.from_scheduler(table, ends_at_data=True)
    assert clean.reaches_data
    t = torch.arange(1001, dtype=F64) / 1000
    close(clean.timestep(t), (torch.arange(1001) - 1).clamp(min=0), atol=1e-9, no_offset=1000 * t)
    close(clean.alpha(t)[1:] ** 2, table, atol=1e-13, shifted=clean.alpha(t)[:-1] ** 2)
    fine = torch.linspace(0, 1, 5001, dtype=F64)
    for process in (SD, clean):
        assert bool((process.log_alpha(fine).diff() < 0).all())
        assert bool((process.g2(fine) > 0).all())


def test_table_agrees_with_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    other = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    ours = SD.alpha(torch.arange(1000, dtype=F64) / 999) ** 2
    close(ours, scheduler.alphas_cumprod.double(), atol=1e-5, linear_betas=other.alphas_cumprod.double())


@every
def test_time_at_inverts_log_snr(process):
    t = INNER
    close(process.time_at(process.log_snr(t)), t, atol=1e-9, half=process.time_at(process.log_snr(t) / 2))
    assert process.time_at(f64(1e9)) < 1e-12
    assert process.time_at(f64(-1e9)) > 1 - 1e-12


def test_a_table_that_ends_with_zero_has_its_nodes_and_finite_rates():
    nodes = torch.arange(1000, dtype=F64) / 999
    close(ZERO.alpha(nodes) ** 2, f64(ZERO.alphas_cumprod), atol=1e-13, not_rescaled=SD.alpha(nodes) ** 2)
    end = f64(1.0)
    assert float(ZERO.alpha(end)) == 0
    assert float(ZERO.sigma2(end)) == 1
    close(ZERO.sigma2_rate(end), 0.0, atol=1e-12, of_the_other_table=SD.sigma2_rate(end))
    inside, slope = f64(0.9995), (ZERO.alpha(f64(0.9990)) - ZERO.alpha(end)) / 0.001
    close(ZERO.alpha(inside), slope * 0.0005, rtol=2e-3, straight_in_the_log=(ZERO.alpha(f64(0.999)) * 1e-6).sqrt())


@pytest.mark.parametrize("process", [CosineVP(), ZERO, Flow()], ids=lambda p: type(p).__name__)
def test_at_pure_noise_the_signal_falls_at_a_finite_rate_and_the_drift_is_infinite(process):
    """Truth: alpha itself, just before the end. Twins: `f alpha`, which is no number there, or 0; tan(a) rounded."""
    end, step = f64(1.0), 1e-6
    slope = (process.alpha(end) - process.alpha(end - step)) / step
    close(process.alpha_rate(end), slope, rtol=1e-5, atol=0, general=process.f(end) * process.alpha(end), none=0.0)

    def infinite(values):
        assert [float(value) for value in values] == [-math.inf, math.inf]

    rounded = -math.pi / 2 * torch.tan(f64(math.pi / 2))
    accepts(infinite, (process.f(end), process.g2(end)), rounded=(rounded, -2 * rounded))


@pytest.mark.parametrize("steps", [5, 8, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_own_grid_is_the_schedulers(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    ours = TableVP.from_scheduler(scheduler.alphas_cumprod, ends_at_data=True, spacing=spacing, steps_offset=1)
    indices = ours.timestep(ours.own_grid(steps)[:-1])
    close(indices, scheduler.timesteps, atol=1e-9, of_the_other_end=scheduler.timesteps.flip(0), without_offset=indices - 0.5)
    assert float(ours.own_grid(steps)[-1]) == 0


def test_own_grid_refuses_what_the_table_has_not():
    with pytest.raises(ValueError, match=r"sampler\.steps: the scheduler's table has 1000 steps, got 1001"):
        SD.own_grid(1001)
    with pytest.raises(ValueError, match=r"sampler\.grid: .*does nothing"):
        TableVP(SD.alphas_cumprod, steps_offset=0).own_grid(10)


@pytest.mark.parametrize(("shift", "mu"), [(3.0, None), (1.0, 0.7)])
@pytest.mark.parametrize("last", [None, 0.003])
def test_own_grid_of_a_flow_is_the_schedulers(shift, mu, last):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=mu is not None)
    scheduler.set_timesteps(sigmas=torch.linspace(1, last or 1 / 7, 7).tolist(), mu=mu)
    found = Flow(shift=shift if mu is None else math.exp(mu), last=last).own_grid(7)
    close(found, scheduler.sigmas, atol=1e-6, unshifted=Flow(last=last).own_grid(7))


def test_a_cut_table_is_the_same_process_up_to_its_end() -> None:
    """Alpha, sigma and the network's times at the nodes that are left. Twin: the whole table at the same t."""
    whole = TableVP(tuple(torch.linspace(1, 1e-3, 101, dtype=torch.float64).square().tolist()))
    cut = whole.cut(0.05)
    kept = len(cut.alphas_cumprod)
    assert 0.05 <= cut.alphas_cumprod[-1] ** 0.5 < 0.06
    t = torch.linspace(0, 1, kept, dtype=torch.float64)
    at = t * (kept - 1) / 100
    close(cut.alpha(t), whole.alpha(at), atol=1e-9, same_time=whole.alpha(t))
    close(cut.timestep(t), whole.timestep(at), atol=1e-9, same_time=whole.timestep(t))
    with pytest.raises(ValueError, match="least: 1.5 leaves 0 of 101 entries; take a smaller one"):
        whole.cut(1.5)


def test_a_time_is_looked_up_once_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: a table that forgets."""
    table, asked = TableVP.scaled_linear(), []
    spline = TableVP._spline
    monkeypatch.setattr(TableVP, "_spline", lambda self, t: asked.append(float(t)) or spline(self, t))

    def looked_up_once(forgets: bool) -> None:
        asked.clear()
        values = []
        for _ in range(3):
            values.append(float(table.alpha(f64(0.3))))
            if forgets:
                table._seen.clear()
        assert values == [values[0]] * 3
        assert len(asked) == 1

    accepts(looked_up_once, False, forgets=True)
    for t in torch.linspace(0, 1, 2000, dtype=F64):
        table.alpha(t)
    assert len(table._seen) <= 1024
