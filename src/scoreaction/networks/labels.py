"""Labels as a control that a model is given beside its prompts: names in prompts, and a vector for each in the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.errors import nearest
from scoreaction.types import Conditions

BETWEEN = " | "
"""Text between a prompt and its label."""


@dataclass(frozen=True)
class Labels:
    """The names of labels, by number; a prompt names one: `"a red circle | large"`, or `"large"` where there is no text.

    A `Prompt` may have it as `metadata["label"]` instead, by name or by number. ValueError for fewer than two names, and for
    names that are equal.

    >>> Labels(("small", "large")).split("a red circle | large")
    ('a red circle', 1)
    """

    names: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"labels: must be two or more different names (got {list(self.names)})")

    @property
    def none(self) -> int:
        """The number that means no label."""
        return len(self.names)

    def number(self, label: Any) -> int:
        """The number of a label, given by name or number; ValueError for another."""
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.names):
            return label
        if str(label) not in self.names:
            raise ValueError(f"prompts: {label!r} is no label; {nearest(str(label), self.names)}")
        return list(self.names).index(str(label))

    def split(self, prompt: Any) -> tuple[str, int]:
        """The prompt's text without its label, and the label's number, `none` where it has no label."""
        text, label = str(prompt), getattr(prompt, "metadata", {}).get("label")
        if label is not None:
            return text, self.number(label)
        if text in self.names:
            return "", self.number(text)
        before, between, after = text.rpartition(BETWEEN)
        return (before, self.number(after)) if between else (text, self.none)


def plain(text: str) -> str:
    """A prompt's text without what stands behind the last ` | `.

    >>> plain("a red circle | large"), plain("a red circle")
    ('a red circle', 'a red circle')
    """
    return text.rpartition(BETWEEN)[0] or text


GAIN = 30.0
"""Learning rate of E[y] over that of the weights: the vectors begin at 0, and have further to go than weights."""


class LabelTable(nn.Module):
    """A vector E[y] for each label, 0 at first, and none for no label; added to what a module of a network gives.

    `E = GAIN vectors`. Like an adapter of LoRA it is the policy's: it is off while the reference is asked.
    """

    def __init__(self, labels: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(labels, width))
        self.numbers: Tensor | None = None
        """The labels (batch,) of the call that is under way."""
        self._disable_adapters, self._active_adapter = False, ["default"]

    def added(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The module's output with E[y] in its channels: the last axis of (batch, ..., width), the second of a convolution."""
        if self.numbers is None or self._disable_adapters or self._active_adapter != ["default"]:
            return output
        count = len(self.vectors)
        known = (self.numbers < count)[:, None]
        vectors = torch.where(known, GAIN * self.vectors[self.numbers.clamp(max=count - 1)], 0.0).to(output.dtype)
        channels = 1 if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else output.ndim - 1
        return output + vectors.reshape(
            len(vectors), *(vectors.shape[1] if axis == channels else 1 for axis in range(1, output.ndim))
        )


class LabelAdapter(nn.Module):
    """A network that is told a label beside its condition: `E[y]` is added to what its module `at` gives (CTRL, 2406.12120).

    Called with conditions as `encode` makes them; None is no label. As E begins at 0 it is the network itself at first, to the
    bit. width: the channels of the module's output, by default those of its last layer. ValueError for a module that is not
    there, and for a width that is not known.

    >>> net = LabelAdapter(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2)), at="0", labels=["small", "large"])
    >>> net.table.vectors.shape
    torch.Size([2, 8])
    """

    def __init__(self, net: nn.Module, *, at: str, labels: Sequence[str], width: int | None = None) -> None:
        super().__init__()
        modules = dict(net.named_modules())
        if at not in modules or not at:
            raise ValueError(
                f"at: {at!r} is no module of {type(net).__name__}; {nearest(at, [name for name in modules if name])}"
            )
        own = modules[at]
        sizes = [getattr(m, name) for m in own.modules() for name in ("out_features", "out_channels") if hasattr(m, name)]
        if width is None and not sizes:
            raise ValueError(
                f"at: {at} is a {type(own).__name__} of unknown channels; give the number that its output has as width"
            )
        self.labels, self.net, self.table = Labels(tuple(labels)), net, LabelTable(len(labels), width or sizes[-1])
        own.register_forward_hook(self.table.added)

    def forward(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        numbers = None if cond is None else cond.get("label")
        self.table.numbers = numbers
        y = self.net(x, t, None if cond is None else without_label(cond))
        self.table.numbers = None  # the module may be called by others too
        if y.requires_grad:  # checkpointing runs parts of the network again, after other calls
            y.register_hook(lambda _: self._tell(numbers))
        return y

    def _tell(self, numbers: Tensor | None) -> None:
        self.table.numbers = numbers

    def encode(self, encode: Callable[[list[Any]], Conditions] | None = None) -> Callable[[list[Any]], Conditions]:
        """The `encode` of the labelled model, from that of the model itself (None: it takes no prompts)."""

        def encoded(prompts: list[Any]) -> Conditions:
            parts = [self.labels.split(prompt) for prompt in prompts]
            if encode is None and any(text for text, _ in parts):
                wrong = next(str(prompt) for prompt, (text, _) in zip(prompts, parts, strict=True) if text)
                raise ValueError(f"prompts: {wrong!r} is no label; {nearest(wrong, self.labels.names)}")
            numbers = torch.tensor([number for _, number in parts])
            return with_label(None if encode is None else encode([text for text, _ in parts]), numbers)

        return encoded

    def null(self, null: Conditions = None) -> Conditions:
        """The unconditional condition, without a label, from that of the model itself."""
        return with_label(null, torch.tensor([self.labels.none]))


def with_label(base: Conditions, numbers: Tensor) -> Conditions:
    """Conditions of a labelled model: those of the model itself, and the labels' numbers (batch,) as `label`."""
    if base is None:
        return {"label": numbers}
    return {**base, "label": numbers} if isinstance(base, dict) else {"base": base, "label": numbers}


def without_label(conditions: Conditions) -> Conditions:
    """The conditions of the model itself."""
    rest = {key: value for key, value in conditions.items() if key != "label"}
    return rest["base"] if set(rest) == {"base"} else rest or None
