"""The command `scoreaction`: train, plan, doctor, pretrain, distill, pairs, sample, steer, evaluate, list and others.

Exit codes: 0 done; 2 the input is wrong; 1 it failed; 130 interrupted. Whatever goes wrong is one line on stderr; `--debug`
shows the traceback.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from scoreaction.catalog import TOKEN_VARIABLE
from scoreaction.commands.arguments import (
    BetaOption,
    Overrides,
    ParticlesOption,
    RecipeName,
    RunPath,
    SteerMethod,
    SteerOption,
    TargetOption,
    Trust,
    default_folder,
    names,
    numbers,
    output_option,
)  # fmt: skip
from scoreaction.commands.exits import exit_of, said_by_the_first
from scoreaction.commands.streams import forgive
from scoreaction.errors import Failed, Interrupted, UserError, one_line

# Commands import what they need themselves, so that --help and list answer at once.

app = typer.Typer(
    name="scoreaction",
    help="Fine-tune diffusion and flow models with reinforcement learning in continuous time.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show_version(wanted: bool) -> None:
    """Prints the version and ends."""
    if wanted:
        print(f"scoreaction {version('scoreaction')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=show_version, help="Show the version.")] = False,
) -> None:
    """`--debug` is taken off by `main`, wherever it stands."""


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path | None, output_option("Run folder; default runs/RECIPE-ALGORITHM-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine, one a GPU; more by torchrun.")] = 1,
    trust: Trust = False,
) -> int:
    """Fine-tune a model by a recipe."""
    print(f"{Path(recipe).stem}  loading", flush=True)  # torch alone takes seconds
    from scoreaction.commands.launch import launch
    from scoreaction.commands.tables import show_summary
    from scoreaction.commands.train import NOTHING, learned_nothing, run
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.recipes.trust import named_modules
    from scoreaction.report.model_card import write_card
    from scoreaction.report.verdict import run_verdict
    from scoreaction.world import World

    chosen = load_recipe(recipe, overrides or [], trust=trust or None)
    if resume and output is None:
        raise UserError("--resume: say which run with --output DIR")
    folder = output or default_folder(recipe, chosen.algorithm.name)
    if processes > 1:
        options = ["--output", str(folder), *(["--resume"] if resume else []), *(["--trust"] if trust else [])]
        return launch(processes, ["train", recipe, *(overrides or []), *options])
    try:
        figures = run(chosen, folder, resume=resume)
    except Interrupted as stop:
        more = ["--trust"] if named_modules(chosen.values()) else []
        again = shlex.join(["scoreaction", "train", str(folder / "recipe.yaml"), "--output", str(folder), "--resume", *more])
        raise Interrupted(f"{stop}; go on with: {again}") from stop
    if not World.current().leads:
        return 0
    write_card(folder, chosen, figures)
    show_summary(figures)
    print(f"verdict: {run_verdict(figures)}")
    print(f"run: {folder}")
    if learned_nothing(folder):
        raise Failed(f"{folder}: no iteration learned anything: {NOTHING}")
    return 0


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or the folder of a run.")],
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a run: evaluations of its student a sample; default 4.")] = None,
    output: Annotated[Path | None, output_option("Folder; default runs/RECIPE-consistency-TIME, of a run RUN-student.")] = None,
    trust: Trust = False,
) -> None:
    """Make a consistency model of a recipe's model, or a few-step student of a run's tuned one."""
    if Path(recipe).is_dir():
        from scoreaction.commands.students import distill_run
        from scoreaction.commands.tables import show_student

        place = output or Path(recipe).with_name(f"{Path(recipe).resolve().name}-student")
        show_student(distill_run(Path(recipe), place, steps=steps, overrides=overrides or [], trust=trust))
        print(f"student: {place}")
        return
    if steps is not None:
        raise UserError("--steps: is of students, which are made of a run; give its folder")
    from scoreaction.commands.distill import distill_recipe
    from scoreaction.commands.tables import show_endpoint_errors
    from scoreaction.recipes.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or [], trust=trust or None)
    folder = output or default_folder(recipe, "consistency")
    show_endpoint_errors(distill_recipe(chosen, folder))
    print(f"consistency: {folder}")


@app.command()
def pairs(
    recipe: RecipeName,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Number of pairs: twice as many rewards.")] = 1000,
    temperature: Annotated[
        float, typer.Option(help="T of the chance sigmoid((r1 - r2)/T) that a sample wins; 0: the better always does.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of noise and labels.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="An .npz; default runs/RECIPE-pairs-TIME.npz.")] = None,
    trust: Trust = False,
) -> None:
    """Draw pairs of a recipe's pretrained model and label them by its reward: data for dpo."""
    from scoreaction.commands.pairs import lines_of, make_pairs
    from scoreaction.recipes.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or [], trust=trust or None)
    path = output or default_folder(recipe, "pairs").with_suffix(".npz")
    print(lines_of(make_pairs(chosen, path, n=n, temperature=temperature, seed=seed), temperature))
    print(f"pairs: {path}")


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, output_option("Folder; default the recipe's model.path, else runs/RECIPE-pretrained-TIME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")] = False,
) -> None:
    """Make a small diffusion model of your own table or pictures, by a recipe's section pretrain."""
    print(f"{Path(recipe).stem}  loading", flush=True)
    from scoreaction.commands.pretrain import pretrain as run_pretrain
    from scoreaction.commands.tables import show_pretrained
    from scoreaction.recipes.pretraining import pretraining

    settings, place = pretraining(recipe, overrides or [])
    folder = output or place
    if resume and folder is None:
        raise UserError("--resume: say which folder with --output DIR")
    folder = folder or default_folder(recipe, "pretrained")
    try:
        show_pretrained(run_pretrain(settings, folder, resume=resume))
    except Interrupted as stop:
        again = shlex.join(["scoreaction", "pretrain", recipe, *(overrides or []), "--output", str(folder), "--resume"])
        raise Interrupted(f"{stop}; go on with: {again}") from stop
    print(f"pretrained: {folder} (model: {{name: pretrained, path: {folder}}})")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the work, one a GPU.")] = 1,
    trust: Trust = False,
) -> None:
    """Estimate the needs of a recipe before it is started: parameters, memory, network evaluations, time."""
    from scoreaction.commands.plan import plan as planned
    from scoreaction.commands.tables import show_plan
    from scoreaction.recipes.recipe import load_recipe

    show_plan(planned(load_recipe(recipe, overrides or [], trust=trust or None), processes))


