"""The rewards that need no download, against computations of their own."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from twins import accepts, close, f64

from scoreaction.rewards import CountedReward, RewardError, classifier, ink, jpeg, legibility, linear, quadratic

IDS = torch.arange(6)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Six digits of the data, 0 to 5, (6, 1, 16, 16) in [0, 1]."""
    from scoreaction.tasks.digits.pretrain import images_and_labels

    return images_and_labels()[0][:6]


@pytest.fixture(scope="module")
def colour() -> torch.Tensor:
    return torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))


ON_IMAGES = {
    "ink": lambda: ink.build(ink.Config()),
    "ink, black box": lambda: ink.build(ink.Config(differentiable=False)),
    "jpeg": lambda: jpeg.build(jpeg.Config()),
    "classifier": lambda: classifier.build(classifier.Config()),
    "legibility": lambda: legibility.build(legibility.Config()),
    "legibility, correct": lambda: legibility.build(legibility.Config(correct=True)),
}


def test_ink_is_mean_brightness_per_unit(images: torch.Tensor) -> None:
    """Truth: numpy's mean."""
    truth = [float(np.mean(picture)) / 0.03 for picture in images.numpy()]
    got = ink.build(ink.Config())(images, None)
    close(got, truth, atol=1e-4, sum=got * 256, dark=1 / 0.03 - got)
    assert 5 < float(got.mean()) < 15


def jpeg_kilobytes(picture: np.ndarray, quality: int) -> float:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return len(file.getvalue()) / 1000


@pytest.mark.parametrize(("prefer", "sign"), [("small", -1), ("large", 1)])
def test_jpeg_is_the_size_of_the_file(images: torch.Tensor, colour: torch.Tensor, prefer: str, sign: int) -> None:
    """Truth: pillow called here, on grayscale and on colour."""
    reward = jpeg.build(jpeg.Config.model_validate({"prefer": prefer}))
    other = jpeg.build(jpeg.Config.model_validate({"prefer": "large" if prefer == "small" else "small"}))
    coarse = jpeg.build(jpeg.Config.model_validate({"prefer": prefer, "quality": 50}))
    gray = [sign * jpeg_kilobytes(np.round(picture[0] * 255).astype(np.uint8), 95) for picture in images.numpy()]
    close(reward(images, None), gray, sign=other(images, None), quality=coarse(images, None))
    pixels = [np.round(picture.transpose(1, 2, 0) * 255).astype(np.uint8) for picture in colour.numpy()]
    truth = [sign * jpeg_kilobytes(picture, 95) for picture in pixels]
    close(reward(colour, None), truth, bytes=1000 * reward(colour, None), channels=reward(colour.flip(1) / 2, None))


def test_classifier_is_the_log_probability_of_the_prompts_digit(images: torch.Tensor) -> None:
    """Truth: the softmax of the network's logits, by hand; and digits are read rightly."""
    reward = classifier.build(classifier.Config())
    with torch.no_grad():
        logits = reward.net(images).double().numpy()
    truth = [row[i] - np.log(np.exp(row).sum()) for i, row in enumerate(logits)]
    close(
        reward(images, IDS),
        truth,
        atol=1e-5,
        neighbour=reward(images, (IDS + 1) % 10),
        logits=[row[i] for i, row in enumerate(logits)],
    )
    assert float(reward(images, IDS).mean()) > -0.5


def test_classifier_gradient_by_finite_differences(images: torch.Tensor) -> None:
    """Truth: central differences in float64 along six random directions."""
    reward = classifier.build(classifier.Config())
    reward.net.double()
    x = (0.1 + 0.8 * images).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, IDS).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        slope = (reward(x + h * direction, IDS) - reward(x - h * direction, IDS)) / (2 * h)
    along = (gradient * direction).sum((1, 2, 3))
    close(along, slope, atol=1e-7, rtol=1e-5, sign=-along, rescaled=2 * along)


def test_legibility_is_the_judges_probability(images: torch.Tensor) -> None:
    """Truth: the judge's softmax over all eleven classes, and its largest class."""
    reward = legibility.build(legibility.Config())
    with torch.no_grad():
        logits = reward.net(images).double()
    truth = (logits.exp() / logits.exp().sum(1, keepdim=True))[range(6), range(6)]
    ten = logits[:, :10].softmax(1)[range(6), range(6)]
    close(reward(images, IDS), truth, atol=1e-5, without_the_eleventh=ten + 2e-5, neighbour=reward(images, IDS + 1))
    correct = legibility.build(legibility.Config(correct=True))
    close(correct(images, IDS), torch.ones(6), wrong_prompt=correct(images, IDS + 1))


@pytest.mark.parametrize("name", ["classifier", "legibility"])
def test_prompts_say_the_same_as_class_ids(images: torch.Tensor, name: str) -> None:
    reward = ON_IMAGES[name]()
    prompts = [f"a handwritten {i}" for i in range(6)]
    close(reward(images, prompts), reward(images, IDS), other=reward(images, prompts[::-1]))
    with pytest.raises(ValueError, match="'a cat' names no digit"):
        reward(images, ["a cat"] * 6)


