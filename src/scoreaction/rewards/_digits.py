"""What the rewards of digits expect of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoreaction.tasks.digits.networks import parse_digit_prompt
from scoreaction.types import Conditions


def class_ids(conditions: Conditions | Sequence[str | int], samples: Tensor, *, name: str) -> Tensor:
    """The digits that the samples were asked to be, (batch,) on their device; ValueError where that is not said.

    Conditions are class ids, a long tensor (batch,), or a list of prompts that each name a digit.

    >>> class_ids(["a handwritten seven", "2"], torch.zeros(2, 1, 16, 16), name="classifier").tolist()
    [7, 2]
    """
    if isinstance(conditions, list | tuple):
        conditions = torch.tensor([parse_digit_prompt(str(prompt)) for prompt in conditions], dtype=torch.long)
    if not isinstance(conditions, Tensor) or conditions.is_floating_point() or conditions.shape != samples.shape[:1]:
        got = f"a tensor {tuple(conditions.shape)}" if isinstance(conditions, Tensor) else type(conditions).__name__
        raise ValueError(f"reward {name}: needs a digit for each of the {len(samples)} samples, got {got}; give prompts")
    ids = conditions.to(samples.device, torch.long)
    if bool(((ids < 0) | (ids > 9)).any()):
        raise ValueError(f"reward {name}: class ids must be 0 to 9, got {int(ids.min())} to {int(ids.max())}; give prompts")
    return ids
