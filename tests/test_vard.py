"""Truth: the policy gradient of the linear-quadratic case in closed form, rewards and KL to go by hand."""

from dataclasses import replace

import pytest
import torch
from affine import BETA, OLD, ExactValue, exactly, gradient, model, setting
from driving import each, evaluated
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._value import kl_to_go

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
        found._critic_updates = lambda rollout, generator: iter(())
        found.critic.gradient = lambda x, t, prompt: exact.grad(x, t)
        updates = found.updates(exactly(found, batch, seed), torch.Generator().manual_seed(seed))
        draws.append(-gradient(found.model, updates))
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


def caught(**config):
    """A learner, a rollout, and what its critic's loss is of: (critic's values, targets) of all rows of an update."""
    found = learner(steps=6, batch=20, **config)
    experience = exactly(found, 20)
    found.critic.double()
    return found, experience, list(found._critic_updates(experience, torch.Generator().manual_seed(0)))


def by_hand(found, experience, target):
    """The first loss of the critic for these targets (7, 20), at rows that are drawn as it draws them."""
    rows = torch.randint(140, (17,), generator=torch.Generator().manual_seed(0))
    x, t = experience.x.flatten(0, 1), experience.times.repeat_interleave(20)
    value = found.critic(x[rows], t[rows], experience.prompt.repeat(7)[rows])
    return ((value - target.flatten()[rows]) / found.critic.scale.spread).square().mean().detach()


def test_the_critic_sees_all_states_the_data_among_them():
    """At t = 0 the target is the reward; before it, less beta times the KL still to be paid from there."""
    found, experience, updates = caught()
    torch.nn.init.normal_(found.critic.net.last.weight)
    rewards, none_left = experience.rewards.expand(7, 20), torch.zeros(1, 20)
    ahead = torch.cat([kl_to_go(VP, 1.0, experience), none_left])
    targets = {
        "no_kl": rewards,
        "beta_dropped": rewards - ahead,
        "one_step_on": rewards - BETA * torch.cat([ahead[1:], none_left]),
    }
    wrong = {name: by_hand(found, experience, target) for name, target in targets.items()}
    close(evaluated(updates[0])[0].detach(), by_hand(found, experience, rewards - BETA * ahead), rtol=1e-9, atol=0, **wrong)


def test_the_critic_sees_each_state_with_the_prompt_of_its_trajectory():
    found, seen = learner(steps=3, batch=4), []
    rollout = replace(exactly(found, 4), prompt=torch.arange(4))
    found.critic.forward = lambda x, t, prompt, look=None: seen.append((x, t, prompt)) or x[:, 0]
    list(each(found._critic_updates(rollout, torch.Generator().manual_seed(0))))
    x, t, prompt = (torch.cat(parts) for parts in zip(*seen, strict=True))
    number = (x == rollout.x.flatten(0, 1).T).double().argmax(1)
    same(prompt, number % 4, of_the_step=number // 4)
    same(t, rollout.times[number // 4], of_the_path=rollout.times[number % 4])


def test_the_published_target_is_the_reward_alone():
    found, experience, updates = caught(kl_to_go=False)
    _, _, ours = caught()
    truth = by_hand(found, experience, experience.rewards.expand(7, 20))
    close(evaluated(updates[0])[0].detach(), truth, atol=0, with_kl=evaluated(ours[0])[0].detach())


def test_the_values_gradient_is_that_of_the_network():
    found = learner(steps=4, batch=8)
    torch.nn.init.normal_(found.critic.net.last.weight)
    found.critic.double()
    at = exactly(found, 8).steps().states
    h = 1e-5
    with torch.no_grad():
        up, down = (found.critic(at.x + d, at.t, at.prompt) for d in (h, -h))
    truth = (up - down) / (2 * h)
    close(found.critic.gradient(*at)[:, 0], truth, atol=1e-6, sign=-truth)


def test_the_trust_region_adapts():
    """The last update's path KL to the old policy moves the penalty."""
    found = learner(steps=5, batch=16, updates=2, rows=40, trust=1.0, trust_region=1e-9)
    found._critic_updates = lambda rollout, generator: iter(())
    found.critic.double()
    updates = each(found.updates(exactly(found, 16), torch.Generator().manual_seed(0)))
    next(updates)
    with torch.no_grad():
        found.model.parameters["th"] += 1.0
    list(updates)

    def doubled(trust):
        assert trust == 2.0

    accepts(doubled, found.state.trust, unmoved=1.0, halved=0.9)
    assert found.state.kl_to_old > 0.1


def test_a_black_box_will_do_and_a_deterministic_sampler_will_not():
    sa.VARD().build(setting(model(VP), differentiable=False))
    with pytest.raises(ValueError, match=r"sampler\.eta: .*set it above 0"):
        sa.VARD().build(setting(model(VP), eta=0.0))
