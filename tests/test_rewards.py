"""The rewards that need no download, against computations of their own."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from twins import accepts, close, f64

from scoreaction.errors import UserError
from scoreaction.rewards import CountedReward, RewardError, classifier, ink, jpeg, legibility, linear, quadratic
from scoreaction.tasks.digits.networks import judge, reward_classifier

IDS = range(6)
PROMPTS = [f"a handwritten {i}" for i in IDS]
NEXT = [f"a handwritten {i + 1}" for i in IDS]


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
        logits = reward_classifier()(images).double().numpy()
    truth = [row[i] - np.log(np.exp(row).sum()) for i, row in enumerate(logits)]
    close(
        reward(images, PROMPTS),
        truth,
        atol=1e-5,
        neighbour=reward(images, NEXT),
        logits=[row[i] for i, row in enumerate(logits)],
    )
    assert float(reward(images, PROMPTS).mean()) > -0.5


def test_classifier_gradient_by_finite_differences(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: central differences in float64 along six random directions."""
    monkeypatch.setattr(classifier, "reward_classifier", lambda: reward_classifier().double())
    reward = classifier.build(classifier.Config())
    x = (0.1 + 0.8 * images).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        slope = (reward(x + h * direction, PROMPTS) - reward(x - h * direction, PROMPTS)) / (2 * h)
    along = (gradient * direction).sum((1, 2, 3))
    close(along, slope, atol=1e-7, rtol=1e-5, sign=-along, rescaled=2 * along)


def test_legibility_is_the_judges_probability(images: torch.Tensor) -> None:
    """Truth: the judge's softmax over all eleven classes, and its largest class."""
    reward = legibility.build(legibility.Config())
    with torch.no_grad():
        logits = judge()(images).double()
    truth = (logits.exp() / logits.exp().sum(1, keepdim=True))[range(6), range(6)]
    ten = logits[:, :10].softmax(1)[range(6), range(6)]
    close(reward(images, PROMPTS), truth, atol=1e-5, without_the_eleventh=ten + 2e-5, neighbour=reward(images, NEXT))
    correct = legibility.build(legibility.Config(correct=True))
    close(correct(images, PROMPTS), torch.ones(6), wrong_prompt=correct(images, NEXT))


@pytest.mark.parametrize("name", ON_IMAGES)
def test_a_reward_is_differentiable_just_where_it_says(images: torch.Tensor, name: str) -> None:
    """Truth: whether the result carries a graph to the image, and the gradient is not zero."""
    reward = ON_IMAGES[name]()
    x = images.clone().requires_grad_()
    value = reward(x, PROMPTS)
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
    reward(images * (1 + 1e-6), PROMPTS)
    with pytest.raises(ValueError, match=rf"reward {name.split(',', maxsplit=1)[0]}: "):
        reward(wrong[1](images), PROMPTS)


@pytest.mark.parametrize("name", ["classifier", "legibility"])
@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        (None, "needs a prompt for each of the 6 samples, got NoneType; give prompts"),
        (torch.arange(6), "needs a prompt for each of the 6 samples, got Tensor; give prompts"),
        (["3"], "needs a prompt for each of the 6 samples, got 1; give prompts"),
        (["a cat"] * 6, "'a cat' names no digit"),
        (["10"] * 6, "'10' names no digit"),
    ],
    ids=["none", "class ids", "one prompt", "a cat", "10"],
)
def test_prompts_that_name_no_digit_are_refused(images: torch.Tensor, name: str, prompts: object, why: str) -> None:
    """Twin: a prompt that names one, in letters or as a figure."""
    reward = ON_IMAGES[name]()
    close(reward(images, PROMPTS), reward(images, [str(i) for i in IDS]), other=reward(images, PROMPTS[::-1]))
    with pytest.raises(ValueError, match=re.escape(why)):
        reward(images, prompts)


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
    with pytest.raises(UserError, match="^Config.quality: must be less than or equal to 95"):
        jpeg.Config(quality=101)
    with pytest.raises(ValueError, match="^unit: must not be 0"):
        ink.build(ink.Config(unit=0.0))
    quadratic.Config(center=[0.0, 0.0], curvature=[[1.0, 0.5], [0.5, 1.0]], linear=[1.0, 2.0])
    for wrong, key in ({"curvature": [[1.0, 0.5], [0.0, 1.0]]}, "symmetric"), ({"curvature": [[1.0]]}, "2 x 2"):
        with pytest.raises(UserError, match=f"curvature: .*{key}"):
            quadratic.Config(center=[0.0, 0.0], **wrong)
    with pytest.raises(UserError, match="linear: must have 2 numbers"):
        quadratic.Config(center=[0.0, 0.0], linear=[1.0])


