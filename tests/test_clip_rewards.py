"""aesthetic, clip and pickscore on a small random CLIP of the real classes, against transformers' own way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from captioned import PROMPTS, pictures, pil
from safetensors.torch import save_file
from tiny_clip import SIZE, save_tiny_clip
from torch import nn
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from twins import accepts, close

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.errors import UserError
from scoreaction.recipes.build import build as build_run
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import _clip, aesthetic, clip, pickscore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LAION's form: five linear layers with dropout between them, named as in its file."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    sizes, numbers = [8, 6, 5, 4, 3, 1], [0, 2, 4, 6, 7]
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for number, before, after in zip(numbers, sizes, sizes[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(after, before, generator=generator)
        tensors[f"layers.{number}.bias"] = torch.randn(after, generator=generator)
    save_file(tensors, path)
    return path


def theirs(picture: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """The library's own processor, which works on 8-bit pictures."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return torch.as_tensor(np.asarray(processor(pil(picture), return_tensors="np")["pixel_values"][0]))


@pytest.mark.parametrize("size", [(64, 64), (97, 61), (50, 120), (32, 32), (20, 24), (17, 40)], ids=str)
def test_the_preprocessing_is_the_processors(size: tuple[int, int]) -> None:
    """Truth: transformers' CLIPImageProcessor on pillow, which rounds to 8 bits twice: 1.01 steps of 1/255 at most."""
    (picture,) = pictures(size)
    x = picture[None]
    height, width = size
    scale = SIZE / min(size)
    plain = nn.functional.interpolate(x, scale_factor=scale, mode="bicubic").clamp(0, 1)
    top, left = max(0, (plain.shape[-2] - SIZE) // 2), max(0, (plain.shape[-1] - SIZE) // 2)
    no_antialias = _clip.normalised(plain[..., top : top + SIZE, left : left + SIZE])
    squeezed = _clip.normalised(_clip.resized(x, SIZE, SIZE))
    ours, step = _clip.cropped(x, SIZE)[0], 1 / 255 / min(_clip.STD)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_clip.MEAN, _clip.STD))
    wrong = {
        "not_normalised": ours * std + mean,
        "range_minus_one_to_one": _clip.cropped(2 * x - 1, SIZE)[0],
        "mirrored": ours.flip(-1),
        "half_a_pixel_aside": ours.roll(1, -1),
    }
    if scale < 1:
        wrong["no_antialias"] = no_antialias[0]
    if height != width:
        wrong["squeezed"] = squeezed[0]
    close(ours, theirs(picture), atol=1.01 * step, **wrong)


def test_a_single_channel_is_repeated() -> None:
    gray = pictures((40, 40))[0][:1]
    close(
        _clip.cropped(gray[None], SIZE)[0],
        theirs(gray.expand(3, -1, -1)),
        atol=0.02,
        colour=_clip.cropped(gray[None], SIZE)[0] / 2,
    )


def features(model: CLIPModel, folder: Path, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features by the model's own forward pass on what the library prepared."""
    pixels = torch.stack([theirs(picture) for picture in images])
    words = CLIPTokenizer.from_pretrained(folder)(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels, **words)
    return output.image_embeds, output.text_embeds


def test_clip_and_pickscore_are_the_cosine_of_the_models_own_embeddings(model: CLIPModel, folder: Path) -> None:
    """Truth: CLIPModel.forward on the processor's pixels; a prompt is cut where the model's text ends."""
    images = torch.stack(pictures((48, 48), (48, 48), (48, 48)))
    prompts = [*PROMPTS[:2], "x" * 40]
    image, text = features(model, folder, images, prompts)
    cosine = (image * text).sum(1)
    ours = clip.build(clip.Config(path=str(folder)))(images, prompts)
    other = clip.build(clip.Config(path=str(folder)))(images, prompts[::-1])
    close(ours, 100 * cosine, atol=0.3, prompts=other, unscaled=cosine, published=2.5 * cosine, unnormalised=ours * 1.1)
    scale = float(model.logit_scale.detach().exp())
    picked = pickscore.build(pickscore.Config(path=str(folder), tokenizer=None))(images, prompts)
    close(picked, scale * cosine, atol=0.003 * scale, without_the_scale=cosine, squared=scale * picked)


def test_aesthetic_is_the_head_on_unit_features(model: CLIPModel, folder: Path, head: Path) -> None:
    """Truth: LAION's layers written out, in eval mode, on the model's own embeddings."""
    from safetensors.torch import load_file

    images = torch.stack(pictures((48, 48), (48, 48)))
    image, _ = features(model, folder, images, ["a", "b"])
    layers, tensors = nn.Sequential(
        nn.Linear(8, 6), nn.Dropout(0.2), nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 4), nn.Dropout(0.1), nn.Linear(4, 3),
        nn.Linear(3, 1),
    ), load_file(head)  # fmt: skip
    layers.load_state_dict({name.removeprefix("layers."): value for name, value in tensors.items()})
    with torch.no_grad():
        truth = layers.eval()(image)[:, 0]
        unscaled = layers(image * 2)[:, 0]
        dropped = layers.train()(image)[:, 0]
    reward = aesthetic.build(aesthetic.Config(path=str(folder), head=str(head)))
    close(
        reward(images, None), truth, atol=0.05, features_not_unit=unscaled, dropout=dropped, other=reward(images.flip(0), None)
    )


