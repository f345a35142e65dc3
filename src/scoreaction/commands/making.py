"""Commands that make something of a recipe: a run, a student or consistency model, pairs, a network, a plan."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from scoreaction.commands.arguments import (
    Overrides,
    RecipeName,
    RecipeOrRun,
    Trust,
    default_folder,
    is_run,
    output_option,
)  # fmt: skip
from scoreaction.errors import Failed, Interrupted, UserError

# Commands import what they need themselves, so that --help and list answer at once.

making = typer.Typer()


@making.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path | None, output_option("Run folder; default runs/RECIPE-ALGORITHM-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine, one a GPU; more by torchrun.")] = 1,
    trust: Trust = False,
) -> int:
    """Fine-tune a model by a recipe."""
    step = "loading" if processes == 1 else f"starting {processes} processes"
    print(f"{Path(recipe).stem}  {step}", flush=True)  # torch alone takes seconds
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
        size = World.current().size
        more += ["--processes", str(size)] if size > 1 and os.environ.get("LOCAL_WORLD_SIZE") == str(size) else []
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


@making.command()
def distill(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a run: evaluations of its student a sample; default 4.")] = None,
    output: Annotated[Path | None, output_option("Folder; default runs/RECIPE-consistency-TIME, of a run RUN-student.")] = None,
    trust: Trust = False,
) -> None:
    """Make a consistency model of a recipe's model, or a few-step student of a run's tuned one."""
    if is_run(recipe):
        from scoreaction.commands.students import distill_run
        from scoreaction.commands.tables import show_student

        path = Path(recipe) if Path(recipe).name else Path.cwd()
        place = output or path.with_name(f"{path.resolve().name}-student")
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


@making.command()
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


@making.command()
def cluster(
    recipe: RecipeName,
    overrides: Overrides = None,
    k: Annotated[int, typer.Option("--k", min=2, help="Number of clusters.")] = 10,
    n: Annotated[int, typer.Option("--n", min=2, help="Samples of the model to draw.")] = 2000,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Cluster these samples, an .npz, .jsonl or folder, not the model's own.")
    ] = None,
    method: Annotated[str, typer.Option(help="kmeans, or sinkhorn for clusters of equal shares.")] = "kmeans",
    features: Annotated[
        str, typer.Option(help="samples, as they are; model, its features; net, a module of its network.")
    ] = "samples",
    at: Annotated[str | None, typer.Option(metavar="MODULE", help="Of features net: the module whose output is taken.")] = None,
    time: Annotated[float, typer.Option(help="Of features net: time at which the network is asked.")] = 0.05,
    noises: Annotated[int, typer.Option(min=1, help="Of features net: draws of noise that are averaged.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of samples and clusters.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="An .npz; default runs/RECIPE-clusters-TIME.npz.")] = None,
    trust: Trust = False,
) -> None:
    """Cluster samples of a recipe's pretrained model, or data: labels, coverage, keep_clusters."""
    from scoreaction.commands.cluster import Source, find_clusters, lines_of
    from scoreaction.recipes.recipe import load_recipe

    chosen = load_recipe(recipe, overrides or [], trust=trust or None)
    path = output or default_folder(recipe, "clusters").with_suffix(".npz")
    source = Source(n=n, data=data, features=features, at=at, time=time, noises=noises)
    print(lines_of(find_clusters(chosen, path, source, k=k, method=method, seed=seed, title=Path(recipe).stem)))
    print(f"clusters: {path}")


@making.command()
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


@making.command()
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
