"""Truth: a Newton step to the minimum of a quadratic, one state's score and clean sample, the move of DDIM's own step."""

import pytest
import torch
from affine import BETA
from twins import F64, close, f64

import scoreaction as sa
from scoreaction.algorithms._step import StepWeights, minimiser, step_loss
from scoreaction.algorithms.score_action import score_action_loss
from scoreaction.diffusion.kl import drift_rate, g2_integral
from scoreaction.diffusion.predictions import score
from scoreaction.diffusion.solvers import ddim_step, time_grid
from scoreaction.diffusion.transitions import sum_event
from scoreaction.types import Prediction

VP, FLOW = sa.VP(), sa.Flow()


def newton(loss, at):
    """The minimum of a quadratic loss (rows,): one Newton step from `at`."""
    at = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(at).sum(), at, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), at)
    return (at - slope / curvature).detach()


def test_the_losss_minimum_is_the_optimal_action():
    """`a* = s_pre + (eta^2/c) grad V/beta`; with trust, halfway to old where both weigh the same."""
    generator = torch.Generator().manual_seed(0)
    pretrained, old, grad = torch.randn(3, 4, 2, generator=generator, dtype=F64)
    for eta in (1.0, 0.5, 0.2):
        fixed = {"old": old, "pretrained": pretrained, "grad_value": grad, "g2dt": f64([0.1, 0.3, 2.0, 5.0]), "eta": eta}

        def best(trust, fixed=fixed):
            return newton(lambda a: score_action_loss(a, **fixed, beta=BETA, trust=trust), torch.zeros_like(old))

        step = eta**2 / drift_rate(eta) * grad / BETA
        wrong = {"sign": pretrained - step}
        if eta < 1:
            wrong["without_eta2_over_c"] = pretrained + grad / BETA
        close(best(0.0), pretrained + step, atol=1e-10, **wrong)
        close(best(BETA), (pretrained + old + step) / 2, atol=1e-10, no_trust=best(0.0))


def test_the_steps_minimum_is_the_optimal_action():
    """The same for `step_loss`, whose action is x0_hat: `x0* = x0_pre + (eta^2/c) sigma^2/alpha grad V/beta`."""
    generator = torch.Generator().manual_seed(0)
    pretrained, old, grad = torch.randn(3, 4, 2, generator=generator, dtype=F64)
    t = f64([0.1, 0.3, 0.6, 0.9])
    for eta in (1.0, 0.5, 0.2):
        fixed = {"weights": StepWeights.of_path(VP, t, t / 2, eta), "grad_value": grad, "pretrained": pretrained, "old": old}

        def best(trust, fixed=fixed):
            found = newton(lambda x0: step_loss(x0, **fixed, beta=BETA, trust=trust), torch.zeros_like(old))
            close(minimiser(**fixed, beta=BETA, trust=trust), found, atol=1e-10, sign=-found)
            return found

        step = eta**2 / drift_rate(eta) * (VP.sigma2(t) / VP.alpha(t))[:, None] * grad / BETA
        close(best(0.0), pretrained + step, atol=1e-10, sign=pretrained - step)
        close(best(BETA), (pretrained + old + step) / 2, atol=1e-10, no_trust=best(0.0))


@pytest.mark.parametrize("process", [VP, FLOW, sa.VE()], ids=["VP", "Flow", "VE"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_score_and_the_clean_sample_say_the_same(process, eta):
    """`score_action_loss` on scores is `step_loss` with the path's weights on x0_hat: the same gradient, t = 1 included."""
    generator = torch.Generator().manual_seed(0)
    x, *clean = torch.randn(4, 6, 2, generator=generator, dtype=F64)
    grad = torch.randn(6, 2, generator=generator, dtype=F64)
    t, s = f64([1.0, 0.9, 0.5, 0.3, 0.1, 0.02]), f64([0.9, 0.7, 0.4, 0.2, 0.05, 0.01])
    x0, old, pretrained = clean
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x0 = x0.requires_grad_()

    def action(y):
        return score(process, t, Prediction(y, (x - alpha * y) / sigma))

    def slope(loss):
        return torch.autograd.grad(loss.sum(), x0)[0]

    given = {"g2dt": g2_integral(process, t, s), "grad_value": grad, "beta": BETA, "trust": 0.3}
    on_scores = slope(score_action_loss(action(x0), old=action(old), pretrained=action(pretrained), eta=eta, **given))
    weights = {name: of(process, t, s, eta) for name, of in (("path", StepWeights.of_path), ("chain", StepWeights.of_chain))}
    del given["g2dt"]
    path, chain = (slope(step_loss(x0, weights=w, old=old, pretrained=pretrained, **given)) for w in weights.values())
    close(on_scores, path, rtol=1e-9, atol=1e-12, weights_of_the_chain=chain)


@pytest.mark.parametrize("process", [VP, FLOW], ids=["VP", "Flow"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_the_chains_weights_are_those_of_its_own_step(process, eta):
    """A change of x0_hat moves the mean of DDIM's step by `shift` and costs `cost/2` nats a square; in the limit the path's."""
    t, s = f64([1.0, 0.6, 0.2]), f64([0.7, 0.55, 0.1])
    x, move = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    x0 = torch.ones(3, 4, dtype=F64)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    before, after = (
        ddim_step(process, Prediction(x, (y - alpha * x) / sigma), t, s, eta) for x, y in ((x0, x), (x0 + move, x))
    )
    weights = StepWeights.of_chain(process, t, s, eta)
    close(after.mean - before.mean, weights.shift[:, None] * move, atol=1e-12, negative=-weights.shift[:, None] * move)
    cost = weights.cost / 2 * (move**2).sum(1)
    close(after.kl(before), cost, rtol=1e-10, atol=0, without_half=2 * cost)
    near = t[1:] - 1e-5
    path, chain = StepWeights.of_path(process, t[1:], near, eta), StepWeights.of_chain(process, t[1:], near, eta)
    close(path.shift, chain.shift, rtol=2e-3, atol=0, half=path.shift / 2)
    close(path.cost, chain.cost, rtol=2e-3, atol=0, half=path.cost / 2)
    step, alone = StepWeights.of_step(process, t, s, eta), StepWeights.of_path(process, t, s, eta)
    whole = weights if process is FLOW else alone  # at alpha = 0 the step is taken whole
    close(step.shift, torch.cat([whole.shift[:1], alone.shift[1:]]), atol=1e-12, chain_everywhere=weights.shift)


def test_losses_sum_over_dimensions():
    """A sample of twice the dimensions, the same in each, has twice the advantage and twice the loss."""
    one = Prediction(torch.ones(1, 1), torch.ones(1, 1))
    fixed = {"g2dt": torch.tensor([0.5]), "eta": 1.0, "beta": BETA, "trust": 0.2}

    def loss(d):
        old, pretrained, grad = torch.zeros(1, d), torch.ones(1, d), 0.3 * torch.ones(1, d)
        return score_action_loss(torch.full((1, d), 0.7), old=old, pretrained=pretrained, grad_value=grad, **fixed)

    close(loss(4), 4 * loss(1), atol=1e-6, mean=loss(1))
    assert float(sum_event(one.x0)) == 1
    assert time_grid(VP, 2)[1] == 0.5