@pytest.mark.parametrize(
    ("reward", "key"),
    [
        (linear.build(linear.Config(direction=[1.0, 0.5])), "direction"),
        (quadratic.build(quadratic.Config(center=[1.0, 0.5])), "center"),
    ],
    ids=["linear", "quadratic"],
)
def test_a_dimension_that_does_not_fit_is_named_by_its_setting(reward: object, key: str) -> None:
    """Twin: samples of as many dimensions."""
    assert reward(torch.zeros(4, 2), None).shape == (4,)
    with pytest.raises(ValueError, match=rf"^{key}: must have 3 numbers, one for each dimension \(got 2\)"):
        reward(torch.zeros(4, 3), None)
    with pytest.raises(ValueError, match=r"scores vectors \(batch, 2\), got samples \(4, 1, 2, 1\)"):
        reward(torch.zeros(4, 1, 2, 1), None)


def test_images_reach_every_reward_in_one_range() -> None:
    """[0, 1], also a reward that checks nothing itself. Twins: vectors have no range, and images in it are scored."""
    dark = torch.zeros(2, 3, 4, 4)

    def mean(samples: torch.Tensor, prompts: object) -> torch.Tensor:
        return samples.flatten(1).mean(1)

    for wrong in (dark - 1, dark + 255, dark + float("nan")):
        with pytest.raises(RewardError, match=r"reward: images must have values in \[0, 1\].*decode="):
            CountedReward(mean)(wrong, None)
    assert CountedReward(mean)(dark + 1, None).tolist() == [1.0, 1.0]
    assert CountedReward(mean)(torch.full((2, 3), -5.0), None).tolist() == [-5.0, -5.0]


def test_a_probe_is_not_counted_and_takes_any_numbers() -> None:
    """Twins: a question is counted, and its numbers must be finite; a probe refuses what is not one number a sample."""

    def half(samples: torch.Tensor, prompts: object) -> torch.Tensor:
        return samples.sum(1) / 0

    counted = CountedReward(half)
    counted.probe(torch.zeros(4, 3), None)
    assert counted.queries == 0
    with pytest.raises(RewardError, match="4 of 4 values are NaN"):
        counted(torch.zeros(4, 3), None)
    assert counted.queries == 4
    for wrong in (lambda x, p: x, lambda x, p: x.sum(), lambda x, p: None, lambda x, p: x[:, 7], lambda x: x.sum(1)):
        with pytest.raises(RewardError):
            CountedReward(wrong).probe(torch.zeros(4, 3), None)


def test_a_reward_that_changes_its_samples_is_refused() -> None:
    """They are measured after it; the twin works on a copy."""

    def bytes_in_place(samples: torch.Tensor, prompts: object) -> torch.Tensor:
        return samples.mul_(255).sum(1)

    samples = torch.rand(4, 3)
    with pytest.raises(RewardError, match=r"reward: changes its samples in place.*samples.clone\(\)"):
        CountedReward(bytes_in_place)(samples, None)
    CountedReward(lambda samples, prompts: bytes_in_place(samples.clone(), prompts))(samples, None)
    with torch.inference_mode():  # in which a decoder may have made them, and nothing is counted
        decoded = torch.rand(4, 3)
    assert CountedReward(lambda samples, prompts: samples.sum(1))(decoded, None).shape == (4,)
