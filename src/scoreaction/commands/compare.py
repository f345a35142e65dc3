"""Several algorithms, seeds and settings on one recipe with the same budget, and their figures with standard errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scoreaction import catalog
from scoreaction.commands.train import NOTHING, learned_nothing, run
from scoreaction.disk import whole, write_whole
from scoreaction.errors import Interrupted, UserError, nearest
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import Recipe, load_recipe, optimum_beta
from scoreaction.recipes.text import parse_override
from scoreaction.report.curve_figures import comparison_figures
from scoreaction.report.frontiers import frontier_figures
from scoreaction.report.model_card import write_card
from scoreaction.training.run_folder import RunFolder
from scoreaction.training.summary import finite
from scoreaction.types import Values
from scoreaction.world import World
from scoreaction.yaml_text import parse_yaml

OPTIONS = {"train.seed": "--seeds", "algorithm.name": "--algorithms", "algorithm": "--algorithms"}
"""Keys of a recipe that a comparison sets by options."""


@dataclass(frozen=True)
class Entry:
    """One run of a comparison."""

    label: str
    algorithm: str
    value: str | None
    seed: int
    folder: str
    recipe: Recipe


def parse_sweep(text: str | None) -> tuple[str | None, list[str]]:
    """`algorithm.beta=0.1,0.3` to its key and values; a value may be a list in brackets.

    >>> parse_sweep("algorithm.beta=0.1,0.3")
    ('algorithm.beta', ['0.1', '0.3'])
    """
    if text is None:
        return None, []
    key, _, values = text.partition("=")
    if not key or not values:
        raise UserError(f"--sweep: must be key=value,value, for example algorithm.beta=0.1,0.3 (got {text!r})")
    if key in OPTIONS:
        raise UserError(f"--sweep: {key} has an option of its own: {OPTIONS[key]}")
    parse_override(f"{key}=0")
    parsed = parse_yaml(f"[{values}]", where="--sweep")
    if not parsed:
        raise UserError(f"--sweep: {key} has no value")
    if any(value in parsed[:i] for i, value in enumerate(parsed)):
        raise UserError(f"--sweep: {key} has a value twice (got {values})")
    return key, [json.dumps(value) if not isinstance(value, str) else value for value in parsed]


def planned(
    recipe: str,
    overrides: Sequence[str],
    algorithms: Sequence[str],
    seeds: Sequence[int],
    sweep: str | None,
    *,
    trust: bool | None = None,
) -> list[Entry]:
    """All runs, the recipe of each checked.

    An `algorithm.` setting goes to the algorithms that know it, and one of them must; the others run without it. Algorithms
    without a beta are measured against the optimum of the recipe's own.
    """
    key, values = parse_sweep(sweep)
    known = {name: list(catalog.find("algorithm", name, key="--algorithms").Config.model_fields) for name in algorithms}
    for setting in [text.partition("=")[0] for text in overrides] + ([key] if key else []):
        if setting in OPTIONS:
            raise UserError(f"{setting}: has an option of its own: {OPTIONS[setting]}")
        if not any(_knows(known[name], setting) for name in algorithms):
            hint = nearest(setting.removeprefix("algorithm."), {key for keys in known.values() for key in keys} - {"name"})
            raise UserError(f"{setting}: no setting of {' or '.join(algorithms)}; {hint}")
    beta = optimum_beta(_as_written(recipe, overrides, trust))
    entries = []
    for name in algorithms:
        changes = [text for text in overrides if _knows(known[name], text)] + [f"algorithm.name={name}"]
        if "beta" not in known[name] and beta:
            changes.insert(0, f"evaluation.beta={beta}")
        swept: list[str | None] = [*values] if key and _knows(known[name], key) else [None]
        for value in swept:
            own_value = [] if value is None else [f"{key}={value}"]
            label = name if value is None else f"{name}, {str(key).rpartition('.')[2]} {value}"
            for seed in seeds:
                chosen = load_recipe(recipe, [*changes, *own_value, f"train.seed={seed}"], trust=trust)
                folder = "/".join([name, *(part.replace("/", "_") for part in own_value), f"seed{seed}"])
                entries.append(Entry(label, name, value, seed, folder, chosen))
    return entries


def _knows(known: Sequence[str], override: str) -> bool:
    """True where an algorithm knows the setting of an override; those of other sections concern every algorithm."""
    section, _, setting = override.partition("=")[0].partition(".")
    return section != "algorithm" or setting.partition(".")[0] in known


def _as_written(recipe: str, overrides: Sequence[str], trust: bool | None) -> Recipe:
    """The recipe with its own algorithm and the overrides that this one knows."""
    others = [text for text in overrides if not text.startswith("algorithm.")]
    known = list(type(load_recipe(recipe, others, trust=trust).algorithm.config).model_fields)
    return load_recipe(recipe, [text for text in overrides if _knows(known, text)], trust=trust)


def compare(
    recipe: str,
    overrides: Sequence[str],
    algorithms: Sequence[str],
    seeds: Sequence[int],
    sweep: str | None,
    folder: Path,
    *,
    trust: bool | None = None,
) -> Values:
    """Runs what is not finished yet in `folder/ALGORITHM[/KEY=VALUE]/seedK`, writes comparison.json and the plots.

    These are reward.png, kl.png and so on: curves with bands of one standard error; frontiers of a sweep.
    """
    if folder.is_file() or (RunFolder(folder).exists and not (folder / "comparison.json").exists()):
        raise UserError(f"--output: {folder} is a {'file' if folder.is_file() else 'run'}; name another folder")
    entries = planned(recipe, overrides, algorithms, seeds, sweep, trust=trust)
    _try_each([entry for entry in entries if not RunFolder(folder / entry.folder).complete])
    runs = []
    for entry in entries:
        try:
            summary = run(entry.recipe, folder / entry.folder, resume=True, title=f"{entry.label}, seed {entry.seed}")
        except Interrupted as stop:
            raise Interrupted(f"{stop}; the same command with --output {folder} goes on") from stop
        if World.current().leads:
            write_card(folder / entry.folder, entry.recipe, summary)
        runs.append({key: value for key, value in vars(entry).items() if key != "recipe"} | {"summary": summary})
    comparison = {
        "recipe": recipe,
        "overrides": list(overrides),
        "algorithms": list(algorithms),
        "seeds": list(seeds),
        "sweep": sweep,
        "runs": runs,
        "groups": grouped(runs),
    }
    if not World.current().leads:
        return comparison
    write_whole(folder / "comparison.json", json.dumps(finite(comparison), indent=2, allow_nan=False) + "\n")
    for name, figure in (comparison_figures(comparison, folder) | frontier_figures(comparison)).items():
        with whole(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=110)
    return comparison


def fault_of(comparison: Values, folder: Path) -> str | None:
    """Fault of a comparison, None without one: a run that learned nothing, or two that are equal to the digit.

    >>> runs = [{"folder": name, "summary": {"reward_tuned": 1.25, "seconds": len(name)}} for name in ("a", "b2")]
    >>> fault_of({"runs": runs}, Path("nowhere"))
    'a and b2: their tuned models are equal to the digit; what tells these runs apart has no effect'
    """
    seen: dict[str, str] = {}
    for record in comparison["runs"]:
        if learned_nothing(folder / record["folder"]):
            return f"{record['folder']}: no iteration learned anything: {NOTHING}"
        tuned = json.dumps({key: value for key, value in record["summary"].items() if key.endswith("_tuned")})
        if tuned in seen:
            both = f"{seen[tuned]} and {record['folder']}"
            return f"{both}: their tuned models are equal to the digit; what tells these runs apart has no effect"
        seen[tuned] = record["folder"]
    return None


def _try_each(entries: Sequence[Entry]) -> None:
    """Builds one run of each label and drops it: parts that do not fit are refused before the first of several begins."""
    first = {entry.label: entry for entry in reversed(entries)}
    for entry in reversed(first.values()) if len(first) > 1 else ():
        try:
            build(entry.recipe)
        except UserError as error:
            raise UserError(f"{error} (in {entry.label})") from error


def grouped(runs: Sequence[Values]) -> list[Values]:
    """Mean and standard error (null for one seed) of every figure, for each label.

    The error is that over seeds and, where a run has it (`NAME_se`), that of the measurement: all seeds are measured on the
    same noise, which no number of them averages out. A figure that one of the seeds has not, as one that diverged, is left
    out: the mean of the others would hide it.

    >>> of = {"label": "a", "algorithm": "a", "value": None}
    >>> runs = [{**of, "summary": {"x": 1.0, "y": 1.0}}, {**of, "summary": {"x": 3.0, "y": None}}]
    >>> grouped(runs)[0]["mean"], grouped(runs)[0]["standard_error"]
    ({'x': 2.0}, {'x': 1.0})
    >>> runs = [{**of, "summary": {"x": x, "x_se": 0.75}} for x in (1.0, 3.0)]
    >>> grouped(runs)[0]["standard_error"]["x"]
    1.25
    """
    groups = []
    for label in dict.fromkeys(record["label"] for record in runs):
        records = [record for record in runs if record["label"] == label]
        columns = _columns([record["summary"] for record in records])
        groups.append(
            {
                "label": label,
                "algorithm": records[0]["algorithm"],
                "value": records[0]["value"],
                "n": len(records),
                "mean": {key: sum(column) / len(column) for key, column in columns.items()},
                "standard_error": {key: _error(column, columns.get(f"{key}_se")) for key, column in columns.items()},
            }
        )
    return groups


def _error(column: Sequence[float], measured: Sequence[float] | None) -> float | None:
    """The standard error of a mean over seeds, of whose values each has that of its measurement."""
    if len(column) < 2:
        return None
    return math.hypot(stdev(column) / math.sqrt(len(column)), math.sqrt(fmean(e**2 for e in measured)) if measured else 0.0)


def _columns(summaries: Sequence[Values]) -> dict[str, list[float]]:
    """The values of every figure that all of these runs have as a number."""
    known = [{key: float(value) for key, value in summary.items() if isinstance(value, int | float)} for summary in summaries]
    return {key: [each[key] for each in known] for key in known[0] if all(key in each for each in known)}
