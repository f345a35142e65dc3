"""Encoding of prompts: each text once, by encoders that are on the device only while they work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.networks.conditions import map_conditions, take
from scoreaction.types import Conditions

AT_ONCE = 16
"""Prompts in one call of the encoders."""


@dataclass(frozen=True)
class Limit:
    """A tokenizer, by its name in the pipeline, and the most tokens of it that the model reads."""

    name: str
    tokenizer: Any
    tokens: int

    def check(self, prompt: str) -> None:
        """ValueError, naming the prompt, where its end would be cut off."""
        from diffusers.loaders import TextualInversionLoaderMixin

        whole = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)  # a learned word may be many tokens
        tokens = len(self.tokenizer(whole, truncation=False, verbose=False).input_ids)
        if tokens > self.tokens:
            short = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise ValueError(
                f"prompts: {short!r} has {tokens} tokens by {self.name} and the model reads {self.tokens}; shorten it"
            )


class TextEncoding:
    """`encode(prompts) -> conditions`, remembering on the CPU what it has encoded.

    encoders are moved to `device()` for a call and back to the CPU after it. encode turns a few prompts into conditions.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        encode: Callable[[list[str], torch.device], Conditions],
        limits: Sequence[Limit],
        device: Callable[[], torch.device],
    ) -> None:
        self.encoders, self.encode, self.limits, self.device = encoders, encode, limits, device
        self.known: dict[str, Conditions] = {}

    def __call__(self, prompts: list[Any]) -> Conditions:
        texts = [str(prompt) for prompt in prompts]
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            self._learn(new)
        conditions = map_conditions(lambda *rows: torch.cat(rows), *(self.known[text] for text in texts))
        for i, text in enumerate(texts):  # views, so that the texts are there once
            self.known[text] = take(conditions, slice(i, i + 1))
        return conditions

    @torch.no_grad()
    def _learn(self, texts: list[str]) -> None:
        for text in texts:
            for limit in self.limits:
                limit.check(text)
        device = self.device()
        try:
            for encoder in self.encoders:
                encoder.to(device)
            for start in range(0, len(texts), AT_ONCE):
                part = texts[start : start + AT_ONCE]
                conditions = map_conditions(Tensor.cpu, self.encode(part, device))
                for i, text in enumerate(part):
                    self.known[text] = _row(conditions, i)
        finally:
            for encoder in self.encoders:
                encoder.cpu()


def _row(conditions: Conditions, i: int) -> Conditions:
    return map_conditions(lambda c: c[i : i + 1].clone(), conditions)
