"""imagereward against its package's own score, on its real classes: a small ViT and BERT with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from captioned import PROMPTS, pictures, pil
from safetensors.torch import save_file
from servers import remote, serving
from twins import close

# the package imports these for scores and a trainer that nobody asks for here
sys.modules |= {name: ModuleType(name) for name in ("clip", "ImageReward.ReFL")}

from ImageReward.ImageReward import ImageReward  # noqa: E402
from ImageReward.models.BLIP import blip_pretrain, vit  # noqa: E402

from scoreaction.rewards import _clip, imagereward  # noqa: E402

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
BERT = {
    "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 32, "hidden_act": "gelu",
    "vocab_size": len(WORDS) + 2, "max_position_embeddings": 64, "add_cross_attention": True,
}  # fmt: skip


def small_vit(*_: Any) -> tuple[Any, int]:
    return vit.VisionTransformer(img_size=224, patch_size=32, embed_dim=32, depth=2, num_heads=2), 32


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with its settings, and beside it the tokenizer where the hub is looked for."""
    monkeypatch.setattr(blip_pretrain, "create_vit", small_vit)
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "med_config.json").write_text(json.dumps(BERT))
    return tmp_path


@pytest.fixture
def package(place: Path) -> Any:
    torch.manual_seed(0)
    net = ImageReward(str(place / "med_config.json")).eval()
    for parameter in net.mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, place / "ImageReward.safetensors")
    return net


@pytest.mark.parametrize("size", [(224, 224), (300, 260), (64, 96)], ids=str)
def test_it_is_the_packages_score(place: Path, package: Any, size: tuple[int, int]) -> None:
    """Truth: the package's transform, tokenizer and networks, a picture at a time."""
    images = torch.stack(pictures(size, size, size))
    truth = torch.tensor([package.score(prompt, pil(picture)) for prompt, picture in zip(PROMPTS, images, strict=True)])
    reward = imagereward.build(imagereward.Config(path=str(place)))
    wrong = {"prompts": reward(images, PROMPTS[1:] + PROMPTS[1:2]), "range": reward(images / 2, PROMPTS)}
    if size[0] != size[1]:
        fitted = _clip.fitted(images, 224)
        tokens = package.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        wrong["whole picture"] = package.score_gard(tokens.input_ids, tokens.attention_mask, fitted)[:, 0].detach()
    ours = reward(images, PROMPTS)
    close(ours, truth, atol=2e-2 * float(truth.std()), **wrong)
    with serving(reward, max_bytes=2**24) as server:
        close(remote(server.url)(images, PROMPTS), ours, atol=1e-6, rolled=ours.roll(1))
    x = images.requires_grad_()
    assert float(torch.autograd.grad(reward(x, PROMPTS).sum(), x)[0].abs().sum()) > 0


def test_weights_of_another_network_are_refused(place: Path, package: Any) -> None:
    state = {name: value.contiguous() for name, value in package.state_dict().items()}
    save_file({**state, "mlp.layers.0.weight": torch.zeros(2, 2)}, place / "ImageReward.safetensors")
    with pytest.raises(ValueError, match="ImageReward.safetensors does not fit ImageReward"):
        imagereward.build(imagereward.Config(path=str(place)))


def test_without_its_tokenizer_it_says_what_to_fetch(place: Path, package: Any) -> None:
    (place / "bert-base-uncased").rename(place / "elsewhere")
    with pytest.raises(ValueError, match="takes the tokenizer bert-base-uncased from the hub"):
        imagereward.build(imagereward.Config(path=str(place)))


def test_its_published_size_is_the_one_that_plan_counts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: the package's own ViT-L/16 and a BERT of bert-base's size with two tokens more, as its med_config.json says."""
    monkeypatch.undo()
    monkeypatch.chdir(place)
    sizes = {"num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 30524, "max_position_embeddings": 512}
    (place / "med_config.json").write_text(json.dumps(BERT | sizes))
    count = sum(parameter.numel() for parameter in ImageReward(str(place / "med_config.json")).parameters())
    close(imagereward.PARAMETERS, count, atol=0, without_its_projections=count - 1024 * 256 - 768 * 256 - 2 * 256)
