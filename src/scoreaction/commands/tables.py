"""The tables that commands print."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from scoreaction.commands.doctor.finding import Finding
from scoreaction.commands._way_out import CARD
from scoreaction.report.numbers import before_and_after, comparison_rows, limit_of_policy, number, steered_rows, with_error
from scoreaction.types import Values


def _console() -> Console:
    """A console wide enough that figures are not cut where the output is a file."""
    return Console(width=max(shutil.get_terminal_size().columns, 120), highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    """A table whose numbers stand on the right; a column without a name holds texts."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def show_summary(figures: Values) -> None:
    """Base and tuned side by side, and what it took."""
    table = _table("before and after fine-tuning", "", "base", "tuned")
    for key, base, tuned in before_and_after(figures):
        table.add_row(key.replace("_", " "), base, tuned)
    table.add_row("KL (nats)", "0", with_error(figures.get("kl_nats"), figures.get("kl_nats_se")))
    if "distance_to_optimum" in figures:
        table.add_row("optimum's reward, KL", "", f"{number(figures['optimum_reward'])}, {number(figures['optimum_kl_nats'])}")
        floor, oracle = number(figures["distance_floor"]), number(figures["distance_oracle"])
        away = with_error(figures["distance_to_optimum"], figures.get("distance_to_optimum_se"))
        table.add_row(f"distance to the optimum (floor {floor}, oracle {oracle})", "", away)
    if "optimum_cluster_entropy" in figures:
        table.add_row("optimum's cluster entropy", "", number(figures["optimum_cluster_entropy"]))
    if "gap_nats" in figures:
        table.add_row("gap to the optimum (nats)", "", with_error(figures["gap_nats"], figures["gap_nats_se"]))
    if "reward_steered" in figures:
        table.add_row("reward, tuned and steered", "", with_error(figures["reward_steered"], figures["reward_steered_se"]))
    for key, name in (("reward_queries", "reward queries"), ("model_evaluations", "model evaluations"), ("seconds", "seconds")):
        table.add_row(name, "", number(figures.get(key)))
    _console().print(table)


def show_steered(figures: Values) -> None:
    """The model as it is and steered side by side."""
    kind = "base" if "reward_base" in figures else "tuned"
    beta = "" if figures["beta"] is None else f" at beta {number(figures['beta'])}"
    table = _table(f"{figures['method']}{beta}, {figures['n_steered']} samples", "", kind, "steered")
    for key, *cells in steered_rows(figures):
        table.add_row(key, *cells)
    _console().print(table)


def show_endpoint_errors(errors: Values) -> None:
    """Error of a consistency model against the end of the ODE, by time, beside that of the posterior mean it began as."""
    table = _table("root mean square error against the end of the ODE", "t", "consistency", "tweedie")
    for t, ours, tweedie in zip(errors["t"], errors["consistency"], errors["tweedie"], strict=True):
        table.add_row(f"{t:.2f}", number(ours, 3), number(tweedie, 3))
    _console().print(table)


def show_student(figures: Values) -> None:
    """A student beside its teacher and plain solvers, one a row, and what it kept."""
    table = Table(title=f"{figures['steps']} steps")
    keys = [
        key
        for key in dict.fromkeys(key for row in figures["rows"] for key in row)
        if not key.endswith("_se") and key != "vendi"
    ]
    for key in keys:
        table.add_column(key.removeprefix("held_out.").replace("_", " "), justify="left" if key in TEXTS else "right")
    for row in figures["rows"]:
        table.add_row(*(with_error(row.get(key), row.get(f"{key}_se"), 3) for key in keys))
    _console().print(table)
    print(f"of the teacher's gain in reward kept: {number(figures['reward_kept'], 3)}")


def show_pretrained(figures: Values) -> None:
    """Quality of a pretrained network on data that it was never trained on."""
    table = _table("on data that was left out", "", "pretrained")
    table.add_row("error of v, as a share of its mean square", number(figures["held_out_loss"], 4))
    if "held_out_loss_density" in figures:
        table.add_row("the same by a kernel density (model from_data)", number(figures["held_out_loss_density"], 4))
    table.add_row("lowest at batch", f"{figures['batch']:,}")
    if "distance" in figures:
        floor = number(figures["distance_floor"], 3)
        table.add_row(f"distance of samples to these rows (of rows trained on {floor})", number(figures["distance"], 3))
    _console().print(table)


TEXTS = ("model", "solver", "prompts")


def show_grid(evaluation: Values) -> None:
    """The cells of an evaluation, one a row, and what was left out."""
    known = dict.fromkeys(key for row in evaluation["grid"] for key in row)
    keys = [key for key in known if not key.endswith("_se") and key not in ("vendi", "by_prompt", "by_cluster", "by_label")]
    table = Table(title=f"{evaluation['n']} samples each")
    for key in keys:
        header = key.removeprefix("held_out.").replace("_", " ")
        table.add_column(header, justify="left" if key in TEXTS else "right", no_wrap=key in TEXTS)
    for row in evaluation["grid"]:
        table.add_row(*(with_error(row.get(key), row.get(f"{key}_se"), 3) for key in keys))
    _console().print(table)
    for note in evaluation["skipped"]:
        print(f"left out: {note['why']}")


def show_comparison(comparison: Values) -> None:
    """A column for each algorithm (and value of the sweep), means over seeds with standard errors."""
    seeds = len(comparison["seeds"])
    title = f"mean ± standard error over {seeds} seed{'s' if seeds > 1 else ''}"
    table = _table(title, "", *(group["label"] for group in comparison["groups"]))
    for row in comparison_rows(comparison):
        table.add_row(*row)
    _console().print(table)


