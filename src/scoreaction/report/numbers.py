"""Numbers as people read them, and which figures of a comparison are worth a column."""

from __future__ import annotations

from typing import Any

from scoreaction.types import Values


def number(value: Any, digits: int = 4) -> str:
    """Significant digits, without an exponent where it is readable.

    >>> number(0.123456), number(1234567), number(None)
    ('0.1235', '1,234,567', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1) and abs(value) < 1e15):
        return f"{round(value):,}"
    return f"{value:.{digits}g}"


def with_error(value: Any, error: Any, digits: int = 4) -> str:
    """`value +- error`."""
    return f"{number(value, digits)} ± {number(error, 2)}" if error else number(value, digits)


def before_and_after(figures: Values) -> list[list[str]]:
    """Key, base and tuned, with standard errors, of everything that was measured on both."""
    return [
        [key, *(with_error(figures.get(f"{key}_{kind}"), figures.get(f"{key}_{kind}_se")) for kind in ("base", "tuned"))]
        for key in (key.removesuffix("_base") for key in figures if key.endswith("_base"))
    ]


def steered_rows(figures: Values) -> list[list[str]]:
    """Rows of name, value as it is and value steered: everything measured on both, then distances where they are known."""
    kind = "base" if "reward_base" in figures else "tuned"
    rows = []
    for key in (key.removesuffix("_steered") for key in figures if key.endswith("_steered")):
        if f"{key}_{kind}" in figures:
            cells = (with_error(figures[f"{key}_{k}"], figures.get(f"{key}_{k}_se")) for k in (kind, "steered"))
            rows.append([key.removeprefix("held_out.").replace("_", " "), *cells])
    if "distance_steered" in figures:
        name = f"distance to the optimum (floor {number(figures['distance_steered_floor'])})"
        rows.append([name, "", number(figures["distance_steered"])])
    return rows


def held_out_figures(figures: Values) -> list[tuple[str, float, float]]:
    """Name, base and tuned mean of each held-out reward."""
    names = [key[len("held_out.") : -len("_base")] for key in figures if key.startswith("held_out.") and key.endswith("_base")]
    return [(name, figures[f"held_out.{name}_base"], figures[f"held_out.{name}_tuned"]) for name in names]


def comparison_rows(comparison: Values) -> list[list[str]]:
    """The figures worth a row, a cell for each group: those of the tuned model, KL, distances and costs."""
    groups = comparison["groups"]
    present = {key for group in groups for key in group["mean"]}
    held_out = sorted(k for k in present if k.startswith("held_out.") and k.endswith("_tuned"))
    wanted = [
        "reward_base",
        "reward_tuned",
        "reward_steered",
        "kl_nats",
        "gap_nats",
        "diversity_tuned",
        "cluster_entropy_tuned",
        *held_out,
    ]
    wanted += ["distance_to_optimum", "distance_floor", "distance_oracle", "model_evaluations", "seconds"]
    return [
        [
            key.removeprefix("held_out.").replace("_", " ").replace("kl nats", "KL (nats)").replace("gap nats", "gap (nats)"),
            *(with_error(group["mean"].get(key), group["standard_error"].get(key)) for group in groups),
        ]
        for key in wanted
        if key in present
    ]


def change(before: float, after: float) -> str:
    """`from 1 to 2`."""
    return f"from {number(before, 3)} to {number(after, 3)}"


def objectives(figures: Values) -> tuple[float, float]:
    """`reward - beta x KL` of the tuned model and of the optimum."""
    tuned = figures["reward_tuned"] - figures["beta"] * figures["kl_nats"]
    return tuned, figures["optimum_reward"] - figures["beta"] * figures["optimum_kl_nats"]


def limit_of_policy(off_below: float) -> str:
    """The time below which a policy is off, in words.

    >>> limit_of_policy(0.0476)
    'below time 0.0476 (0 is data, 1 noise) the pretrained model acts'
    """
    return f"below time {off_below:g} (0 is data, 1 noise) the pretrained model acts"