@pytest.fixture(params=["clip", "pickscore", "aesthetic"])
def reward(request: pytest.FixtureRequest, folder: Path, head: Path) -> clip.ClipScore | aesthetic.Aesthetic:
    builds = {
        "clip": lambda: clip.build(clip.Config(path=str(folder))),
        "pickscore": lambda: pickscore.build(pickscore.Config(path=str(folder), tokenizer=None)),
        "aesthetic": lambda: aesthetic.build(aesthetic.Config(path=str(folder), head=str(head))),
    }
    return builds[request.param]()


def test_gradients_reach_the_picture(reward: clip.ClipScore | aesthetic.Aesthetic) -> None:
    """Truth: central differences in float64 along a random direction."""
    assert reward.differentiable
    reward.clip.net.double()
    if isinstance(reward, aesthetic.Aesthetic):
        reward.head.double()
    x = (0.1 + 0.8 * torch.stack(pictures((40, 56), (40, 56)))).double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS[:2]).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-4
    with torch.no_grad():
        slope = (reward(x + h * direction, PROMPTS[:2]) - reward(x - h * direction, PROMPTS[:2])) / (2 * h)
    along = (gradient * direction).sum((1, 2, 3))
    close(along, slope, atol=1e-6, rtol=1e-4, sign=-along, rescaled=2 * along)
    assert all(not p.requires_grad for p in reward.clip.net.parameters())


def test_halves_and_single_channels_are_scored(reward: clip.ClipScore | aesthetic.Aesthetic, folder: Path, head: Path) -> None:
    """Truth: the same in fp32, to what bf16 can say."""
    gray = torch.stack(pictures((40, 40), (40, 40)))[:, :1]
    full = reward(gray, PROMPTS[:2])
    half = type(reward)(**{**vars(reward)})
    half.clip.net.bfloat16()
    if isinstance(half, aesthetic.Aesthetic):
        half.head.bfloat16()
    half.clip.texts.kept.clear()
    got = half(gray, PROMPTS[:2])
    assert got.dtype == torch.float32
    close(got, full, atol=0.1 * float(full.abs().max()), shifted=full * 1.3)


def test_prompts_are_encoded_once_and_in_their_order(folder: Path) -> None:
    """Truth: the encoder's own count."""
    judge = clip.build(clip.Config(path=str(folder))).clip
    asked: list[list[str]] = []
    encode = judge.texts.encode
    judge.texts.encode = lambda texts: asked.append(texts) or encode(texts)  # type: ignore[func-returns-value]
    first = judge.texts(PROMPTS, torch.device("cpu"))
    again = judge.texts(PROMPTS[1:], torch.device("cpu"))
    assert asked == [["a cat", "two blue dogs on a boat"]]
    close(again, first[1:], order=first[:2])


def test_wrong_samples_and_prompts_are_refused(reward: clip.ClipScore | aesthetic.Aesthetic) -> None:
    images = torch.stack(pictures((40, 40), (40, 40)))
    for wrong in (2 * images - 1, images[0], images[:, :2]):
        with pytest.raises(ValueError, match=r"reward \w+: "):
            reward(wrong, PROMPTS[:2])
    reward(images, PROMPTS[:2])
    if not isinstance(reward, aesthetic.Aesthetic):
        for prompts in (None, PROMPTS, torch.zeros(2)):
            with pytest.raises(ValueError, match="needs a prompt for each of the 2 samples"):
                reward(images, prompts)


