"""Truth: boundary conditions by definition, gradients of quadratics, memory by counting."""

import math

import pytest
import scipy.stats
import torch
from twins import F64, accepts, close

import scoreaction as sa
from scoreaction.networks.critic import Critic
from scoreaction.networks.layers import PromptEmbedding, RewardScale, unit_scaled

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