@pytest.mark.parametrize("name", ON_IMAGES)
def test_a_reward_is_differentiable_just_where_it_says(images: torch.Tensor, name: str) -> None:
    """Truth: whether the result carries a graph to the image, and the gradient is not zero."""
    reward = ON_IMAGES[name]()
    x = images.clone().requires_grad_()
    value = reward(x, IDS)
    assert value.shape == (6,)
    assert value.dtype == x.dtype
    reaches = value.requires_grad and float(torch.autograd.grad(value.sum(), x)[0].abs().sum()) > 0

    def check(declared: bool) -> None:
        assert declared == reaches

    accepts(check, reward.differentiable, lie=not reward.differentiable)


@pytest.mark.parametrize("name", ON_IMAGES)
@pytest.mark.parametrize(
    "wrong",
    {
        "in [-1, 1]": lambda x: 2 * x - 1,
        "in [0, 255]": lambda x: 255 * x,
        "not a number": lambda x: x * float("nan"),
        "no channel": lambda x: x[:, 0],
        "two channels": lambda x: x.expand(-1, 2, -1, -1),
        "integers": lambda x: (255 * x).to(torch.uint8),
    }.items(),
    ids=lambda item: item[0],
)
def test_images_out_of_range_are_refused(images: torch.Tensor, name: str, wrong: tuple) -> None:  # type: ignore[type-arg]
    """Twin: the same image in [0, 1] passes, also with a rounding error."""
    reward = ON_IMAGES[name]()
    reward(images * (1 + 1e-6), IDS)
    with pytest.raises(ValueError, match=rf"reward {name.split(',', maxsplit=1)[0]}: "):
        reward(wrong[1](images), IDS)


@pytest.mark.parametrize("name", ["classifier", "legibility"])
@pytest.mark.parametrize(
    "conditions",
    [None, IDS.float(), IDS[:3], IDS + 5, IDS - 1, ["3"]],
    ids=["none", "float", "short", "10", "-1", "one prompt"],
)
def test_conditions_that_are_not_digits_are_refused(images: torch.Tensor, name: str, conditions: object) -> None:
    reward = ON_IMAGES[name]()
    reward(images, IDS)
    with pytest.raises(ValueError, match=rf"reward {name}: .*give prompts"):
        reward(images, conditions)


def test_linear_and_quadratic_against_loops() -> None:
    """Truth: numpy, one sample at a time; the coefficients are those that the exact optimum is computed from."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(2))
    l, mu, Q = np.array([0.3, -0.2]), np.array([0.5, -1.0]), np.array([[2.0, 0.4], [0.4, 1.0]])
    straight = linear.build(linear.Config(direction=[1.0, 0.5], scale=3.0))
    truth = [3 * (p[0] + 0.5 * p[1]) for p in x.double().numpy()]
    close(straight(x, None), truth, atol=1e-5, unscaled=straight(x, None) / 3, sign=-straight(x, None))
    bowl = quadratic.build(quadratic.Config(center=mu.tolist(), curvature=Q.tolist(), linear=l.tolist()))
    truth = [-0.5 * (p - mu) @ Q @ (p - mu) + l @ p for p in x.double().numpy()]
    round_bowl = quadratic.build(quadratic.Config(center=mu.tolist(), curvature=1.0, linear=l.tolist()))
    at_zero = quadratic.build(quadratic.Config(center=[0.0, 0.0], curvature=Q.tolist(), linear=l.tolist()))
    close(bowl(x, None), truth, atol=1e-5, curvature=round_bowl(x, None), center=at_zero(x, None))
    close(straight.quadratic.l, f64([3.0, 1.5]), unscaled=f64([1.0, 0.5]))
    close(bowl.quadratic.Q, f64(Q), half=f64(Q) / 2)
    assert straight.differentiable
    assert bowl.differentiable


def test_configurations_that_cannot_be_meant_are_refused() -> None:
    """Each with its neighbour that is fine."""
    for config in (ink.Config, jpeg.Config, classifier.Config, legibility.Config):
        config()
        with pytest.raises(ValidationError, match="extra"):
            config.model_validate({"prefers": "small"})
    with pytest.raises(ValidationError):
        jpeg.Config(quality=101)
    with pytest.raises(ValueError, match="unit"):
        ink.build(ink.Config(unit=0.0))
    with pytest.raises(ValueError, match="symmetric"):
        quadratic.build(quadratic.Config(center=[0.0, 0.0], curvature=[[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="curvature"):
        quadratic.build(quadratic.Config(center=[0.0, 0.0], curvature=[[1.0]]))
    with pytest.raises(ValueError, match=r"expected samples \(batch, 2\)"):
        linear.build(linear.Config(direction=[1.0, 0.5]))(torch.zeros(4, 3), None)


def test_a_reward_that_changes_its_samples_is_refused() -> None:
    """They are measured after it; the twin works on a copy."""

    def bytes_in_place(samples: torch.Tensor, conditions: object) -> torch.Tensor:
        return samples.mul_(255).sum(1)

    samples = torch.rand(4, 3)
    with pytest.raises(RewardError, match=r"reward: changes its samples in place.*samples.clone\(\)"):
        CountedReward(bytes_in_place)(samples, None)
    CountedReward(lambda samples, conditions: bytes_in_place(samples.clone(), conditions))(samples, None)
    with torch.inference_mode():  # in which a decoder may have made them, and nothing is counted
        decoded = torch.rand(4, 3)
    assert CountedReward(lambda samples, conditions: samples.sum(1))(decoded, None).shape == (4,)
