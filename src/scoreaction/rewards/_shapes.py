"""The scenes that prompts of shapes name, and the size of their pictures."""

from __future__ import annotations

from torch import Tensor

from scoreaction.rewards._images import check_images, texts_of
from scoreaction.tasks.shapes.scenes import SIZE, Scene, parse_caption
from scoreaction.types import Prompts


def scenes_of(samples: Tensor, prompts: Prompts, *, name: str) -> list[Scene]:
    """The scene of each picture's prompt; ValueError for other pictures than those of shapes, or other prompts.

    >>> import torch
    >>> scenes_of(torch.zeros(1, 3, 32, 32), ["a blue square"], name="shapes")[0].things
    (('blue', 'square'),)
    """
    check_images(samples, name=name, channels=(3,))
    if samples.shape[2:] != (SIZE, SIZE):
        raise ValueError(f"reward {name}: reads pictures of {SIZE}x{SIZE}, got {samples.shape[2]}x{samples.shape[3]}")
    return [parse_caption(text) for text in texts_of(samples, prompts, name=name)]
