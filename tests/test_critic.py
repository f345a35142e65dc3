"""Truth: boundary conditions by definition, gradients of quadratics, memory by counting."""

import math

import pytest
import scipy.stats
import torch
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.networks.critic import Critic
from scoreaction.networks.layers import PromptEmbedding, RewardScale, unit_scaled
from scoreaction.networks.surrogate import Surrogate, zeroth_order

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 2, generator=GENERATOR)
T = torch.linspace(0.0, 1.0, 6, dtype=F64)
LOOK = torch.randn(6, generator=GENERATOR)
NONE = torch.zeros(6, dtype=torch.long)


def critic(skip, process=None, **options):
    torch.manual_seed(0)
    made = Critic(process or sa.VP(), (2,), skip=skip, **options)
    made.scale.calibrate(torch.tensor([1.0, 3.0, 8.0]))
    return awake(made)


def awake(made):
    """With an output layer as after training: it begins at 0."""
    assert float(made.net.last.weight.detach().abs().max()) == 0
    torch.nn.init.normal_(made.net.last.weight, std=0.1)
    return made


@pytest.mark.parametrize("process", [sa.VP(), sa.Flow(), sa.CosineVP()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("skip", ["alpha", "cosine"])
def test_the_value_of_data_is_its_reward(process, skip):
    """V(0, x) = r(x) whatever the network says; at every other time the network has its say."""
    value = critic(skip, process)
    start = torch.zeros(6, dtype=F64)
    without = critic("none", process)(X, start, NONE, LOOK)
    close(
        value(X, start, NONE, LOOK).detach(),
        LOOK,
        atol=1e-6,
        none=without.detach(),
        no_skip=value(X, start, NONE).detach(),
    )
    inner = torch.full((6,), 0.5, dtype=F64)
    assert float((value(X, inner, NONE, LOOK) - LOOK).detach().abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("skip", "truth"),
    [
        ("alpha", lambda t: (sa.VP().alpha(t) ** 2, sa.VP().sigma(t))),
        ("cosine", lambda t: (torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2))),
        ("none", lambda t: (torch.zeros_like(t), torch.ones_like(t))),
    ],
)
def test_skip_coefficients(skip, truth):
    made = critic(skip)
    c_skip, c_out = made.coefficients(T)
    for found, expected, other in zip((c_skip, c_out), truth(T), truth(T)[::-1], strict=True):
        close(found, expected, atol=1e-12, swapped=other)
    mean, spread = 4.0, math.sqrt(26 / 3)
    learned = made.net(X, T, None).squeeze(1)
    whole = mean + c_skip * (LOOK - mean) + c_out * spread * learned
    wrong = {"reward_not_centred": whole + c_skip * mean, "spread_forgotten": whole + c_out * learned * (1 - spread)}
    if skip == "none":
        wrong.pop("reward_not_centred")
    close(made(X, T, NONE, LOOK).detach(), whole.detach(), atol=1e-5, **{k: v.detach() for k, v in wrong.items()})


@pytest.mark.parametrize("process", [sa.VP(), sa.Flow(), sa.VE(sigma_max=10.0)], ids=lambda p: type(p).__name__)
def test_a_value_of_signal_has_the_slope_of_the_exact_one(process):
    """Standard normal data, `r = sum x0`: `V = alpha sum x/(alpha^2 + sigma^2)`, of an F that sums its scaled input."""

    class Sum(torch.nn.Module):
        def forward(self, x, t, condition):
            return unit_scaled(process, x, t).sum(1)

    values = {skip: Critic(process, (2,), skip=skip, network=lambda width: Sum()) for skip in ("signal", "none")}
    found, as_it_is = (made.gradient(X, T, NONE) for made in values.values())
    share = process.alpha(T) / (process.alpha(T) ** 2 + process.sigma2(T))
    close(found, share[:, None].expand(6, 2).float(), atol=1e-6, as_it_is=as_it_is)


def test_an_unknown_skip_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.skip.*choose from"):
        critic("linear").coefficients(T)
    with pytest.raises(ValueError, match="no critic for samples of shape"):
        Critic(sa.VP(), (1, 2, 3, 4, 5), skip="alpha")


def test_the_gradient_of_the_learned_part_is_autograds():
    """`grad_x c_out d F`, also where no graph is built: the gradient of the look-ahead is not in it."""
    made = critic("alpha")
    leaf = X.clone().requires_grad_()
    learned = made.coefficients(T)[1].float() * made.scale.spread * made.net(leaf, T, None).squeeze(1)
    (truth,) = torch.autograd.grad(learned.sum(), leaf)
    with torch.no_grad():
        grad = made.gradient(X, T, NONE)
    close(grad, truth, sign=-truth, without_spread=truth / made.scale.spread, flat=0 * truth)
    assert grad.requires_grad is False


def test_image_critics_and_prompts():
    ids, prompt = torch.tensor([7, 0, 4, 2]), torch.tensor([0, 3, 2, 1, 1, 0])
    made = awake(Critic(sa.VP(), (1, 8, 8), skip="alpha", conditions=ids))
    made.scale.calibrate(LOOK)
    images = torch.randn(6, 1, 8, 8, generator=GENERATOR)
    value = made(images, T, prompt, LOOK)
    assert value.shape == (6,)
    other = made(images, T, (prompt + 1) % 4, LOOK)
    assert float((value - other).detach()[1:].abs().min()) > 1e-6  # the prompt matters
    assert float((value - other).detach()[0].abs()) == 0  # but not at t = 0
    alone = torch.cat([made(images[i : i + 1], T[i : i + 1], prompt[i : i + 1], LOOK[i : i + 1]) for i in range(6)])
    close(value.detach(), alone.detach(), atol=1e-5, other_prompt=other.detach())


@pytest.mark.parametrize(
    "conditions",
    [
        torch.tensor([0, 3, 1]),
        torch.tensor([[0, 3], [3, 0], [0, 0]]),
        torch.tensor([0.1, 0.5, 0.3]),
        torch.randn(3, 5),
        torch.randn(3, 7, 5),
        {"a": torch.tensor([1, 0, 2]), "b": torch.randn(3, 4)},
    ],
)
def test_conditions_of_every_form_become_one_vector(conditions):
    """A prompt is its condition: a row for each number of a prompt, the same however often and in which order it comes."""
    embed, numbers = PromptEmbedding(conditions), torch.tensor([2, 0, 2, 1])
    vectors = embed(torch.arange(3)).detach()
    assert vectors.shape == (3, embed.width) == (3, 16)
    close(embed(numbers).detach(), vectors[numbers], atol=1e-6, by_place=vectors[[0, 1, 2, 0]])
    assert float(torch.cdist(vectors, vectors)[~torch.eye(3, dtype=torch.bool)].min()) > 1e-3


def test_prompts_with_one_condition_are_one_and_without_conditions_there_is_no_vector():
    embed = PromptEmbedding(torch.tensor([4, 2, 4]))
    vectors = embed(torch.arange(3)).detach()
    close(vectors[2], vectors[0], atol=0, other=vectors[1])
    assert PromptEmbedding(None)(torch.arange(3)) is None
    assert PromptEmbedding(None).width == 0


def test_the_prompts_are_no_weights_of_the_embedding():
    """They follow from the run's prompts: a checkpoint holds what was learned and no text's states."""
    embed, other = PromptEmbedding({"a": torch.randn(3, 7, 5)}), PromptEmbedding({"a": torch.randn(3, 7, 5)})

    def small(names):
        assert sorted(names) == ["parts.0.bias", "parts.0.weight"]

    accepts(small, list(embed.state_dict()), with_buffers=[*embed.state_dict(), *dict(embed.named_buffers())])
    other.load_state_dict(embed.state_dict())
    close(
        other.parts[0].weight.detach(),
        embed.parts[0].weight.detach(),
        untouched=PromptEmbedding(torch.zeros(1, 5)).parts[0].weight.detach(),
    )


@pytest.mark.parametrize("width", [(5,), (7, 5)])
def test_features_that_hardly_differ_are_told_apart(width):
    """As by z-scores of the prompts' features (scipy), whatever they have in common and whatever their units."""
    different = torch.randn(6, *width, generator=GENERATOR)
    embed = PromptEmbedding(100 + 1e-2 * different)
    averaged = different.flatten(1, -2).mean(1) if len(width) > 1 else different
    scores = torch.from_numpy(scipy.stats.zscore(averaged.double().numpy(), axis=0)).float()
    (linear,) = embed.parts
    close(embed(torch.arange(6)).detach(), linear(scores).detach(), atol=0.02, raw=linear(100 + averaged).detach())
    repeated = embed(torch.tensor([3, 3, 1])).detach()  # standardised over the prompts, not over who is asked for
    close(repeated, linear(scores[[3, 3, 1]]).detach(), atol=0.02, others=linear(scores[:3]).detach())


def test_a_feature_that_all_prompts_share_says_nothing():
    sizes = torch.tensor([[512.0, 512.0, 0.0]]).expand(4, 3)
    embed = PromptEmbedding(sizes)
    (linear,) = embed.parts
    close(embed(torch.arange(4)).detach(), linear.bias.expand(4, 16).detach(), atol=1e-6, raw=sizes.repeat(1, 6)[:, :16])


def test_reward_scale_is_that_of_the_first_rewards_that_differ():
    scale = RewardScale()
    scale.calibrate(torch.full((5,), 7.0))
    close([float(scale.mean), float(scale.spread)], [7.0, 1.0], rounding=[7.0, 7e-6], unset=[0.0, 1.0])
    scale.calibrate(torch.tensor([1.0, 3.0]))
    truth = [2.0, 1.0]
    close([float(scale.mean), float(scale.spread)], truth, unbiased_std=[2.0, 2**0.5], first=[7.0, 1.0])
    scale.calibrate(torch.tensor([100.0, 300.0]))
    close([float(scale.mean), float(scale.spread)], truth, follows=[200.0, 100.0])


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
    x = torch.randn(4, 3, dtype=F64, generator=GENERATOR, requires_grad=True)
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
