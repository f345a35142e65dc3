"""Truth: the values of closed forms found by other routes, the HJB equation by autograd, moment ODEs, real sampler steps."""

import math

import pytest
import torch
from oracles.linear_quadratic import LinearQuadratic, ScalarLQ, chain_kl, path_kl
from scipy.integrate import quad, solve_ivp
from twins import F64, close, f64

from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.diffusion.processes import VE, VP, Flow
from scoreaction.diffusion.solvers import SOLVERS, time_grid


def matrix_lq(process, eta, l=0.2):
    return LinearQuadratic(process, f64([0.3]), f64([[0.8]]), f64([[1.0]]), f64([l]), f64([1.0]), 0.5, eta)


def scalar_lq(process, eta=1.0, l=0.2):
    return ScalarLQ(process, m=0.3, v=0.8, q=1.0, l=l, mu=1.0, beta=0.5, eta=eta)


def grid(n):
    return torch.linspace(1, 0, n + 1, dtype=F64)


def marginal(problem, process):
    alpha2 = float(process.alpha(f64(1.0)) ** 2)
    return math.sqrt(alpha2) * problem.m, alpha2 * problem.C + process.sigma2(f64(1.0)) * torch.eye(len(problem.m), dtype=F64)


def test_values_gradients_and_actions():
    at, t = f64([[0.7]]), f64(0.2)
    one, half = matrix_lq(VP(), 1.0), matrix_lq(VP(), 0.5)
    close(one.value(at, t), 0.00215681, other_eta=half.value(at, t))
    close(one.value_grad(at, t), 0.2562996, other_eta=half.value_grad(at, t))
    close(one.action(at, t), -0.01321785, pretrained=one.pretrained_score(at, t))
    close(half.value(at, t), 0.07658105, other_eta=one.value(at, t))
    close(half.value_grad(at, t), 0.37062655, other_eta=one.value_grad(at, t))
    no_factor = half.pretrained_score(at, t) + half.value_grad(at, t) / 0.5
    close(half.action(at, t), -0.2293158, without_eta2_over_c=no_factor)
    flow, at, t = matrix_lq(Flow(), 1.0), f64([[-0.4]]), f64(0.5)
    close(flow.value(at, t), -0.44961811, other_eta=matrix_lq(Flow(), 0.5).value(at, t))
    close(flow.action(at, t), 2.52941176, pretrained=flow.pretrained_score(at, t))


def test_path_optimum_figures():
    for eta, kl, objective in ((1.0, 0.36178092, -0.1746504), (0.5, 0.36516741, -0.18265686)):
        problem = matrix_lq(VP(), eta)
        memoryless, started = problem.optimum(), problem.optimum(start=marginal(problem, VP()))
        close(started.kl_nats, kl, memoryless=memoryless.kl_nats)
        close(started.objective, objective, memoryless=memoryless.objective)
        values = problem.value(torch.linspace(-8, 8, 4001, dtype=F64)[:, None], f64(1.0))
        mean, variance = marginal(problem, VP())
        nodes = torch.linspace(-8, 8, 4001, dtype=F64)
        density = torch.exp(-((nodes - mean) ** 2) / (2 * variance[0, 0]))
        expected = float((values * density).sum() / density.sum())
        close(started.objective, expected, atol=1e-9, at_the_mean=float(problem.value(mean[None, :], f64(1.0))))
        law = Mixture(f64([1.0]), f64([[0.3]]), f64([[[0.8]]])).tilted(Quadratic(problem.Q, problem.l, problem.mu), 0.5)
        close(memoryless.mean, law.means[0], atol=1e-12, data=problem.m)
        close(memoryless.covariance, law.covariances[0], atol=1e-12, data=problem.C)


MATRIX = {
    "m": f64([0.3, -0.2]),
    "C": f64([[0.8, 0.3], [0.3, 0.5]]),
    "Q": f64([[1.0, -0.4], [-0.4, 0.3]]),
    "l": f64([0.2, 0.5]),
    "mu": f64([1.0, 0.1]),
    "beta": 0.5,
}


