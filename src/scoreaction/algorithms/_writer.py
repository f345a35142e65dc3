"""Writers of prompts: who gives a menu of texts for each prompt, over HTTP or in Python, before training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.networks.model import Model
from scoreaction.rewards import http
from scoreaction.rewards._wire import MOST_TEXTS, checked_texts, question, read_texts
from scoreaction.rewards.http import Exchange
from scoreaction.sampling.draw import x0_in_parts
from scoreaction.sampling.sampler import Sampler

PART = 64
"""Prompts whose samples are drawn, and kept, at a time."""


class PromptWriter(Protocol):
    """`writer(samples, prompts, n)`: n texts for each prompt, which differ from it and from one another.

    samples (batch, ...): one a prompt, drawn by the pretrained model; images in [0, 1].
    """

    def __call__(self, samples: Tensor, prompts: list[str], n: int, /) -> Sequence[Sequence[str]]: ...


class Writer(http.Config, frozen=True, extra="forbid"):
    """A server that writes texts for prompts, started with `scoreaction serve-writer` or your own, over HTTP.

    It is asked once for each prompt, and shown what the pretrained model draws of it. docs/rewards.md has the protocol; the
    other settings are those of the reward `http`.
    """

    texts: int = Field(4, ge=1, le=MOST_TEXTS, description="texts for each prompt; the menu has the prompt itself too")
    timeout: float = Field(300.0, gt=0, description="seconds to wait for an answer")
    batch: int = Field(4, ge=1, description="prompts of one question")


def write_menu(
    model: Model,
    writer: PromptWriter | Writer,
    prompts: Sequence[Any],
    *,
    texts: int = 4,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> dict[str, list[str]]:
    """A menu for `PromptLoop`: for each prompt itself and then the texts that a writer gives for it, asked once.

    writer: a function, or `Writer` for a server, whose own `texts` counts. It sees a sample of each prompt by the pretrained
    model. ValueError for texts that are none, empty, too long, too many or too few, or equal; RewardError where a server gives
    no answer.

    >>> import scoreaction as sa
    >>> model = sa.models.digits.build(sa.models.digits.Config())
    >>> write_menu(model, lambda samples, prompts, n: [["8"] for _ in prompts], ["3"], texts=1, sampler=sa.Sampler(steps=2))
    {'3': ['3', '8']}
    """
    if isinstance(writer, Writer):
        texts = writer.texts
        ask = http.build(
            writer, Exchange("writer", "/write", partial(question, texts=texts), partial(read_texts, n=texts))
        ).answers
    else:
        ask = partial(_texts_of, writer, texts)
    known = {str(prompt): prompt for prompt in reversed(prompts)}
    distinct, menu = [known[text] for text in dict.fromkeys(map(str, prompts))], dict[str, list[str]]()
    every = torch.arange(len(distinct))
    with torch.no_grad():
        parts = x0_in_parts(model, sampler or Sampler(**model.sampling), distinct, seed, every, reference=True, chunk=PART)
        for rows, x0 in parts:
            own = [distinct[row] for row in rows.tolist()]
            answer = ask(model.decode(x0).cpu(), own)
            menu |= {str(prompt): [str(prompt), *more] for prompt, more in zip(own, answer, strict=True)}
    return menu


def _texts_of(writer: PromptWriter, texts: int, samples: Tensor, prompts: list[Any]) -> list[list[str]]:
    return checked_texts(writer(samples, prompts, texts), prompts, texts)
