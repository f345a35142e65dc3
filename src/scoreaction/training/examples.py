"""Data of a run: pairs or samples as users have them, checked against model and prompts, and made ready for the learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Algorithm
from scoreaction.algorithms._setting import Examples
from scoreaction.networks.model import Model
from scoreaction.rewards._images import check_range, is_images
from scoreaction.types import Pairs, Samples

KINDS: dict[type, str] = {Pairs: "pairs", Samples: "samples"}
MAKE = {
    "pairs": "give data: {path: FILE} of pairs, such as scoreaction pairs writes",
    "samples": "give data: {path: FILE} of samples",
}


class Unread:
    """Data of a run that only draws or measures: none was read."""


def settled(
    data: Pairs | Samples | Unread | None, algorithm: Algorithm, model: Model, prompts: Sequence[Any] | None
) -> Examples | None:
    """The learner's examples, None where it learns from rewards. ValueError, with the remedy, where they do not fit."""
    if isinstance(data, Unread):
        return None
    name, wanted = getattr(algorithm, "name", type(algorithm).__name__), algorithm.learns_from
    if wanted == "rewards":
        if data is not None:
            raise ValueError(
                f"data: {name} learns from rewards and takes none; leave it out, or set algorithm.name to dpo or spin"
            )
        return None
    if data is None:
        raise ValueError(f"data: {name} learns from {wanted}; {MAKE[wanted]}")
    if type(data) not in KINDS:
        such = "sa.Pairs(winner, loser)" if wanted == "pairs" else "sa.Samples(samples)"
        raise ValueError(f"data: {name} learns from {such}, of tensors (got {type(data).__name__})")
    if KINDS[type(data)] != wanted:
        other = "spin" if wanted == "pairs" else "dpo"
        raise ValueError(
            f"data: {name} learns from {wanted} and these are {KINDS[type(data)]}; set algorithm.name to {other}, or"
            f" {MAKE[wanted]}"
        )
    tensors = data[:-1]
    for part in tensors:
        if not isinstance(part, Tensor):
            raise ValueError(
                f"data: samples must be tensors (got {type(part).__name__}); torch.tensor(...) makes one of an array"
            )
    if len(tensors[0]) == 0 or any(len(part) != len(tensors[0]) for part in tensors):
        raise ValueError(
            f"data: its parts must be of one length, 1 or more (got {', '.join(str(len(part)) for part in tensors)})"
        )
    x0, *others = (_clean(part, model) for part in tensors)
    worse = others[0] if others else None
    if worse is not None:
        equal = (x0 == worse).flatten(1).all(1).nonzero().flatten().tolist()
        if equal:
            raise ValueError(
                f"data: pair {equal[0]} has two equal samples, as have {len(equal) - 1} more; leave out what prefers nothing"
            )
    return Examples(x0, worse, *_numbers(data.prompts, prompts, len(x0), every=wanted == "samples"))


def _clean(samples: Tensor, model: Model) -> Tensor:
    try:
        if is_images(samples):
            check_range(samples, where="data")
        return model.clean(samples)
    except ValueError as error:
        raise ValueError(f"data: {str(error).removeprefix('data: ')}") from error


def _numbers(own: Sequence[Any] | None, prompts: Sequence[Any] | None, n: int, *, every: bool) -> tuple[Tensor, Tensor]:
    """The number of each example's prompt, and the first number of each prompt's text. every: all prompts must have one."""
    if (own is None) != (prompts is None):
        has, lacks = ("the run has prompts", "the data none") if own is None else ("the data has prompts", "the run none")
        raise ValueError(f"data: {has} and {lacks}; give both or neither")
    if own is None or prompts is None:
        return torch.zeros(n, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    known: dict[str, int] = {}
    first = torch.tensor([known.setdefault(str(prompt), number) for number, prompt in enumerate(prompts)])
    if len(own) != n:
        raise ValueError(f"data: there are {len(own)} prompts for {n} examples; give one each")
    strange = next((str(prompt) for prompt in own if str(prompt) not in known), None)
    if strange is not None:
        raise ValueError(f"data: its prompt {strange!r} is none of the run's; add it to prompts")
    lonely = set(known) - {str(prompt) for prompt in own}
    if every and lonely:
        raise ValueError(f"data: there is no sample for the prompt {min(lonely)!r}; add one, or take it out of prompts")
    return torch.tensor([known[str(prompt)] for prompt in own]), first
