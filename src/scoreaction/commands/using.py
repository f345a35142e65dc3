"""Commands that use what there is: draw, steer, measure, compare, serve, report, watch, examine and list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from scoreaction.commands.arguments import (
    BetaOption,
    Device,
    Host,
    MaxImages,
    MaxMegabytes,
    Overrides,
    ParticlesOption,
    Port,
    RecipeName,
    RecipeOrRun,
    RunPath,
    Settings,
    SteerMethod,
    SteerOption,
    TargetOption,
    Token,
    Trust,
    default_folder,
    folder_named,
    is_run,
    names,
    numbers,
    output_option,
)  # fmt: skip
from scoreaction.errors import Failed

# Commands import what they need themselves, so that --help and list answer at once.

using = typer.Typer()


@using.command()
def sample(
    run: RunPath,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of samples.")] = 64,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; give several by several options; default the run's own.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default that of the evaluation.")] = None,
    solver: Annotated[str | None, typer.Option(help="See: list solvers.")] = None,
    eta: Annotated[float | None, typer.Option(help="Noise level from 0 (ODE) to 1.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="The pretrained model instead of the tuned one.")] = False,
    steer: SteerOption = None,
    particles: ParticlesOption = None,
    beta: BetaOption = None,
    target: TargetOption = None,
    output: Annotated[Path | None, output_option("Folder for samples.npz and samples.png; default RUN.")] = None,
    trust: Trust = False,
) -> None:
    """Draw from the tuned model: samples.npz and samples.png."""
    from scoreaction.commands.evaluate import draw_samples, open_run
    from scoreaction.commands.steer import costs, steering_of

    opened = open_run(run, tuned=not base, rewards=steer is not None, trust=trust)
    steering = steering_of(opened.recipe, steer, particles, beta, target)
    settings: Any = {"n": n, "prompts": prompt, "steps": steps, "solver": solver, "eta": eta, "seed": seed, "base": base}
    where, figures = draw_samples(opened, output or run, **settings, steering=steering)
    if figures:
        print(costs(figures))
    print(f"samples: {where}")


@using.command("steer")
def steer_(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    method: SteerMethod = None,
    particles: ParticlesOption = None,
    beta: BetaOption = None,
    target: TargetOption = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Samples; default the evaluation's number by particles.")] = None,
    output: Annotated[Path | None, output_option("Folder; default runs/RECIPE-steered-TIME, of a run RUN/steered.")] = None,
    trust: Trust = False,
) -> None:
    """Draw samples of high reward without training: of a recipe's pretrained model, or of a run's tuned one."""
    base = not is_run(recipe)
    print(f"{Path(recipe).stem}  loading", flush=True)
    from scoreaction.commands.evaluate import open_run
    from scoreaction.commands.steer import alone_or_whole, check_overrides, chosen_steering, costs, steer_run
    from scoreaction.commands.tables import show_steered
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    if base:
        chosen = alone_or_whole(load_recipe(recipe, overrides or [], trust=trust or None))
        tuner = build(chosen.model_copy(update={"steer": None}), learns=False)
    else:
        check_overrides(overrides or [])
        opened = open_run(Path(recipe), tuned=True, trust=trust, overrides=overrides or [])
        chosen, tuner = opened.recipe, opened.tuner
    steering = chosen_steering(chosen.steer, method=method, particles=particles, beta=beta, target=target)
    folder = output or (default_folder(recipe, "steered") if base else Path(recipe) / "steered")
    figures = steer_run(chosen, tuner, folder, steering, n=n, base=base)
    show_steered(figures)
    print(costs(figures))
    print(f"steered: {folder}")


@using.command()
def evaluate(
    run: RunPath,
    steps: Annotated[str, typer.Option(help="Step counts, for example 10,25,50.")] = "10,25,50",
    solver: Annotated[str, typer.Option(help="Solvers, for example ddim,heun.")] = "ddim",
    eta: Annotated[
        str | None, typer.Option(help="Noise levels, for example 0,1. [default: 1; of a policy that moves the noise 0]")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=2, help="Samples each; default the recipe's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the noise; default the recipe's.")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(help="A shipped set, a file, or `run` for the run's own; may be repeated.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Also the pretrained model, beside the tuned.")] = False,
    steer: SteerOption = None,
    particles: ParticlesOption = None,
    beta: BetaOption = None,
    target: TargetOption = None,
    certificate: Annotated[bool, typer.Option("--certificate", help="Also gap_nats, the nats to the optimum.")] = False,
    trust: Trust = False,
) -> None:
    """Reward, held-out rewards, KL and diversity over a grid of samplers: evaluation.json."""
    from scoreaction.commands.evaluate import OWN, evaluate_grid, open_run
    from scoreaction.commands.steer import steering_of
    from scoreaction.commands.tables import show_grid

    counts, solvers, etas = numbers(steps, int, "--steps"), names(solver, "--solver"), numbers(eta or "1", float, "--eta")
    opened = open_run(run, tuned=True, trust=trust)
    if eta is None and opened.tuner.model.moves_noise:
        etas = [0.0]
    steering = steering_of(opened.recipe, steer, particles, beta, target)
    sets = prompts or [OWN]
    options: Any = {"n": n, "seed": seed, "prompts": sets, "base": base, "steering": steering, "certified": certificate}
    show_grid(evaluate_grid(opened, counts, solvers, etas, **options))
    print(f"evaluation: {run / 'evaluation.json'}")


@using.command()
def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    algorithms: Annotated[str, typer.Option(help="For example score_action,ddpo.")] = ...,  # type: ignore[assignment]
    seeds: Annotated[str, typer.Option(help="For example 0,1,2.")] = "0",
    sweep: Annotated[str | None, typer.Option(help="For example algorithm.beta=0.1,0.3.")] = None,
    output: Annotated[Path | None, output_option("Folder; keeps runs that it has; default runs/RECIPE-NAMES-TIME.")] = None,
    trust: Trust = False,
) -> None:
    """Run algorithms with the same budget: comparison.json, plots and a report."""
    from scoreaction.commands.compare import compare as run_all
    from scoreaction.commands.compare import fault_of
    from scoreaction.commands.tables import show_comparison
    from scoreaction.report.page import write_report
    from scoreaction.report.verdict import comparison_verdict
    from scoreaction.world import World

    chosen = names(algorithms, "--algorithms")
    folder = output or default_folder(recipe, "-".join(chosen))
    several = numbers(seeds, int, "--seeds")
    comparison = run_all(recipe, overrides or [], chosen, several, sweep, folder, trust=trust or None)
    show_comparison(comparison)
    print(f"verdict: {comparison_verdict(comparison)}")
    print(f"comparison: {folder}")
    if World.current().leads:
        print(f"report: {write_report(folder)}")
    if fault := fault_of(comparison, folder):
        raise Failed(fault)


@using.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward (see: list rewards) or your module's dotted path.")],
    overrides: Settings = None,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token: Token = None,
    device: Device = "auto",
    max_images: MaxImages = 256,
    max_megabytes: MaxMegabytes = 256,
) -> None:
    """Serve a reward over HTTP, for the reward `http` of a run elsewhere. Ctrl-C ends it."""
    from scoreaction.commands.serve_reward import serve_at, service_of
    from scoreaction.recipes.build import build_reward

    reward, limits = build_reward(name, overrides or []), {"max_images": max_images, "max_bytes": max_megabytes * 2**20}
    serve_at(host, port, service_of(name, reward, device=device, token=token, **limits))


@using.command("serve-writer")
def serve_writer(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Your module's dotted path: its build gives the writer.")],
    overrides: Settings = None,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    token: Token = None,
    device: Device = "auto",
    max_images: MaxImages = 256,
    max_megabytes: MaxMegabytes = 256,
) -> None:
    """Serve a writer of prompts over HTTP, for `algorithm.writer` of prompt_loop elsewhere. Ctrl-C ends it."""
    from scoreaction.commands.serve_reward import serve_at, serviced
    from scoreaction.commands.served import Texts
    from scoreaction.recipes.build import build_writer

    written, limits = build_writer(name, overrides or []), {"max_images": max_images, "max_bytes": max_megabytes * 2**20}
    serve_at(host, port, serviced(Texts(name, written), device=device, token=token, **limits))


@using.command()
def report(
    folder: Annotated[
        Path, typer.Argument(parser=folder_named, metavar="RUN_OR_COMPARISON", help="The folder of a run or of a comparison.")
    ],
) -> None:
    """Write one self-contained HTML page about a run or a comparison."""
    from scoreaction.report.page import write_report

    print(f"report: {write_report(folder)}")


@using.command()
def runs(
    folder: Annotated[
        Path, typer.Argument(parser=folder_named, metavar="FOLDER", help="Where runs are looked for, however deep.")
    ] = Path("runs"),
) -> None:
    """List the runs below a folder: what they train, how far they are, and how good."""
    from scoreaction.commands.runs import runs_below
    from scoreaction.commands.tables import show_runs

    show_runs(runs_below(folder))


@using.command()
def watch(run: RunPath) -> None:
    """Follow a run while it goes on, from wherever its folder can be read. Ends with the run, or by Ctrl-C."""
    from scoreaction.commands.runs import follow

    for line in follow(run):
        print(line, flush=True)


@using.command()
def doctor(
    recipe: RecipeName,
    overrides: Overrides = None,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations to train for.")] = 3,
    trust: Trust = False,
) -> None:
    """Check model, reward and a few iterations for known mistakes. Writes nothing; exits 1 where something is wrong."""
    from scoreaction.commands.doctor.checkup import examine
    from scoreaction.commands.tables import show_findings
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    wrong = show_findings(examine(build(load_recipe(recipe, overrides or [], trust=trust or None)), iterations))
    if wrong:
        raise Failed(f"checks that found something wrong: {wrong}")


@using.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="algorithms, rewards, models, solvers, recipes or settings; default all.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, to see its keys: list algorithms ddpo")] = None,
) -> None:
    """List algorithms, rewards, models, solvers, recipes and settings; with a name, its keys."""
    from scoreaction.commands.listing import details, overview

    print(details(what, name) if what is not None and name is not None else overview(what))