def test_missing_weights_say_what_to_fetch(tmp_path: Path, folder: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a twin that is fine; pickled weights are not read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def said(reward: str) -> str:
        with pytest.raises(UserError) as caught:
            build_run(load_recipe("digits", [f"reward={reward}", "evaluation.held_out=[]"]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    build_run(
        load_recipe(
            "digits",
            [
                f"reward={{name: clip, path: '{folder}'}}",
                f"evaluation.held_out=[{{name: aesthetic, path: '{folder}', head: '{head}'}}]",
            ],
        )
    )
    assert said(f"{{name: clip, path: '{tmp_path}/none'}}").startswith(f"reward.path: no folder {tmp_path}/none")
    assert "hf download openai/clip-vit-large-patch14" in said("clip")
    save_tiny_clip(tmp_path / "pickled", safe=False)
    assert "pickled weights (.bin, .pth) are not read" in said(f"{{name: clip, path: '{tmp_path}/pickled'}}")
    assert "weights_only=True" in said(f"{{name: aesthetic, path: '{folder}'}}")
    assert "no file none.safetensors" in said(f"{{name: aesthetic, path: '{folder}', head: none.safetensors}}")
    torch.save({"layers.0.weight": torch.ones(1, 8)}, tmp_path / "head.pth")
    assert "cannot be read as safetensors" in said(f"{{name: aesthetic, path: '{folder}', head: '{tmp_path}/head.pth'}}")
    save_file({"layers.0.weight": torch.ones(1, 9), "layers.0.bias": torch.ones(1)}, tmp_path / "wide.safetensors")
    assert "takes 9 features" in said(f"{{name: aesthetic, path: '{folder}', head: '{tmp_path}/wide.safetensors'}}")
    save_file({"layers.0.weight": torch.ones(2, 8), "layers.0.bias": torch.ones(2)}, tmp_path / "two.safetensors")
    assert "must be linear layers that end in 1 number" in said(
        f"{{name: aesthetic, path: '{folder}', head: '{tmp_path}/two.safetensors'}}"
    )


def test_a_linear_head_is_a_head(tmp_path: Path, folder: Path) -> None:
    """LAION's first predictor is one layer, named weight and bias."""
    save_file({"weight": torch.ones(1, 8), "bias": torch.full((1,), 3.0)}, tmp_path / "linear.safetensors")
    reward = aesthetic.build(aesthetic.Config(path=str(folder), head=str(tmp_path / "linear.safetensors")))
    images = torch.stack(pictures((40, 40), (40, 40)))
    truth = reward.clip.images(images).sum(1) + 3
    close(reward(images, None), truth, atol=1e-5, without_bias=truth - 3)


def test_the_head_is_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    """layers.10 comes after layers.2, which sorting by text would not give."""
    weights = {"layers.10.weight": torch.ones(1, 2), "layers.2.weight": torch.ones(2, 8)}
    save_file({**weights, "layers.10.bias": torch.ones(1), "layers.2.bias": torch.ones(2)}, tmp_path / "head.safetensors")
    found = [layer.in_features for layer in aesthetic.load_head(str(tmp_path / "head.safetensors"))]
    close(found, [8, 2], by_text=[2, 8])


@pytest.mark.slow
def test_a_run_is_drawn_from_without_its_rewards_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twin: what measures rewards says what to fetch."""
    save_tiny_clip(tmp_path / "clip")
    run, clip_there = tmp_path / "run", f"{{name: clip, path: '{tmp_path}/clip'}}"
    small = ["train.iterations=1", "train.batch=4", "evaluation.n=4", "sampler.steps=2", "algorithm={name: ddpo}"]
    recipe = [f"reward=[{clip_there}, ink]", f"evaluation.held_out=[{clip_there}]", "train.select=held_out.clip", *small]
    assert main(["train", "digits", *recipe, "--output", str(run)]) == 0
    (tmp_path / "clip").rename(tmp_path / "gone")
    assert sa.load(run).shape == (1, 16, 16)
    capsys.readouterr()

    def needs_nothing(command: str) -> None:
        assert main([command, str(run), "--n", "2"]) == 0

    accepts(needs_nothing, "sample", measuring="evaluate")
    assert f"no folder {tmp_path}/clip" in capsys.readouterr().err
