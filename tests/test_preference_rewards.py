"""What hpsv2 and imagereward ask of their packages and what they refuse; against the packages themselves in tests/apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captioned import PROMPTS, pictures, pil
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from twins import close

from scoreaction.rewards import _clip, hpsv2, imagereward


def normalised(picture: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (_clip.MEAN, _clip.STD))
    return (pixels - mean) / std


@pytest.mark.parametrize("size", [(64, 64), (97, 61), (50, 120), (20, 24), (31, 8)], ids=str)
def test_a_picture_is_fitted_whole(size: tuple[int, int]) -> None:
    """Truth: pillow's bicubic resize to the longer side, pasted into the middle of black."""
    (picture,) = pictures(size)
    height, width = (round(side * 32 / max(size)) for side in size)
    square = Image.new("RGB", (32, 32))
    square.paste(pil(picture).resize((width, height), Image.Resampling.BICUBIC), ((32 - width) // 2, (32 - height) // 2))
    ours, step = _clip.fitted(picture[None], 32)[0], 1 / 255 / min(_clip.STD)
    wrong = {"range": _clip.fitted(2 * picture[None] - 1, 32)[0], "not_normalised": ours * 0.27 + 0.45}
    if height != width:
        wrong |= {"cropped": _clip.cropped(picture[None], 32)[0], "gray_edges": ours + (ours == ours[:, :1, :1])}
    close(ours, normalised(square), atol=1.01 * step, **wrong)


def test_hpsv2_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="HPS_v2.1_compressed.pt of xswu/HPSv2.*weights_only=True"):
        hpsv2.build(hpsv2.Config())
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"pip install open_clip_torch, .*serve-reward hpsv2"):
        hpsv2.build(hpsv2.Config(path="here.safetensors"))
    monkeypatch.setitem(sys.modules, "open_clip", ModuleType("open_clip"))
    (tmp_path / "hpsv2.pt").touch()
    (tmp_path / "open_clip_config.json").touch()
    for path, said in {
        "hpsv2.pt": "is no safetensors file",
        "none.safetensors": "is no safetensors file",
        ".": "must hold",
    }.items():
        with pytest.raises(ValueError, match=said):
            hpsv2.build(hpsv2.Config(path=str(tmp_path / path)))


class Package(nn.Module):
    """What imagereward uses of its package: tokens of the prompts, pictures of 224 pixels, (batch, 1) scores."""

    def __init__(self, med_config: str, device: str) -> None:
        super().__init__()
        self.device, self.read = device, json.loads(Path(med_config).read_text())
        self.scale = nn.Parameter(torch.zeros(()))
        self.blip = SimpleNamespace(tokenizer=self.tokens)

    def tokens(self, texts: list[str], *, padding: str, truncation: bool, max_length: int, return_tensors: str) -> Any:
        assert (padding, truncation, max_length, return_tensors) == ("max_length", True, 35, "pt")
        ids = torch.tensor([[len(text)] for text in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def score_gard(self, ids: torch.Tensor, mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        assert image.shape[1:] == (3, 224, 224)
        return self.scale * image.mean((1, 2, 3))[:, None] + ids * mask


def test_imagereward_asks_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: the stand-in's formula on CLIP's pixels; the weights are the file's."""
    module = ModuleType("ImageReward.ImageReward")
    module.ImageReward = Package  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ImageReward", ModuleType("ImageReward"))
    monkeypatch.setitem(sys.modules, "ImageReward.ImageReward", module)
    (tmp_path / "med_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no ImageReward.safetensors; fetch .*weights_only=True"):
        imagereward.build(imagereward.Config(path=str(tmp_path)))
    save_file({"scale": torch.tensor(3.0), "blip.position_ids": torch.zeros(2)}, tmp_path / "ImageReward.safetensors")
    reward = imagereward.build(imagereward.Config(path=str(tmp_path)))
    images = torch.stack(pictures((300, 260), (300, 260), (300, 260)))
    truth = 3 * _clip.cropped(images, 224).mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in PROMPTS])
    close(reward(images, PROMPTS), truth, atol=1e-5, unloaded=truth * 0 + 5, prompts=reward(images, PROMPTS[1:] + PROMPTS[1:2]))
    x = images.requires_grad_()
    assert float(torch.autograd.grad(reward(x, PROMPTS).sum(), x)[0].abs().sum()) > 0
    with pytest.raises(ValueError, match="needs a prompt for each of the 3 samples"):
        reward(images, None)
    save_file({"other": torch.tensor(3.0)}, tmp_path / "ImageReward.safetensors")
    with pytest.raises(ValueError, match="does not fit ImageReward: scale is in only one of the two"):
        imagereward.build(imagereward.Config(path=str(tmp_path)))


def test_imagereward_without_its_package_says_how_to_serve_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ValueError, match=r"an environment of its own.*serve-reward imagereward.*\{name: http"):
        imagereward.build(imagereward.Config())