@pytest.mark.parametrize("process", [VP(), Flow(), VE(sigma_max=5.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.2])
def test_hjb_in_two_dimensions(process, eta):
    """`-dV/dt + (-f x + c g^2 s_pre).grad V + 1/2 eta^2 g^2 (lap V + |grad V|^2/beta) = 0`, Q and C not commuting."""
    problem = LinearQuadratic(process, eta=eta, **MATRIX)
    assert not torch.allclose(problem.Q @ problem.C, problem.C @ problem.Q)
    x, t = f64([[0.4, -1.1], [1.5, 0.2]]).requires_grad_(), f64(0.37).requires_grad_()
    value = problem.value(x, t)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    close(problem.value_grad(x, t).detach(), slope.detach(), atol=1e-11, wrong_sign=-slope.detach())
    laplacian = sum(torch.autograd.grad(slope[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    rate = torch.stack([torch.autograd.grad(v, t, retain_graph=True)[0] for v in value])
    with torch.no_grad():
        f, g2, c = process.f(t), process.g2(t), (1 + eta**2) / 2

        def residual(noise2, pull):
            drift = (-f * x + c * g2 * problem.pretrained_score(x, t)) * slope
            return -rate + drift.sum(1) + g2 / 2 * (noise2 * laplacian + pull / problem.beta * slope.square().sum(1))

        close(residual(eta**2, eta**2), 0.0, atol=1e-11, noise_without_half=residual(2 * eta**2, eta**2))
        if eta < 1:
            assert float(residual(eta**2, 1.0).abs().max()) > 1e-3
        best = problem.action(x, t) - problem.pretrained_score(x, t)
        # the action maximises c g^2 a.grad V - (beta/2)(c/eta)^2 g^2 |a|^2
        stationary = c * g2 * slope - problem.beta * (c / eta) ** 2 * g2 * best
        scale = float(slope.abs().max() * g2)
        close(stationary / scale, 0.0, atol=1e-12, no_action=c * g2 * slope / scale)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_optimal_law_by_moment_ode(eta):
    """Flow, data N(.3, .8), r = x, beta .5: the mean is the tilted 1.90 only with eta^2/c and only at the eta trained for."""
    process = Flow()
    problem = LinearQuadratic(process, f64([0.3]), f64([[0.8]]), f64([[0.0]]), f64([1.0]), f64([0.0]), 0.5, eta)

    def final_mean(factor: float, sampled_eta: float = eta) -> float:
        c = (1 + sampled_eta**2) / 2

        def rate(minus_u, mean):  # u = -log(1 - t) takes the infinite rates at t = 1 away
            t = f64(-math.expm1(minus_u))
            x = f64(mean)[None, :]
            action = problem.pretrained_score(x, t) + factor * problem.value_grad(x, t) / 0.5
            drift = -process.f(t) * x + c * process.g2(t) * action
            return (drift * (1 - t)).numpy()[0]

        return float(solve_ivp(rate, (-25.0, 0.0), [0.0], rtol=1e-8, atol=1e-10).y[0, -1])

    right = eta**2 * 2 / (1 + eta**2)
    if eta == 1:
        close(final_mean(right), 1.90, atol=1e-4, wrong_sign=final_mean(-1.0), no_action=final_mean(0.0))
    else:
        close(final_mean(right), 1.90, atol=1e-4, without_eta2_over_c=final_mean(1.0))
        close(final_mean(1.0), 4.30, atol=1e-3, right=final_mean(right))
        # in rho = alpha^2 v/P the shift at sampling eta' is 0.64 c' int rho^(1/8 + eta'^2/2 - 1) drho over [0, 1]
        others = [0.3 + 0.64 * (1 + e**2) / 2 / (1 / 8 + e**2 / 2) for e in (1.0, 0.0)]
        close(others, [1.324, 2.86], atol=1e-9, same_eta=[1.9, 1.9])
        close([final_mean(right, 1.0), final_mean(right, 0.0)], others, atol=0.006, same_eta=[final_mean(right)] * 2)


def policy(process, slope, offset):
    alpha = lambda t: float(process.alpha(f64(t)))  # noqa: E731
    return (lambda t: slope * alpha(t) ** 2), (lambda t: offset * alpha(t))


OLD, NEW = (-0.2, 0.3), (-0.6, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "eta", "end", "truth"),
    [
        (VP(), 1.0, 1.0, (-0.36662723, 0.15118503, (-0.1202011, 0.4413656))),
        (VP(), 0.5, 1.0, (-0.36154254, 0.11604798, (-0.1752086, 0.3905666))),
        (Flow(), 1.0, 0.999, (None, 0.15514772, None)),
        (Flow(), 0.5, 0.999, (None, 0.14328653, None)),
    ],
)
def test_affine_policies(process, eta, end, truth):
    old, difference, gradient = truth
    problem = scalar_lq(process, eta)
    start = problem.marginal(f64(end))

    def objective(parameters):
        return problem.affine_objective(*policy(process, *parameters), start=start, t=end)

    at_old, at_new = objective(OLD), objective(NEW)
    if old is not None:
        close(at_old, old, pretrained=objective((0.0, 0.0)))
    close(at_new - at_old, difference, backwards=at_old - at_new)
    if gradient is not None:
        h = 1e-3
        ups = [(objective((OLD[0] + h * i, OLD[1] + h * j)) - at_old) / h for i, j in ((1, 0), (0, 1))]
        downs = [(at_old - objective((OLD[0] - h * i, OLD[1] - h * j))) / h for i, j in ((1, 0), (0, 1))]
        close([(u + d) / 2 for u, d in zip(ups, downs, strict=True)], gradient, atol=2e-6, one_sided=ups)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_performance_difference_is_the_integrated_advantage(eta):
    """J(new) - J(old) = E_new int q_old dtau, q from the closed-form advantage rate and new's moments."""
    process, problem, c = VP(), scalar_lq(VP(), eta), (1 + eta**2) / 2
    A0, b0 = policy(process, *OLD)
    A1, b1 = policy(process, *NEW)
    start = problem.marginal(f64(1.0))

    def value_rate(t, y):
        f, g2, alpha, P = problem._rates(t)
        F, H = -f + c * g2 * (A0(t) - 1 / P), c * g2 * (alpha * problem.m / P + b0(t))
        w = problem.beta * (c / eta) ** 2 * g2
        return [2 * F * y[0] + w * A0(t) ** 2, F * y[1] - H * y[0] - w * A0(t) * b0(t)]

    old_value = solve_ivp(value_rate, (0, 1), [1.0, 1.2], rtol=1e-10, atol=1e-11, dense_output=True, method="DOP853").sol

    def forward(tau, y):
        t = 1 - tau
        f, g2, alpha, P = problem._rates(t)
        F, H = -f + c * g2 * (A1(t) - 1 / P), c * g2 * (alpha * problem.m / P + b1(t))
        mean, var = y[0], y[1]
        Pi, h = old_value(t)
        second = var + mean**2

        def product(p, q):  # E (p0 x + p1)(q0 x + q1)
            return p[0] * q[0] * second + (p[0] * q[1] + p[1] * q[0]) * mean + p[1] * q[1]

        new, base = (A1(t), b1(t)), (A0(t), b0(t))
        apart = (new[0] - base[0], new[1] - base[1])
        price = product(new, new) - product(base, base)
        gain = c * g2 * product((-Pi, h), apart)
        weight = g2 / 2 * (c / eta) ** 2
        exact, no_beta = gain - problem.beta * weight * price, gain - weight * price
        return [F * mean + H, 2 * F * var + eta**2 * g2, exact, no_beta, weight * product(new, new)]

    mean, var, total, no_beta, kl = solve_ivp(forward, (0, 1), [*start, 0, 0, 0], rtol=1e-10, atol=1e-11).y[:, -1]
    jump = problem.affine_objective(A1, b1, start=start) - problem.affine_objective(A0, b0, start=start)
    close(total, jump, atol=1e-7, kl_without_beta=no_beta, sign=-jump)
    reward = -(var + (mean - 1) ** 2) / 2 + 0.2 * mean
    close(problem.affine_objective(A1, b1, start=start), reward - 0.5 * kl, atol=1e-7, kl_to_go_without_beta=reward - kl)


@pytest.mark.slow
def test_affine_value_of_the_optimal_policy_is_the_optimum():
    for eta in (1.0, 0.5):
        problem, matrix = scalar_lq(VP(), eta), matrix_lq(VP(), eta)

        def excess(x, t, matrix=matrix, factor=1.0):
            at, time = f64([[x]]), f64(t)
            return factor * float(matrix.action(at, time) - matrix.pretrained_score(at, time))

        start = problem.marginal(f64(1.0))
        J = [
            problem.affine_objective(
                lambda t, w=w, e=excess: w * (e(1.0, t) - e(0.0, t)), lambda t, w=w, e=excess: w * e(0.0, t), start=start
            )
            for w in (1.0, 1.05, 0.95)
        ]
        truth = matrix.optimum(start=(f64([start[0]]), f64([[start[1]]]))).objective
        close(J[0], truth, atol=1e-8, stronger=J[1], weaker=J[2])
        assert max(J[1:]) < truth


def test_chain_optimum_and_its_figures():
    vp, flow = scalar_lq(VP(), l=0.0).chain_optimum(grid(50)), scalar_lq(Flow(), l=0.0).chain_optimum(grid(50))
    limit = matrix_lq(VP(), 1.0, l=0.0).optimum()
    close([vp.mean, vp.variance], [0.70323591, 0.30027762], path_optimum=[limit.mean.item(), limit.covariance.item()])
    close([vp.kl_nats, vp.objective], [0.25709705, -0.3227218], path_optimum=[limit.kl_nats, limit.objective])
    close(vp.ratios[45], -0.041955, neighbour=vp.ratios[44], sign=-vp.ratios[45])
    close(max(map(abs, vp.ratios)), 0.05808529, flow=max(map(abs, flow.ratios)))
    close([flow.mean, flow.variance, flow.kl_nats], [0.71396631, 0.3039142, 0.26810646], vp=[vp.mean, vp.variance, vp.kl_nats])
    close(max(map(abs, flow.ratios)), 0.03804677, vp=max(map(abs, vp.ratios)))


def test_chain_optimum_beats_its_neighbours_and_contracts_as_said():
    problem, times = scalar_lq(VP()), grid(20)
    steps = problem.steps(times)
    best = problem.chain_optimum(times)
    # backward recursion of e and h, Pi gives the same objective as the forward moments
    Pi, h, e = problem.terminal_value()
    for A, b, k in reversed(steps):
        D = 1 + Pi * k**2 / problem.beta
        e += (-Pi * b * b / 2 + h * b + k**2 * h * h / (2 * problem.beta)) / D - Pi * k**2 / 2
        h, Pi = A * (h - Pi * b) / D, A**2 * Pi / D
    mean, variance = problem.marginal(times[0])
    objective = -Pi * (variance + mean**2) / 2 + h * mean + e
    close(best.objective, objective, atol=1e-10, of_the_path=matrix_lq(VP(), 1.0).optimum().objective)
    # PI-FT's inner iteration at one step, from the reference: mu <- base + (k^2/beta) (h - Pi mu)
    Pi, h, _ = problem.terminal_value()
    for i in range(len(steps) - 1, 14, -1):
        A, b, k = steps[i]
        gain = k**2 / problem.beta
        base = A * 0.4 + b
        fixed = (base + gain * h) / (1 + gain * Pi)
        errors = [base - fixed]
        mu = base
        for _ in range(3):
            mu = base + gain * (h - Pi * mu)
            errors.append(mu - fixed)
        if k > 0:
            ratio = best.ratios[i]
            close(errors[3], ratio**3 * errors[0], atol=1e-15, sign=(-ratio) ** 3 * errors[0])
        D = 1 + Pi * gain
        h, Pi = A * (h - Pi * b) / D, A**2 * Pi / D


def test_chain_optimum_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="raise beta"):
        ScalarLQ(VP(), q=-40.0, beta=0.5).chain_optimum(grid(10))
    with pytest.raises(ValueError, match="raise beta"):
        LinearQuadratic(VP(), f64([0.0]), f64([[1.0]]), f64([[-2.0]]), f64([0.0]), f64([0.0]), 1.0)
    with pytest.raises(ValueError, match="eta"):
        matrix_lq(VP(), 0.0)


def test_sqdf_fixed_points():
    linear = ScalarLQ(VP(), m=0.3, v=0.8, l=1.0, beta=0.5)
    plain, discounted = linear.sqdf_fixed_point(grid(50)), linear.sqdf_fixed_point(grid(50), gamma=0.9)
    close([plain.mean, plain.variance, plain.kl_nats], [1.65877596, 0.67941562, 1.35877596], tilted=[1.9, 0.8, 1.6])
    close([discounted.mean, discounted.kl_nats], [0.71680513, 0.17768972], undiscounted=[plain.mean, plain.kl_nats])
    quadratic = scalar_lq(VP(), l=0.0).sqdf_fixed_point(grid(50))
    exact = scalar_lq(VP(), l=0.0).chain_optimum(grid(50))
    close([quadratic.mean, quadratic.variance], [0.81329887, 0.25323191], chain_optimum=[exact.mean, exact.variance])


def test_step_count_free_discount():
    linear = ScalarLQ(VP(), m=0.3, v=0.8, l=1.0, beta=0.5)
    rho = -50 * math.log(0.9)
    close(rho, 5.268, atol=5e-4, per_step=-math.log(0.9))
    by_gamma, by_rho = linear.sqdf_fixed_point(grid(50), gamma=0.9), linear.sqdf_fixed_point(grid(50), rho=rho)
    base, backwards = linear.chain_moments(grid(50))[0], linear.sqdf_fixed_point(grid(50), rho=-rho).mean
    reversed_clock = base + math.exp(-rho) * (backwards - base)  # exp(-rho (1 - s)); the shift is linear in the weights
    close(by_rho.mean, by_gamma.mean, atol=1e-12, reversed_clock=reversed_clock)
    kls = [linear.sqdf_fixed_point(grid(n), gamma=0.9).kl_nats for n in (25, 50, 200)]
    close(kls, [0.352, 0.178, 0.020], atol=6e-4, rho=[linear.sqdf_fixed_point(grid(n), rho=rho).kl_nats for n in (25, 50, 200)])


@pytest.mark.parametrize(
    ("process", "eta", "values", "limit"),
    [
        (VP(), 1.0, (0.69612169, 0.59812543, 0.52324296), 0.4999784),
        (Flow(), 1.0, (0.62164738, 0.55656696, 0.51323683), 0.5),
        (VP(), 0.5, (1.25419922, 1.00593119, 0.83201588), 0.7812163),
    ],
)
def test_whole_chain_and_path_kl(process, eta, values, limit):
    pre, tuned = ScalarLQ(process, eta=eta), ScalarLQ(process, m=1.0, eta=eta)
    chains = [chain_kl(pre, tuned, grid(n)) for n in (25, 50, 200)]
    close(chains, values, without_half=[2 * kl for kl in chains])
    path = path_kl(pre, tuned)
    close(path, limit, finest_chain=chains[-1])
    if eta != 1:
        close(path / path_kl(ScalarLQ(process), ScalarLQ(process, m=1.0)), 1.5625, atol=1e-8, eta_1_weight=1.0)
        alpha, g2 = process.alpha, process.g2
        plain = quad(lambda t: 0.5 * float(g2(f64(t)) * alpha(f64(t)) ** 2), 0, 1)[0]
        close(path, 1.5625 * plain, eta_1_weight=plain)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_chain_kl_is_that_of_the_solver_steps(eta):
    """The whole-chain KL again, with the library's own DDIM steps and exact predictions, along the policy's Gaussian law."""
    pre, tuned, times = ScalarLQ(VP(), eta=eta, m=0.3, v=0.8), ScalarLQ(VP(), eta=eta, m=-0.4, v=0.5), grid(12)
    laws = [Mixture.isotropic([[p.m]], std=math.sqrt(p.v)) for p in (pre, tuned)]
    nodes = torch.linspace(-9, 9, 3001, dtype=F64)
    mean, variance = tuned.marginal(times[0])
    ddim, total, mean_reduced = SOLVERS["ddim"], 0.0, 0.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        density = torch.exp(-((nodes - mean) ** 2) / (2 * variance))
        density = density / density.sum()
        x = nodes[:, None]
        base, new = (ddim.step(VP(), None, law.prediction(VP(), x, t), x, t, s, eta, None) for law in laws)
        if float(s) > 0:
            kl = float((density * new.kl(base)).sum())
            total, mean_reduced = total + kl, mean_reduced + 2 * kl
        probe = f64([[0.0], [1.0]])
        means = ddim.step(VP(), None, laws[1].prediction(VP(), probe, t), probe, t, s, eta, None).mean[:, 0]
        A, b = float(means[1] - means[0]), float(means[0])
        mean, variance = A * mean + b, A**2 * variance + float(new.std) ** 2
    close(chain_kl(pre, tuned, times), total, atol=1e-8, without_half=mean_reduced, direction=chain_kl(tuned, pre, times))
    close(tuned.chain_moments(times), (mean, variance), atol=1e-10, data=(tuned.m, tuned.v))


def test_chain_kl_overshoot_of_coarse_grids():
    """Unit-variance data, linear VP: the chain KL exceeds the path KL by 20 % at 50 steps and 5 % at 200."""
    pre, tuned = ScalarLQ(VP()), ScalarLQ(VP(), m=1.0)
    over = [chain_kl(pre, tuned, grid(n)) / path_kl(pre, tuned) - 1 for n in (50, 200)]
    close(over, [0.20, 0.05], atol=0.005, finer=over[::-1])


def test_kl_weight_at_the_first_flow_step_needs_the_x0_form():
    process, t, s = Flow(), f64(1.0), f64(0.98)
    laws = [Mixture.isotropic([[m]], std=1.0) for m in (0.0, 1.0)]
    x = f64([[0.3]])
    base, new = (law.prediction(process, x, t) for law in laws)
    steps = [SOLVERS["ddim"].step(process, None, p, x, t, s, 1.0, None) for p in (base, new)]
    k2 = process.sigma2(s)
    x0_form = float(process.alpha(s) ** 2 / (2 * k2) * (base.x0 - new.x0) ** 2)
    ratio = torch.exp(process.log_snr(s) - process.log_snr(t)) - 1
    close(steps[1].kl(steps[0]), x0_form, atol=1e-12, eps_form=float(ratio / 2 * (base.eps - new.eps) ** 2))


def test_kl_weight_depends_on_eta():
    process, t, s, eta = VP(), f64(0.5), f64(0.48), 0.5
    laws = [Mixture.isotropic([[m]], std=1.0) for m in (0.0, 1.0)]
    x = f64([[0.3]])
    base, new = (law.prediction(process, x, t) for law in laws)
    steps = [SOLVERS["ddim"].step(process, None, p, x, t, s, eta, None) for p in (base, new)]
    k2 = eta**2 * process.sigma2(s) / process.sigma2(t)
    k2 = k2 * (process.sigma2(t) - (process.alpha(t) / process.alpha(s)) ** 2 * process.sigma2(s))
    gain = process.alpha(s) - torch.sqrt(process.sigma2(s) - k2) * process.alpha(t) / process.sigma(t)
    truth = float(gain**2 / (2 * k2) * (base.x0 - new.x0) ** 2)
    ratio = torch.exp(process.log_snr(s) - process.log_snr(t)) - 1
    close(steps[1].kl(steps[0]), truth, atol=1e-12, eta_1_weight=float(ratio / 2 * (base.eps - new.eps) ** 2))


def test_memory_of_the_chain():
    flow = ScalarLQ(Flow(), eta=0.5)
    values = [flow.chain_correlation(grid(n)) for n in (25, 50, 200)]
    close(values, [0.4762255, 0.3927301, 0.2718404], eta_1=[ScalarLQ(Flow()).chain_correlation(grid(n)) for n in (25, 50, 200)])
    limit = float(VP().alpha(f64(1.0))) ** 0.25  # (alpha_1 sqrt(v/P_1))^(eta^2), v = 1
    close(limit, 0.29, atol=0.006, eta_not_squared=float(VP().alpha(f64(1.0))) ** 0.5)
    close(ScalarLQ(VP(), eta=0.5).chain_correlation(time_grid(VP(), 4000, name="power")), limit, atol=0.01, memoryless=0.0)
