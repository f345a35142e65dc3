"""The shipped digits: they load, plain diffusers draws legible ones, and the judge is not fooled by blobs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from twins import accepts, close, f64

from scoreaction.diffusion.predictions import to_prediction
from scoreaction.tasks.digits import networks as digits

N = 40


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    from scoreaction.tasks.digits.pretrain import images_and_labels

    return images_and_labels()


@pytest.fixture(scope="module")
def judge() -> digits.Judge:
    return digits.judge()


@torch.no_grad()
def read(judge: digits.Judge, images: Tensor) -> Tensor:
    """What the judge reads: 0 to 9, or 10 for no digit."""
    return judge.log_prob(images).argmax(1)


@torch.no_grad()
def draw(unet: torch.nn.Module, prompts: Tensor, *, steps: int, guidance: float, eta: float = 0.0) -> Tensor:
    """Plain diffusers: DDIM with classifier-free guidance, images in [0, 1]."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_pretrained(digits.shipped(), subfolder="scheduler")
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(len(prompts), 1, 16, 16, generator=generator)
    labels = torch.cat([prompts, torch.full_like(prompts, digits.NO_CLASS)])
    for t in scheduler.timesteps:
        with_class, without = unet(torch.cat([x, x]), t, class_labels=labels).sample.chunk(2)
        guided = without + guidance * (with_class - without)
        x = scheduler.step(guided, t, x, eta=eta, generator=generator).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_plain_diffusers_draws_digits_that_the_judge_reads(judge: digits.Judge, eta: float) -> None:
    """Truth: the prompt. 20 steps, guidance 2."""
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(digits.shipped(), subfolder="unet")
    assert unet.dtype == torch.float32
    prompts = torch.arange(N) % 10
    images = draw(unet, prompts, steps=20, guidance=2.0, eta=eta)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))

    def check(pictures: Tensor) -> None:
        assert float((read(judge, pictures) == prompts).float().mean()) >= 0.95

    accepts(check, images, other_prompts=images.roll(1, 0), upside_down=images.flip(2), half_noise=(images + noise) / 2)


@pytest.mark.slow
def test_the_network_is_the_unet_on_our_clock() -> None:
    """Truth: diffusers' own table, timesteps and conversion of its prediction, at t = (i + 1)/1000."""
    from diffusers import DDIMScheduler

    net = digits.load_net()
    scheduler = DDIMScheduler.from_pretrained(digits.shipped(), subfolder="scheduler")
    index = torch.tensor([0, 99, 500, 999])
    t = (index + 1).double() / 1000
    alpha_bar = scheduler.alphas_cumprod[index]
    close(net.process.alpha(t) ** 2, alpha_bar, atol=1e-6, late=net.process.alpha(t - 1e-3) ** 2, root=net.process.alpha(t))
    assert net.process.reaches_data
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    cond = torch.tensor([1, 7, digits.NO_CLASS, 3])
    with torch.no_grad():
        truth = net.unet(x, index, class_labels=cond).sample
        y, late = net(x, t, cond), net(x, t.roll(1), cond)
        close(y, truth, atol=1e-5, late=late, unconditional=net(x, t, None))
        close(net(x, t, None)[2], truth[2], atol=1e-5, conditional=net(x, t, 0 * cond)[2])
    ours = to_prediction(net.process, net.predicts, x, t, y)
    scheduler.set_timesteps(1000)
    theirs = [scheduler.step(truth[i], index[i], x[i], eta=0.0).pred_original_sample for i in range(4)]
    as_eps = to_prediction(net.process, "eps", x, t, y)
    close(ours.x0, torch.stack(theirs).double(), atol=1e-4, eps=as_eps.x0, noise=ours.eps)


def test_the_network_takes_any_time_between() -> None:
    """The output moves steadily from one table entry to the next: no rounding of t. Twin: t rounded."""
    net = digits.load_net()
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(0.5, 0.502, 9).double()

    def check(times: Tensor) -> None:
        with torch.no_grad():
            y = net(x.expand(9, -1, -1, -1), times, torch.full((9,), 4)).flatten(1)
        steps = (y[1:] - y[:-1]).norm(dim=1)
        assert bool((steps > 0.3 * steps.mean()).all())

    accepts(check, grid, rounded=(grid * 1000).round() / 1000)


@pytest.mark.slow
def test_classifiers_read_the_half_they_never_saw(data: tuple[Tensor, Tensor], judge: digits.Judge) -> None:
    """Truth: the labels; and the halves are disjoint and cover the data."""
    from scoreaction.tasks.digits.pretrain import halves

    images, labels = data
    ours, theirs = halves()
    assert sorted(torch.cat([ours, theirs]).tolist()) == list(range(len(images)))
    reward = digits.reward_classifier()

    def check(pictures: Tensor) -> None:
        with torch.no_grad():
            seen = reward(pictures[theirs]).argmax(1)
        assert float((seen == labels[theirs]).float().mean()) >= 0.97
        assert float((read(judge, pictures[ours]) == labels[ours]).float().mean()) >= 0.97

    accepts(check, images, transposed=images.mT, inverted=1 - images, shifted=images.roll(5, 3))


