"""Truth: the policy gradient of the linear-quadratic case in closed form, rewards and KL to go by hand."""

import pytest
import torch
from affine import BETA, OLD, ExactValue, exactly, gradient, model, setting
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms import _critic
from scoreaction.algorithms._critic import kl_to_go

VP = sa.VP()
GRADIENTS = {1.0: (-0.1202011, 0.4413656), 0.5: (-0.1752086, 0.3905666)}


def learner(eta=1.0, *, steps, batch, **config):
    return sa.VARD(beta=BETA, **config).build(setting(model(VP), eta=eta, steps=steps, batch=batch))


def ascent(eta, steps, batch, *, value=None, seeds=2):
    """Minus the gradient of one iteration's losses at the old policy, with the exact value in the critic's place."""
    exact = value or ExactValue(VP, eta, OLD)
    draws = []
    for seed in range(seeds):
        found = learner(eta, steps=steps, batch=batch, updates=1, rows=10**7, trust=0.0)
        found._critic_updates = lambda experience, generator: iter(())
        found.grad_value = lambda at: exact.grad(at.x, at.t)
        updates = found.updates(exactly(found, batch, seed), torch.Generator().manual_seed(seed))
        draws.append(-gradient(found.setting.model, list(updates)))
    return torch.stack(draws).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_with_the_exact_value_it_is_the_policy_gradient(eta):
    """Looking from where the policy's own step leads; the steps' first-order error goes with their number."""
    truth, fine = f64(GRADIENTS[eta]), ascent(eta, 300, 500)
    coarse = ascent(eta, 30, 2000)
    wrong = {"sign": -fine, "mean_over_steps": fine / 300, "other_eta": f64(GRADIENTS[1.5 - eta]), "coarse_far": coarse * 1.4}
    close(fine, truth, atol=0.03, **wrong)
    assert float((fine - truth).norm()) < float((coarse - truth).norm())


def caught(monkeypatch, **config):
    seen = {}

    def watched(value, target, **options):
        seen.update(value=value, target=target)
        return iter(())

    monkeypatch.setattr(_critic, "critic_updates", watched)
    found = learner(steps=6, batch=20, **config)
    experience = exactly(found, 20)
    found.critic.double()
    list(found._critic_updates(experience, torch.Generator()))
    return found, experience, seen


def test_the_critic_sees_all_states_the_data_among_them(monkeypatch):
    """At t = 0 the target is the reward; before it, less beta times the KL still to be paid from there."""
    found, experience, seen = caught(monkeypatch)
    target = seen["target"].reshape(7, 20)
    close(target[-1], experience.rewards, atol=1e-12, one_step_before=target[-2])
    ahead = torch.cat([kl_to_go(found.setting, experience), torch.zeros(1, 20)])
    wrong = {"no_kl": experience.rewards.expand(7, 20), "beta_dropped": experience.rewards - ahead}
    wrong["one_step_on"] = experience.rewards - BETA * torch.cat([ahead[1:], torch.zeros(1, 20)])
    close(target, experience.rewards - BETA * ahead, atol=1e-9, **wrong)
    torch.nn.init.normal_(found.critic.net.last.weight)
    rows = torch.tensor([0, 6 * 20 + 3])
    times, x = experience.rollout.times, experience.rollout.x
    said = found.critic(torch.stack([x[0, 0], x[6, 3]]), times[[0, 6]], None, None)
    later = found.critic(torch.stack([x[1, 0], x[5, 3]]), times[[1, 5]], None, None)
    close(seen["value"](rows).detach(), said.detach(), atol=1e-9, a_step_apart=later.detach())


def test_the_published_target_is_the_reward_alone(monkeypatch):
    _, experience, seen = caught(monkeypatch, kl_to_go=False)
    _, _, ours = caught(monkeypatch)
    close(seen["target"].reshape(7, 20), experience.rewards.expand(7, 20), atol=0, with_kl=ours["target"].reshape(7, 20))


def test_the_values_gradient_is_that_of_the_network():
    found = learner(steps=4, batch=8)
    torch.nn.init.normal_(found.critic.net.last.weight)
    found.critic.double()
    at = exactly(found, 8).points()
    h = 1e-5
    with torch.no_grad():
        up, down = (found.critic(at.x + d, at.t, None, None) for d in (h, -h))
    truth = (up - down) / (2 * h)
    close(found.grad_value(at)[:, 0], truth, atol=1e-6, sign=-truth)


def test_the_trust_region_adapts():
    """The last update's path KL to the old policy moves the penalty."""
    found = learner(steps=5, batch=16, updates=2, rows=40, trust=1.0, trust_region=1e-9)
    found._critic_updates = lambda experience, generator: iter(())
    found.critic.double()
    updates = found.updates(exactly(found, 16), torch.Generator().manual_seed(0))
    next(updates)
    with torch.no_grad():
        found.setting.model.parameters["th"] += 1.0
    list(updates)

    def doubled(trust):
        assert trust == 2.0

    accepts(doubled, found.state["trust"], unmoved=1.0, halved=0.9)
    assert found.state["kl_to_old"] > 0.1


def test_a_black_box_will_do_and_a_deterministic_sampler_will_not():
    sa.VARD().build(setting(model(VP), differentiable=False))
    with pytest.raises(ValueError, match=r"sampler\.eta: .*set it above 0"):
        sa.VARD().build(setting(model(VP), eta=0.0))
