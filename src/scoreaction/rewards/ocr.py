"""Agreement of the text that an OCR network reads in a picture with the prompt, by the package rapidocr."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from scoreaction.networks.labels import plain
from scoreaction.rewards import Reward
from scoreaction.rewards._images import check_images, rgb, texts_of
from scoreaction.settings import Settings
from scoreaction.types import Prompts

HEIGHT = 48
"""Pixels of a line as the network takes it."""
PARAMETERS = 5_300_000
"""Weights of its recognition, of 4 bytes each: its detection is not loaded."""


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = max(0, 1 - d(read(x), c)/|c|)`: 1 where the picture reads as the prompt, in part where it does in part.

    d is the edit distance (Levenshtein 1966), |c| the number of characters; white space does not count. Images (batch, 1 or 3,
    H, W) in [0, 1], each a single line of text, which are scaled to a height of 48. A black box. It is read by PP-OCRv6, which
    comes with rapidocr: pip install rapidocr onnxruntime. ValueError for a prompt without characters.
    """

    name: Literal["ocr"] = "ocr"
    correct: bool = Field(False, description="1 where the whole text is right, else 0, instead of credit for parts")


def edit_distance(a: str, b: str) -> int:
    """The least number of characters that are put in, left out or replaced to make b of a.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def build(config: Config) -> Reward:
    """The reward, with the package's network."""
    read = _reader(torch.get_num_threads())

    def ocr(samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="ocr")
        texts = ["".join(plain(text).split()) for text in texts_of(samples, prompts, name="ocr")]
        if not all(texts):
            raise ValueError("reward ocr: a prompt is the text of its picture, and one has none; write one")
        wrong = [edit_distance(read(line.tobytes()), text) for line, text in zip(lines(samples), texts, strict=True)]
        values = torch.tensor(
            [max(0.0, 1 - d / len(text)) for d, text in zip(wrong, texts, strict=True)], device=samples.device
        )
        return (values == 1).float() if config.correct else values

    return Reward(ocr)


@torch.no_grad()
def lines(samples: Tensor) -> NDArray[np.uint8]:
    """Pictures as the network takes them, (batch, 48, W, 3) of 8 bits, blue first."""
    width = max(1, round(samples.shape[3] * HEIGHT / samples.shape[2]))
    large = F.interpolate(rgb(samples).float(), (HEIGHT, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return (255 * large).round().to(torch.uint8).flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


@cache
def _reader(threads: int) -> Callable[[bytes], str]:
    """`read(line) -> text`, without white space; what was just read is known, so that `correct` beside it costs nothing."""
    import onnxruntime  # noqa: F401  # rapidocr asks for it only when it reads
    from rapidocr import RapidOCR

    limits = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": threads for kind in ("intra", "inter")}
    # a line is not padded to more than its own width, and is not searched for text
    network = RapidOCR(params={"Global.log_level": "error", "Rec.rec_img_shape": [3, HEIGHT, HEIGHT], **limits})

    @lru_cache(512)
    def read(line: bytes) -> str:
        picture = np.frombuffer(line, np.uint8).reshape(HEIGHT, -1, 3)
        texts = network(picture, use_det=False, use_cls=False, use_rec=True).txts
        return "".join("".join(texts or ()).split())

    return read