def thicker(images: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        images = F.max_pool2d(images, 3, stride=1, padding=1)
    return images


def no_digits(images: Tensor) -> dict[str, Tensor]:
    """Pictures that nobody can read, made without what the judge was trained on."""
    generator = torch.Generator().manual_seed(5)
    axis = torch.arange(16) - 7.5
    radius = (axis[:, None] ** 2 + axis[None] ** 2).sqrt()
    disks = torch.stack([torch.sigmoid(4 * (r - radius))[None] for r in torch.linspace(4, 8, 20)])
    levels = torch.linspace(0, 1, 11).view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    board = ((torch.arange(16)[:, None] // 2 + torch.arange(16) // 2) % 2).float().expand(4, 1, 16, 16)
    return {
        "far too thick": thicker(images, 3),
        "far too thick and bright": thicker((2 * images).clamp(0, 1), 3),
        "worn away": 1 - thicker(1 - images, 2),
        "disks": disks,
        "even": levels,
        "checkerboard": board * torch.tensor([0.3, 0.5, 0.8, 1.0]).view(4, 1, 1, 1),
        "noise": torch.rand(50, 1, 16, 16, generator=generator),
        "inverted": 1 - images,
        "pixels out of order": images.flatten(1)[:, torch.randperm(256, generator=generator)].view_as(images),
    }


@pytest.mark.slow
def test_the_judge_calls_blobs_no_digit(data: tuple[Tensor, Tensor], judge: digits.Judge) -> None:
    """At least 90 % of each kind. Twins: digits as they are and with strokes a pixel thicker on each side."""
    from scoreaction.tasks.digits.pretrain import halves

    images = data[0][halves()[0][:200]]

    def check(kinds: dict[str, Tensor]) -> None:
        for kind, pictures in kinds.items():
            refused = float((read(judge, pictures) == digits.NO_CLASS).float().mean())
            assert refused >= 0.9, f"{kind}: only {refused:.2f} refused"

    accepts(check, no_digits(images), digits={"digits": images}, bold={"bold": thicker(images, 1)})


def test_legibility_falls_as_strokes_swell_but_not_at_once(data: tuple[Tensor, Tensor], judge: digits.Judge) -> None:
    """A pixel thicker on each side is still read, two and three are not. Twin: a judge of ten classes, as the reward has."""
    from scoreaction.tasks.digits.pretrain import halves

    mine = halves()[0][:200]
    images, labels = data[0][mine], data[1][mine]

    def check(reader: torch.nn.Module) -> None:
        with torch.no_grad():
            right = [float((reader(thicker(images, k)).argmax(1) == labels).float().mean()) for k in range(4)]
        assert right[0] > 0.95
        assert right[1] > 0.9
        assert right[2] < 0.5
        assert right[3] < 0.05

    accepts(check, judge, ten_classes=digits.reward_classifier())


def test_features_tell_digits_apart(data: tuple[Tensor, Tensor], judge: digits.Judge) -> None:
    """The nearest other image in feature space mostly shows the same digit, in a half the judge never saw."""
    from scoreaction.tasks.digits.pretrain import halves

    mine = halves()[0][:400]
    with torch.no_grad():
        features = judge.features(data[0][mine])
    assert features.shape == (400, 64)

    def check(labels: Tensor) -> None:
        apart = torch.cdist(features, features).fill_diagonal_(float("inf"))
        assert float((labels[apart.argmin(1)] == labels).float().mean()) > 0.95

    accepts(check, data[1][mine], shuffled=data[1][mine].roll(1))


def test_only_small_safetensors_are_shipped() -> None:
    """No pickle, at most 4 MB, and the credit that the data's licence asks for."""
    files = [path for path in digits.shipped().rglob("*") if path.is_file()]

    def small_and_safe(found: list[tuple[str, float]]) -> None:
        assert {suffix for suffix, _ in found} == {".safetensors", ".json", ".md"}
        assert sum(size for _, size in found) < 4e6

    found = [(path.suffix, float(path.stat().st_size)) for path in files]
    accepts(small_and_safe, found, pickle=[*found, (".pt", 1.0)], large=[*found, (".safetensors", 4e6)], no_readme=found[:1])
    credit = (digits.shipped() / "README.md").read_text(encoding="utf-8")
    for words in ("Alpaydin", "Kaynak", "UCI", "1998", "CC BY 4.0", "scikit-learn", "scoreaction.tasks.digits.pretrain"):
        assert words in credit


@pytest.mark.parametrize("digit", range(10))
def test_prompts_are_parsed(digit: int) -> None:
    name = digits.NAMES[digit]
    prompt = digits.PROMPTS[digit]
    texts = [prompt, f"a handwritten {digit}", name, str(digit), f" A  Handwritten {name.upper()} ", f"the digit {name}"[4:]]
    parsed = [digits.parse_digit_prompt(text) for text in texts]
    close(parsed, f64(digit), neighbour=[digits.parse_digit_prompt(digits.PROMPTS[(digit + 1) % 10])])


@pytest.mark.parametrize("text", ["", "a handwritten", "10", "ten", "a cat", "seventy", "a handwritten 7 8", "-1"])
def test_other_prompts_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="names no digit") as refusal:
        digits.parse_digit_prompt(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.slow
def test_rewards_and_networks_import_torch_only() -> None:
    """The heavy libraries wait until something is loaded. Twin: one of them."""
    heavy = "{'diffusers', 'sklearn', 'PIL', 'transformers'}"

    def check(modules: str) -> None:
        code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    names = ("ink", "jpeg", "classifier", "legibility", "linear", "quadratic")
    light = ", ".join(["scoreaction.tasks.digits.networks", *(f"scoreaction.rewards.{name}" for name in names)])
    accepts(check, light, heavy="PIL")


@pytest.mark.slow
def test_training_repeats_itself(tmp_path: Path) -> None:
    """The same seed gives the same weights, another seed does not, and what was written loads."""
    from scoreaction.tasks.digits.pretrain import main

    def weights(folder: str, seed: int) -> Tensor:
        main(tmp_path / folder, seed=seed, batches=1, classifier_batches=1)
        nets = [
            digits.load_net(tmp_path / folder),
            digits.judge(tmp_path / folder),
            digits.reward_classifier(tmp_path / folder),
        ]
        return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])

    close(weights("again", 0), weights("first", 0), atol=0.0, other_seed=weights("other", 1))
