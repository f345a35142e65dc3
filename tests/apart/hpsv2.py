"""hpsv2 against open_clip itself, on its real classes, small and random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from captioned import PROMPTS, pictures, pil
from safetensors.torch import save_file
from twins import close

from scoreaction.rewards import hpsv2

TOWER = {"layers": 2, "width": 16}
CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {**TOWER, "image_size": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {**TOWER, "heads": 2, "context_length": 77, "vocab_size": 49408},
}


def saved(net: Any, file: Path) -> Path:
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, file)
    return file


def folder(net: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """open_clip's own format."""
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    saved(net, place / "open_clip_model.safetensors")
    return str(place)


def weights_alone(net: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form of HPSv2's file, of a ViT-H-14 that is as small."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", CONFIG)
    return str(saved(net, place / "hpsv2.safetensors"))


@pytest.mark.parametrize("form", [folder, weights_alone])
@pytest.mark.parametrize("size", [(48, 64), (64, 64), (90, 50)], ids=str)
def test_it_is_the_cosine_of_open_clips_embeddings(form, size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: open_clip's own transform, tokenizer and forward pass."""
    torch.manual_seed(0)
    net = open_clip.CLIP(**CONFIG).eval()
    images = torch.stack(pictures(size, size, size))
    transform = open_clip.image_transform(32, is_train=False, resize_mode="longest", fill_color=0)
    pixels = torch.stack([transform(pil(picture)) for picture in images])
    with torch.no_grad():
        image, text, _ = net(pixels, open_clip.get_tokenizer("ViT-H-14")(PROMPTS))
    truth = (image * text).sum(1)
    reward = hpsv2.build(hpsv2.Config(path=form(net, tmp_path, monkeypatch)))
    wrong = {"prompts": reward(images, PROMPTS[1:] + PROMPTS[1:2]), "scaled": 100 * truth, "range": reward(images / 2, PROMPTS)}
    close(reward(images, PROMPTS), truth, atol=2e-3, **wrong)
    x = images.requires_grad_()
    assert float(torch.autograd.grad(reward(x, PROMPTS).sum(), x)[0].abs().sum()) > 0


def test_a_file_of_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wider = {**CONFIG, "embed_dim": 4}
    path = weights_alone(open_clip.CLIP(**wider), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"hpsv2.safetensors does not fit open_clip's ViT-H-14: .*"):
        hpsv2.build(hpsv2.Config(path=path))


def test_its_published_size_is_the_one_that_plan_counts() -> None:
    """Truth: open_clip's own ViT-H-14."""
    counts = {}
    for name in ("ViT-H-14", "ViT-g-14"):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in open_clip.CLIP(**open_clip.get_model_config(name)).parameters())
    close(hpsv2.PARAMETERS, counts["ViT-H-14"], atol=0, another=counts["ViT-g-14"])