@app.command()
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


@app.command("steer")
def steer_(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe, or the folder of a run.")],
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
    print(f"{Path(recipe).stem}  loading", flush=True)
    from scoreaction.commands.evaluate import open_run
    from scoreaction.commands.steer import alone_or_whole, check_overrides, chosen_steering, costs, steer_run
    from scoreaction.commands.tables import show_steered
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    base = not Path(recipe).is_dir()
    if base:
        chosen = alone_or_whole(load_recipe(recipe, overrides or [], trust=trust or None))
        tuner = build(chosen.model_copy(update={"steer": None}))
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


@app.command()
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


@app.command()
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


@app.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A reward (see: list rewards) or your module's dotted path.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its settings, for example path=FOLDER")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; other machines reach any but a loopback one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN_VARIABLE, help="Secret that clients must send; better set in the environment.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    max_images: Annotated[int, typer.Option(min=1, help="Samples of one question.")] = 256,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Size of one question.")] = 256,
) -> None:
    """Serve a reward over HTTP, for the reward `http` of a run elsewhere. Ctrl-C ends it."""
    from scoreaction.commands.serve_reward import open_server, serve, service_of
    from scoreaction.recipes.build import build_reward

    reward = build_reward(name, overrides or [])
    service = service_of(name, reward, device=device, token=token, max_images=max_images, max_bytes=max_megabytes * 2**20)
    server = open_server(service, host, port)
    print(f"serving {name} at {server.url} (POST /score, GET /health)", flush=True)
    serve(server)
    print("stopped")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_COMPARISON", help="The folder of a run or of a comparison.")],
) -> None:
    """Write one self-contained HTML page about a run or a comparison."""
    from scoreaction.report.page import write_report

    print(f"report: {write_report(folder)}")


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where runs are looked for, however deep.")] = Path("runs"),
) -> None:
    """List the runs below a folder: what they train, how far they are, and how good."""
    from scoreaction.commands.runs import runs_below
    from scoreaction.commands.tables import show_runs

    show_runs(runs_below(folder))


@app.command()
def watch(run: RunPath) -> None:
    """Follow a run while it goes on, from wherever its folder can be read. Ends with the run, or by Ctrl-C."""
    from scoreaction.commands.runs import follow

    for line in follow(run):
        print(line, flush=True)


@app.command()
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


@app.command("list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="algorithms, rewards, models, solvers, recipes or settings; default all.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One of them, to see its keys: list algorithms ddpo")] = None,
) -> None:
    """List algorithms, rewards, models, solvers, recipes and settings; with a name, its keys."""
    from scoreaction.commands.listing import details, overview

    print(details(what, name) if what is not None and name is not None else overview(what))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors are one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    forgive("stdout")
    forgive("stderr")
    if os.environ.get("RANK", "0") != "0":  # of several processes the first speaks
        sys.stdout = io.StringIO()
    try:
        command = typer.main.get_command(app)
        result = command.main([a for a in arguments if a != "--debug"], prog_name="scoreaction", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if debug:
            traceback.print_exc()
        code, message = exit_of(error)
        if not said_by_the_first(error):
            print(one_line(message), file=sys.stderr)
        return code
