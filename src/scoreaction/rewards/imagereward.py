"""ImageReward: people's rating of a picture for a prompt (Xu et al. 2023, arXiv 2304.05977), by its own package."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._clip import cropped
from scoreaction.rewards._images import check_images, texts_of
from scoreaction.settings import Settings
from scoreaction.types import Prompts

SIZE, WORDS = 224, 35
"""Pixels and tokens of its input."""
PARAMETERS = 446_665_953
"""Weights of THUDM/ImageReward: ViT-L/16, a BERT that attends to it, two projections that no score needs, and a head."""
APART = (
    "its package pins old versions: install it in an environment of its own (docs/rewards.md), there run scoreaction"
    " serve-reward imagereward path=FOLDER, and here take {name: http, url: ...}"
)
FETCH = (
    "fetch ImageReward.pt and med_config.json of THUDM/ImageReward from the hub into it, and convert the first once: python -c"
    " \"import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load('ImageReward.pt',"
    " weights_only=True).items()}, 'ImageReward.safetensors')\""
)

TOKENIZER = (
    "its package takes the tokenizer bert-base-uncased from the hub: run once where there is a network, or put the hub's"
    " folder of that name where the server is started"
)


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c)` is the package's score: mean 0 and standard deviation 1 over its test pictures, about -2 to 2.

    Images (batch, 1 or 3, H, W) in [0, 1]. Differentiable. Runs where the package image-reward can be imported, which is
    best an environment of its own behind `serve-reward`; over HTTP it is a black box. ValueError where package or weights
    are not there.
    """

    name: Literal["imagereward"] = "imagereward"
    path: str | None = Field(None, description="folder with ImageReward.safetensors and med_config.json")


def build(config: Config) -> Reward:
    """The reward."""
    try:
        from ImageReward.ImageReward import ImageReward
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"imagereward cannot be imported ({str(error).splitlines()[0]}); {APART}") from error
    if config.path is None:
        raise ValueError(f"path: give a folder; {FETCH}")
    folder = Path(config.path).expanduser()
    for file in ("ImageReward.safetensors", "med_config.json"):
        if not (folder / file).is_file():
            raise ValueError(f"path: {folder} holds no {file}; {FETCH}")
    try:
        net = ImageReward(med_config=str(folder / "med_config.json"), device="cpu")
    except OSError as error:
        raise ValueError(f"imagereward: {str(error).splitlines()[0]}; {TOKENIZER}") from error
    _fill(net, folder / "ImageReward.safetensors")
    net.eval().requires_grad_(False)

    def imagereward(samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="imagereward")
        texts = texts_of(samples, prompts, name="imagereward")
        net.to(samples.device).device = samples.device
        tokens = net.blip.tokenizer(texts, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
        ids, mask = tokens.input_ids.to(samples.device), tokens.attention_mask.to(samples.device)
        return net.score_gard(ids, mask, cropped(samples.float(), SIZE))[:, 0].to(samples)

    return Reward(imagereward, differentiable=True)


def _fill(net: Any, file: Path) -> None:
    """Loads the weights; the numbers of positions, which some versions of transformers keep among them, may differ."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        missing, more = net.load_state_dict(load_file(file), strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"path: {file} does not fit ImageReward: {str(error).splitlines()[0]}") from error
    odd = [name for name in (*missing, *more) if not name.endswith("position_ids")]
    if odd:
        raise ValueError(f"path: {file} does not fit ImageReward: {odd[0]} is in only one of the two")
