"""Identity of a run: the settings that make its result and the shapes of its weights, which each checkpoint carries."""

from __future__ import annotations

from typing import Any, NamedTuple

from scoreaction.types import Values

FREE = (
    "train.iterations", "train.device", "train.checkpoint_every", "train.max_rows", "train.shard", "train.show_every",
    "train.trackers", "online.budget", "model.offload_vae",
)  # fmt: skip
FREE_SECTIONS = ("evaluation", "early_stop", "distill", "steer", "student", "pretrain")
"""Settings that another part of the same run may have: where and how long it trains, and how it is measured."""


class Difference(NamedTuple):
    """The first setting in which two runs differ, None for one that is not there."""

    key: str
    before: Any
    now: Any


def flattened(values: Any, key: str = "") -> Values:
    """Nested values by dotted key.

    >>> flattened({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c.0': 2}
    """
    if isinstance(values, dict) and values:
        return {k: v for name, inner in values.items() for k, v in flattened(inner, f"{key}.{name}" if key else name).items()}
    if isinstance(values, list) and values:
        return {k: v for i, inner in enumerate(values) for k, v in flattened(inner, f"{key}.{i}").items()}
    return {key: values}


def is_free(key: str) -> bool:
    """True for a setting that may change; so may the address of a server, be it one of several or of a part of the reward.

    >>> is_free("train.device"), is_free("reward.url.1"), is_free("train.lr")
    (True, True, False)
    """
    return key in FREE or key.startswith("train.trackers.") or (key.startswith("reward.") and ".url" in key)


def identity(settings: Values, shapes: dict[str, list[int]]) -> Values:
    """The settings but the free ones, flattened, with the shape of each trained tensor.

    >>> identity({"train": {"lr": 0.1, "iterations": 3}, "evaluation": {"n": 8}}, {"w": [2, 2]})
    {'train.lr': 0.1, 'weights.w': '2 x 2'}
    """
    own = {key: value for key, value in flattened(settings).items() if not is_free(key)}
    own = {key: value for key, value in own.items() if key.partition(".")[0] not in FREE_SECTIONS}
    return own | {f"weights.{name}": " x ".join(map(str, shape)) for name, shape in shapes.items()}


def difference(before: Values, now: Values) -> Difference | None:
    """The first key of flattened values in which they differ; a run may become longer, by iterations or by rounds.

    >>> difference({"train.iterations": 3, "a": 1}, {"train.iterations": 4, "a": 2})
    Difference(key='a', before=1, now=2)
    """
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        longer = key == "train.iterations" and old is not None and new is not None and new >= old
        longer = longer or (key.startswith("online.rounds.") and old is None)
        free = is_free(key) and key != "train.iterations"
        if old != new and not longer and not free:
            return Difference(key, old, new)
    return None
