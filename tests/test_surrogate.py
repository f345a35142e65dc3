"""What stands in for a black-box reward's gradient. Truth: scikit-learn, quadratics, memory by counting."""

import math

import pytest
import torch
from test_critic import awake
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.networks.surrogate import Surrogate, zeroth_order


def quadratic(d):
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(d, d, generator=generator, dtype=F64)
    return Quadratic(
        half + half.T, torch.randn(d, generator=generator, dtype=F64), torch.randn(d, generator=generator, dtype=F64)
    )


def test_zeroth_order_gradient_is_unbiased_on_a_quadratic():
    """A central difference of a quadratic is its exact slope along u, and E[u u^T] = 1: the mean is the gradient itself."""
    reward, n = quadratic(3), 60_000
    point = f64([0.4, -1.0, 0.3])
    truth = reward.l - reward.Q @ (point - reward.mu)
    queries = []

    def score(x0):
        queries.append(len(x0))
        assert not (torch.is_grad_enabled() and x0.requires_grad)
        return reward(x0)

    def estimate(score):
        x0 = point.expand(n, 3).clone().requires_grad_(True)
        value = zeroth_order(score, x0, 0.3, torch.Generator().manual_seed(0))
        (grad,) = torch.autograd.grad(value.sum(), x0)
        return value.detach(), grad

    value, grad = estimate(score)
    assert sum(queries) == 3 * n
    close(value, float(reward(point[None])), atol=1e-9, smoothed=float(reward(point[None])) - 0.045 * float(reward.Q.trace()))
    error = grad.std(0) / math.sqrt(n)
    close(((grad.mean(0) - truth) / error).abs() <= 3, 1.0, sign=((-grad.mean(0) - truth) / error).abs() <= 3)
    one_sided = estimate(lambda x0: reward(x0) + 5 * (x0[:, 0] - point[0]) ** 3)[1].mean(0)  # a cubic it only smooths
    close(one_sided[0] - grad.mean(0)[0], 5 * 3 * 0.3**2, atol=0.3, central_at_zero_width=0.0)


