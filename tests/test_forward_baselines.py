"""What forward-process trainers compare a reward with. Truth: advantages by hand, and a covariance of Gaussian data."""

from dataclasses import replace

import pytest
import torch
from driving import run
from test_forward import REWARD, VP, Rule, at_rest
from twins import F64, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._forward import advantages
from scoreaction.algorithms._setting import Objective, Setting


def test_advantages_by_hand():
    rewards, prompt = f64([1.0, 3.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    find = lambda baseline, spread=2.0: advantages(baseline, {}, rewards, prompt, spread=spread)  # noqa: E731
    close(find("group"), [-0.5, 0.5, -1.0, 1.0], atol=1e-12, batch=find("batch"))
    close(find("batch"), [-3.0, -2.0, 1.5, 3.5], atol=1e-12, group=find("group"))
    close(find("group", None), [-1.0, 1.0, -1.0, 1.0], atol=1e-12, one_spread=find("group"))
    history = {"0": [5.0, 7.0] * 10, "1": [0.0] * 20}
    found = advantages("prompt", history, rewards, prompt, spread=2.0)
    truth = [(1 - 124 / 22) / 2, (3 - 124 / 22) / 2, (10 - 24 / 22) / 2, (14 - 24 / 22) / 2]
    close(found, truth, atol=1e-12, batch=find("batch"))


@pytest.mark.parametrize("size", [2, 4])
def test_rams_beta_is_worth_the_same_in_groups_of_any_size(size):
    """Truth: r = x0 of N(0, 1), where `E[A (noised - v) | x_t]` at the exact v is `-sigma (sigma + alpha)`.

    Twin: a mean with the own reward in it, which leaves `1 - 1/B` of it.
    """
    learner, _, generator = at_rest(sa.RAM(beta=1.0, baseline="group"), "ram", (0.0, 1.0), batch=8)
    groups = 40_000 // size
    x0, eps = torch.randn(2, groups * size, generator=generator, dtype=F64)
    prompt, t = torch.arange(groups).repeat_interleave(size), f64(0.3)
    alpha, sigma = VP.alpha(t), VP.sigma(t)
    v = (sigma - alpha) * (alpha * x0 + sigma * eps)  # E[eps - x0 | x_t]

    def pulled(advantage):
        return float((advantage * (eps - x0 - v)).mean())

    truth = -float(sigma**2 + alpha * sigma)  # Cov(x0, eps - x0 | x_t)
    found = learner.advantages(x0, prompt)
    close(pulled(found), truth, atol=0.03, with_own=pulled(found * (1 - 1 / size)))
    learner.config = learner.config.model_copy(update={"standardise": True})
    rewards = f64([1.0, 3.0, 10.0, 14.0])
    close(learner.advantages(rewards, torch.tensor([0, 0, 1, 1])), [-1.0, 1.0, -1.0, 1.0], atol=1e-12, of_others=[-2, 2, -2, 2])


@pytest.mark.parametrize("algorithm", [sa.RAM, sa.NFT, sa.AWM])
def test_a_baseline_that_is_not_there_is_refused(algorithm):
    """Siblings, whose branches these have not; a group of one, which would teach nothing."""
    made = sa.Model(Rule("ram", (0.0, 1.0)), process=VP, predicts="v", shape=(1,))
    there = Setting(made, sa.Sampler(steps=8), Objective(lambda x0, prompt: REWARD(x0), False), 16, None, group=4)
    algorithm(baseline="group").build(there)
    with pytest.raises(ValueError, match=r"train\.samples_per_prompt: .*set it to 2 or more, or algorithm\.baseline to prompt"):
        algorithm(baseline="group").build(there._replace(group=1))
    with pytest.raises(ValueError, match=r"baseline: must be 'batch', 'prompt' or 'group' \(got 'branch'\)"):
        algorithm(baseline="branch")


@pytest.mark.parametrize("algorithm", [sa.NFT(), sa.AWM()])
def test_equal_rewards_teach_nothing(algorithm):
    learner, rollout, generator = at_rest(algorithm, "ram", batch=20)
    same(
        run(learner.updates(replace(rollout, rewards=torch.ones(20)), generator)),
        [],
        learns=run(learner.updates(rollout, generator)),
    )


def test_equal_rewards_leave_ram_its_anchor():
    """Truth: the pretrained model is at rest, and any other policy is drawn to it by its distance in velocity."""
    learner, rollout, generator = at_rest(sa.RAM(minibatches=1), "ram", batch=20)
    ((_, loss, _),) = run(learner.updates(replace(rollout, rewards=torch.ones(20, dtype=F64)), generator))
    assert float(loss.detach()) > 0.01
    learner.model.net.base.fill_(1.0)
    ((_, loss, _),) = run(learner.updates(replace(rollout, rewards=torch.ones(20, dtype=F64)), generator))
    close(loss.detach(), 0.0, atol=1e-12, by_rewards=1e-3)
