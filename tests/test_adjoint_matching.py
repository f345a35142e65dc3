"""Truth: on Gaussian data the adjoint is a product of known slopes, and the optimal action is the tilted law's score."""

import pytest
import torch
from affine import BETA, LAW, REWARD, Affine, exactly, gradient, model, setting
from driving import total
from oracles.linear_quadratic import ScalarLQ
from twins import accepts, close

import scoreaction as sa
from scoreaction.algorithms.score_action import score_action_loss
from scoreaction.diffusion.kl import g2_integral
from scoreaction.diffusion.predictions import score

VP, FLOW = sa.VP(), sa.Flow()


def generated(updates):
    """A list of updates as the generator that an algorithm gives, which takes figures."""
    for update in updates:  # noqa: UP028
        yield update


def learner(made, *, steps, batch, beta=BETA, max_rows=10**6, **config):
    return sa.AdjointMatching(beta=beta, **config).build(setting(made, steps=steps, batch=batch, max_rows=max_rows))


@pytest.mark.parametrize("process", [VP, FLOW], ids=["VP", "Flow"])
def test_the_lean_adjoint_is_the_product_of_the_references_slopes(process):
    """`a_i = A_i A_{i+1} ... A_{N-1} grad r(x0)`, A of the exact score's step, whatever the policy; also in pieces."""
    found = learner(model(process), steps=12, batch=10, max_rows=4)
    experience = exactly(found, 10)
    times = experience.times
    A = torch.tensor([a for a, _, _ in ScalarLQ(process, m=0.3, v=0.8).steps(times)], dtype=torch.float64)
    product = A.flip(0).cumprod(0).flip(0)[:, None, None]
    slope = 1.2 - experience.x0
    wrong = {"of_the_end": torch.cat([product[1:], product[-1:] * 0 + 1]) * slope, "sign": -product * slope}
    wrong["not_carried"] = slope.expand(12, 10, 1)
    close(experience.adjoint, product * slope, atol=1e-6, **wrong)
    with torch.no_grad():
        said = [found.model.reference(experience.x[i], times[i]) for i in range(12)]
    close(experience.pretrained.x0, torch.stack([p.x0 for p in said]), atol=1e-12, policy=experience.old.x0)
    close(experience.pretrained.eps, torch.stack([p.eps for p in said]), atol=1e-12, policy=experience.old.eps)


def test_the_loss_is_the_regression_on_the_adjoint():
    """`integral 1/2 ||g (s - s_pre) - g a/beta||^2` times beta, its gradient written by hand."""
    found = learner(model(VP), steps=8, batch=20, updates=1, rows=10**6)
    experience = exactly(found, 20)
    made = found.model
    updates = list(found.updates(experience, torch.Generator().manual_seed(0)))
    at, times = experience.steps().states, experience.times
    said, base = made.predict(at.x, at.t), made.reference(at.x, at.t)
    scores = [-p.eps[:, 0] / VP.sigma(at.t) for p in (said, base)]
    weight = ((times[:-1] - times[1:]) * VP.g2((times[:-1] + times[1:]) / 2)).repeat_interleave(20)
    adjoint = experience.adjoint.flatten()

    def by_hand(target, size=1.0):
        loss = (weight / 2 * (scores[0] - scores[1] - target) ** 2).sum() / 20 * BETA * size
        return torch.autograd.grad(loss, made.parameters["th"], retain_graph=True)[0]

    wrong = {"sign": by_hand(-adjoint / BETA), "without_beta": by_hand(adjoint), "mean": by_hand(adjoint / BETA, 1 / 8)}
    whole = gradient(made, generated(updates))
    close(whole, by_hand(adjoint / BETA), rtol=1e-6, **wrong)
    split = learner(model(VP), steps=8, batch=20, updates=4, rows=40)
    parts = list(split.updates(exactly(split, 20), torch.Generator().manual_seed(0)))
    assert [update.network for update in parts] == ["policy"] * 4
    close(gradient(split.model, generated(parts)) / 4, by_hand(adjoint / BETA), rtol=1e-6, a_quarter=whole / 4)


@pytest.mark.slow
def test_its_fixed_point_is_the_optimal_action():
    """Along the tilted law's own paths the regression asks for nothing more, up to the error of 200 steps."""

    def push(beta, law):
        made = sa.Model(Affine(VP, law), process=VP, predicts="v", shape=(1,))
        made.reference_net = Affine(VP).requires_grad_(False)
        found = learner(made, steps=200, batch=800, beta=beta, updates=1, rows=10**6)
        updates = list(found.updates(exactly(found, 800), torch.Generator().manual_seed(0)))
        return float(gradient(made, generated(updates)).norm())

    optimal = LAW.tilted(REWARD.quadratic, BETA)
    twin = push(2 * BETA, optimal)

    def rests(value):
        assert value < 0.1 * twin

    accepts(rests, push(BETA, optimal), pretrained=push(BETA, LAW), other_beta=twin)


def test_trust_keeps_to_the_policy_that_sampled():
    found = learner(model(VP), steps=4, batch=10, updates=1, rows=10**6, trust=2.0)
    experience = exactly(found, 10)
    made = found.model
    with torch.no_grad():
        made.parameters["th"] += 0.5
    (update,) = list(found.updates(experience, torch.Generator().manual_seed(0)))
    at = experience.steps()
    action, old, pretrained = (score(VP, at.t, p) for p in (made.predict(at.x, at.t), at.old, at.pretrained))
    fixed = {"old": old, "pretrained": pretrained, "grad_value": experience.adjoint.flatten(0, 1)}
    fixed |= {"g2dt": g2_integral(VP, at.t, at.s), "eta": 1.0, "beta": BETA}
    truth, without = (4 * score_action_loss(action, **fixed, trust=k * BETA).mean() for k in (2.0, 0.0))
    close(total(update).detach(), truth.detach(), rtol=1e-9, atol=0, without=without.detach())


def test_what_it_needs_is_refused_with_a_remedy():
    for options, message in (
        ({"eta": 0.5}, r"sampler\.eta: .*is eta 1 \(got 0\.5\)"),
        ({"differentiable": False}, "reward: adj"),
    ):
        with pytest.raises(ValueError, match=message):
            sa.AdjointMatching().build(setting(model(VP), **options))
    sa.AdjointMatching().build(setting(model(VP)))