def test_zeroth_order_passes_the_gradient_on():
    """Through x0 = 3 x the chain rule applies; and the estimate is along one direction for each sample."""
    reward = quadratic(3)
    x = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = f64([1.0, 2.0, 0.0, -1.0])
    value = zeroth_order(reward, 3 * x, 0.1, torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((weights * value).sum(), x)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    slope = ((reward.l - (3 * x.detach() - reward.mu) @ reward.Q) * noise).sum(1)
    truth = 3 * weights[:, None] * slope[:, None] * noise
    close(grad, truth, atol=1e-6, without_chain_rule=grad / 3, unweighted=grad / weights.clamp(min=0.5)[:, None])


def surrogate(memory=8, **options):
    torch.manual_seed(0)
    return awake(Surrogate(sa.VP(), (2,), memory=memory, **options))


def numbered(first, n):
    """Samples that carry their own number."""
    numbers = torch.arange(first, first + n).float()
    return numbers[:, None].expand(n, 2), torch.arange(first, first + n), numbers


def test_the_surrogates_memory_keeps_the_newest():
    made = surrogate()
    made.samples, made.prompts, made.rewards = made.samples[:8], made.prompts[:8], made.rewards[:8]  # the least it takes is 256

    def newest(truth):
        def check(value):
            assert sorted(value.tolist()) == truth

        return check

    made.remember(*numbered(0, 5))
    accepts(newest([0, 0, 0, 0, 1, 2, 3, 4]), made.rewards, nothing=torch.zeros(8))
    made.remember(*numbered(5, 5))
    accepts(newest(list(range(2, 10))), made.rewards, no_wrap=torch.arange(8.0))
    made.remember(*numbered(10, 11))  # more than fits
    accepts(newest(list(range(13, 21))), made.rewards, oldest_of_batch=torch.arange(10.0, 18.0))
    assert int(made.seen) == 21
    assert torch.equal(made.samples[:, 0], made.rewards)
    assert torch.equal(made.prompts, made.rewards.long())


def test_the_surrogates_memory_travels_with_its_state():
    first, second = surrogate(), surrogate()
    first.remember(*numbered(0, 5))
    second.load_state_dict(first.state_dict())
    fresh = surrogate()
    fresh.remember(*numbered(50, 5))
    again = [s.loss(s.draw(64, torch.Generator().manual_seed(0))).detach() for s in (first, second, fresh)]
    close(again[1], again[0], atol=0, other_memory=again[2])
    first.remember(*numbered(5, 3))
    second.remember(*numbered(5, 3))
    assert torch.equal(first.samples, second.samples)
    assert surrogate(4096).samples.shape == (4096, 2)
    assert Surrogate(sa.VP(), (4, 64, 64)).samples.shape[0] == 1024  # 64 MiB


def test_the_surrogates_loss_is_of_the_remembered_rows():
    """`(prediction - reward)^2` over the variance of the rewards, each sample with its prompt and reward, none unseen."""
    made = surrogate(conditions=torch.tensor([0, 1, 2, 3, 4]))
    made.remember(*numbered(0, 5))
    slots = torch.tensor([3, 0, 3])
    samples, prompts, rewards = (part[slots] for part in numbered(0, 5))
    truth = (made(samples, prompts) - rewards).square() / rewards.new_tensor([0.0, 1, 2, 3, 4]).var(correction=0)
    other = (made(samples, prompts.flip(0) * 0) - rewards).square() / 2
    close(
        made.loss(slots).detach(), truth.detach(), rtol=1e-5, in_units_of_reward=2 * truth.detach(), one_prompt=other.detach()
    )
    drawn = made.draw(2000, torch.Generator().manual_seed(0))

    def remembered(slots):
        assert set(slots.tolist()) == {0, 1, 2, 3, 4}

    accepts(remembered, drawn, empty_slots_too=drawn + 1, few=drawn % 4)
    full = surrogate()
    full.remember(*numbered(0, 700))
    assert set(full.draw(20_000, torch.Generator().manual_seed(0)).tolist()) == set(range(256))  # the least it remembers


def test_the_surrogate_begins_as_ridge_regression():
    """scikit-learn's Ridge at the penalty that its own leave-one-out chooses; no slope where the rewards are noise."""
    from sklearn.linear_model import Ridge, RidgeCV

    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(40, 2, generator=generator)
    rewards = 5 + 3 * x0[:, 0] - x0[:, 1] + torch.randn(40, generator=generator)
    made = Surrogate(sa.VP(), (2,), memory=64)
    made.remember(x0, torch.zeros(40).long(), rewards)
    made.fit_line()
    centred = (x0 - x0.mean(0)).double().numpy()
    penalties = [share * float((centred**2).sum()) / 40 for share in (1e-3, 1e-2, 1e-1, 1.0)]
    theirs = RidgeCV(penalties).fit(x0.double().numpy(), rewards.double().numpy())
    new = torch.randn(20, 2, generator=generator)
    fitted = made(new, torch.zeros(20).long()).detach()
    close(
        fitted.double(),
        torch.from_numpy(theirs.predict(new.double().numpy())),
        atol=1e-4,
        stiff=torch.from_numpy(Ridge(50.0).fit(x0.double().numpy(), rewards.double().numpy()).predict(new.double().numpy())),
        sign=2 * rewards.mean() - fitted,
    )
    noise = Surrogate(sa.VP(), (30,), memory=64)
    noise.remember(torch.randn(40, 30, generator=generator), torch.zeros(40).long(), torch.randn(40, generator=generator))
    noise.fit_line()
    assert float(noise.slope.abs().max()) == 0
    assert float(made.slope.abs().max()) > 0


def test_what_a_surrogate_has_foreseen_is_the_variance_that_it_explains_in_samples_that_it_has_not_seen():
    """scikit-learn's explained variance, within prompts, over more samples than one call takes; nothing of equal rewards."""
    from sklearn.metrics import explained_variance_score

    generator = torch.Generator().manual_seed(0)
    x0, prompt = torch.randn(150, 2, generator=generator), torch.arange(150) % 2
    rewards = 5 + 3 * x0[:, 0] - x0[:, 1] + 4 * prompt + torch.randn(150, generator=generator)
    made = Surrogate(sa.VP(), (2,), memory=64)
    made.remember(x0[:20], prompt[:20], rewards[:20])
    made.fit_line()
    values = made(x0[20:], prompt[20:]).detach()

    def within(values, prompt):
        return torch.cat([values[prompt == number] - values[prompt == number].mean() for number in (0, 1)])

    def explained(rewards, values, prompt):
        return explained_variance_score(within(rewards, prompt), within(values, prompt))

    truth = explained(rewards[20:], values, prompt[20:])
    one_call = explained(rewards[20:84], values[:64], prompt[20:84])
    close(
        made.foreseen(x0[20:], prompt[20:], rewards[20:]),
        truth,
        atol=1e-5,
        over_prompts=explained_variance_score(rewards[20:], values),
        one_call=one_call,
    )
    assert made.foreseen(x0[20:], prompt[20:], 0.1 + 4.0 * prompt[20:]) is None


@pytest.mark.slow
def test_the_surrogate_learns_the_reward_of_each_prompt():
    """Two prompts with opposite linear rewards: value and gradient, on samples it has not seen."""
    made = surrogate(2048, conditions=torch.tensor([0, 1]))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2048, 2, generator=generator)
    prompts = torch.randint(2, (2048,), generator=generator)
    sign = 1.0 - 2.0 * prompts
    made.remember(x0, prompts, 3 + 10 * sign * x0[:, 0])
    optimiser = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        made.loss(made.draw(256, generator)).mean().backward()
        optimiser.step()
    probe = torch.randn(200, 2, generator=generator).clamp(-1.5, 1.5).requires_grad_(True)
    for prompt in (0, 1):
        value = made(probe, torch.full((200,), prompt))
        (grad,) = torch.autograd.grad(value.sum(), probe)
        truth = (3 + 10 * (1 - 2 * prompt) * probe[:, 0]).detach()
        error = float((value.detach() - truth).square().mean().sqrt()) / float(truth.std())
        close(
            error,
            0.0,
            atol=0.1,
            prompts_mixed_up=float((value.detach() - 6 + truth).square().mean().sqrt()) / float(truth.std()),
        )
        close(grad.mean(0) / 10, [1 - 2 * prompt, 0.0], atol=0.1, sign=[2 * prompt - 1, 0.0])
