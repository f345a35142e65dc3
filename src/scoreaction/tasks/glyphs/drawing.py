"""Pictures of printed digits, drawn with the font that Pillow ships, and their texts as ids."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor

HEIGHT, WIDTH = 12, 40
LONGEST, BLANK = 5, 10
"""Characters of the longest text, and the id of a place without one."""
FINER = 4
"""Pixels that one pixel is the mean of."""

_TEXT = re.compile(r"[0-9]{3,5}")


def ids_of(texts: Sequence[str]) -> Tensor:
    """An id for each of 5 places, (batch, 5): the digit, or 10 behind the last. ValueError unless texts are 3 to 5 digits.

    >>> ids_of(["407"]).tolist()
    [[4, 0, 7, 10, 10]]
    """
    for text in texts:
        if _TEXT.fullmatch(text) is None:
            raise ValueError(f"prompt {text!r} is no text of 3 to 5 digits: write for example '4071'")
    return torch.tensor([[int(c) for c in text] + [BLANK] * (LONGEST - len(text)) for text in texts])


def texts_of_ids(ids: Tensor) -> list[str]:
    """The texts of ids (batch, 5).

    >>> texts_of_ids(ids_of(["407", "11235"]))
    ['407', '11235']
    """
    return ["".join(str(i) for i in row if i != BLANK) for row in ids.tolist()]


def random_ids(n: int, generator: Generator) -> Tensor:
    """Ids of n random texts, (n, 5): three digits in 60 of 100, four in 25, five in 15."""
    ids = torch.randint(0, 10, (n, LONGEST), generator=generator)
    share = torch.rand(n, 1, generator=generator)
    length = 3 + (share > 0.6).long() + (share > 0.85).long()
    return torch.where(torch.arange(LONGEST) < length, ids, BLANK)


def draw(texts: Sequence[str], generator: Generator) -> Tensor:
    """Pictures (batch, 1, 12, 40) in [0, 1], dark on white: each text in the middle, but for a small shift, of about 12 points.

    The shift is up to 2 pixels along the text and up to 1 across, the size 11.5 to 12.5.
    """
    from PIL import Image, ImageDraw, ImageFont

    pictures = []
    for text, (along, across, size) in zip(texts, torch.rand(len(texts), 3, generator=generator).tolist(), strict=True):
        fine = Image.new("L", (WIDTH * FINER, HEIGHT * FINER), 255)
        middle = (WIDTH / 2 + 4 * along - 2) * FINER, (HEIGHT / 2 + 2 * across - 1) * FINER
        font = ImageFont.load_default((11.5 + size) * FINER)
        ImageDraw.Draw(fine).text(middle, text, fill=0, font=font, anchor="mm")
        pictures.append(np.asarray(fine.reduce(FINER), dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(pictures))[:, None]
