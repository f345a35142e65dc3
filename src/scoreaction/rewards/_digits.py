"""The class ids that prompts of digits name."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreaction.rewards._images import texts_of
from scoreaction.tasks.digits.networks import parse_digit_prompt
from scoreaction.types import Prompts


def class_ids(samples: Tensor, prompts: Prompts, *, name: str) -> Tensor:
    """The digit of each sample's prompt, (batch,) on the samples' device; ValueError where a prompt names none.

    >>> class_ids(torch.zeros(2, 1, 16, 16), ["a handwritten seven", "2"], name="classifier").tolist()
    [7, 2]
    """
    return torch.tensor([parse_digit_prompt(text) for text in texts_of(samples, prompts, name=name)], device=samples.device)