def show_runs(rows: list[Values]) -> None:
    """A line for each run."""
    table = Table()
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    _console().print(table)


def show_plan(figures: Values) -> None:
    """Needs of a run, and how the figures are computed."""
    _show_memory(figures)
    parts = ", ".join(f"{name} {number(count)}" for name, count in figures["parameters"].items())
    print(f"parameters: {parts}; trained {number(figures['trained'])}")
    if figures["off_below"]:
        print(f"sampling: {limit_of_policy(figures['off_below'])} (sampler.off_below)")
    _show_evaluations(figures)
    _show_time(figures)
    print(
        "how: layers are built without weights and run once; every tensor that is kept is counted, sampling at"
        f" {figures['rows']} rows at a time (train.max_rows). One iteration is run with networks that do nothing, to count"
        " evaluations and see which graphs are alive together. Scorers are counted by the weights that"
        " their files name (PARAMETERS); other rewards as none. Not counted: activations of the scorers, the critic,"
        " kernels' workspaces."
    )


GIB = 2**30


def _show_memory(figures: Values) -> None:
    """The table of a device's memory, whether a card holds it, and the computer's own memory."""
    processes = figures["processes"]
    table = _table("memory" if processes == 1 else f"memory of each of {processes} processes", "", "GiB")
    for name, size in figures["resident"].items():
        table.add_row(f"+ {name}", f"{size / GIB:.2f}")
    table.add_row("+ CUDA and its allocator", "2.00", end_section=True)
    for name, size in figures["passes"].items():
        if size:
            table.add_row(f"{'+' if name == figures['worst'] else ' '} {name}", f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("in all, the largest only of what is done one after the other", f"{figures['total'] / GIB:.1f}")
    _console().print(table)
    fits = figures["total"] <= CARD
    if fits or figures["way_out"] is None:
        print(f"fits 24 GiB: {'yes' if fits else f'no; {_remedies(figures)}'}")
    else:
        settings, total = figures["way_out"]
        print(f"fits 24 GiB: no; with these settings it does, in {total / GIB:.1f} GiB: {' '.join(settings)}")
    if figures["prompts"]:
        size = figures["prompts"] * figures["prompt_bytes"]
        fewer = "" if size < 8 * GIB else "; take fewer prompts where it has less"
        each = "" if processes == 1 else " of each process"
        print(f"the computer's own memory: {size / GIB:.2f} GiB for {number(figures['prompts'])} encoded prompts{each}{fewer}")


def _show_evaluations(figures: Values) -> None:
    """Network evaluations and rewards: of an iteration, in all, and of an online run's rounds."""
    once, whole = figures["iteration"], figures["iterations"]
    rows, queries = once["model_evaluations"], once["reward_queries"]
    print(
        f"an iteration: {number(rows)} network evaluations, {number(once['model_backward_rows'])} of them with gradient,"
        f" {number(figures['pictures'])} samples decoded, {number(queries)} rewards"
    )
    print(
        f"in all: {whole} iterations, {number(rows * whole)} network evaluations, {number(queries * whole)} rewards;"
        f" measuring at the end {number(figures['measuring'])} evaluations, {number(figures['measuring_queries'])} rewards more"
    )
    if figures["rounds"]:
        print(
            f"online: training follows a proxy; the rounds ask the reward {number(figures['rounds'])} times and take"
            f" {number(figures['rounds_evaluations'])} evaluations: {number(figures['rounds'] + figures['measuring_queries'])}"
            " questions with measuring, the least online.budget"
        )


NO_TIME = 0.01
"""Hours of a fast GPU, below which a run's time is that of everything but its operations."""


def _show_time(figures: Values) -> None:
    """Operations and hours, and of several processes what they draw and send; none where operations are not what takes time."""
    processes = figures["processes"]
    if figures["hours"] < NO_TIME:
        print(
            "time: not estimated, for the networks are so small that all else takes longer; scoreaction doctor times iterations"
        )
        return
    print(
        f"time: {figures['flops'] / 1e15:.3g} PFLOP an iteration, {figures['measuring_flops'] / 1e15:.3g} for measuring;"
        f" {figures['hours']:.2g} hours in all at 50 TFLOP/s{' a process' if processes > 1 else ''}, without the scorers' own"
    )
    if processes > 1:
        print(
            f"{processes} processes: {number(round(figures['pictures_a_day']))} samples a day at that speed; each sends"
            f" the others {figures['gradient_bytes'] / 2**20:.1f} MiB of gradient an update, and never a trajectory"
        )


def _remedies(figures: Values) -> str:
    """Remedies for a run that does not fit; first the scorers, which cost the training nothing."""
    remedies = ["lower train.max_rows, train.batch or sampler.steps, or take a LoRA, bf16 and gradient checkpointing"]
    if any(name.startswith("scorers") for name in figures["resident"]):
        remedies.insert(0, "give scorers dtype: bf16, or leave held-out ones to a server (serve-reward, http)")
    return "; ".join(remedies)


def show_findings(findings: Iterator[Finding]) -> int:
    """Each finding as it comes, with what to do about it; gives how many are wrong."""
    console, counts = _console(), {"ok": 0, "note": 0, "wrong": 0}
    colours = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    for finding in findings:
        counts[finding.verdict] += 1
        console.print(Text.assemble((f"{finding.verdict:6}", colours[finding.verdict]), f"{finding.check}: {finding.seen}"))
        if finding.remedy:
            console.print(Text(f"        {finding.remedy}", "dim"))
    console.print(f"{counts['ok']} ok, {counts['note']} to note, {counts['wrong']} wrong")
    return counts["wrong"]
