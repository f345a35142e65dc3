"""Arguments that commands share: recipes, runs, folders, and lists in one text."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from scoreaction import catalog
from scoreaction.catalog import TOKEN_VARIABLE
from scoreaction.errors import UserError, nearest


def folder_named(text: str | Path) -> Path:
    """A folder that may not be there yet; a default comes as a path."""
    if not text:
        raise typer.BadParameter("is empty; name a folder.")
    return Path(whole_name(str(text)))


def whole_name(text: str) -> str:
    """A name that a file can have: one without a null character."""
    if "\0" in text:
        raise typer.BadParameter("has a null character in it; choose another name.")
    return text


def recipe_named(text: str) -> str:
    """A recipe's name or path, or the folder of a run."""
    if not text:
        raise typer.BadParameter("is empty; give a name or a path.")
    return whole_name(text)


def is_run(text: str) -> bool:
    """True for the folder of a run, False for a shipped recipe (also beside a folder of its name) or a file.

    UserError for what is none of them.
    """
    if text in catalog.recipes() or os.path.isfile(text):
        return False
    if os.path.isdir(text):
        return True
    hint = nearest(text, catalog.recipes())
    if not hint.startswith("did you mean"):
        hint = "give the folder of a run, a shipped recipe (see: list recipes) or a file"
    raise UserError(f"{text}: no such run, and no such recipe; {hint}")


def output_option(text: str) -> Any:
    """The option --output; the text is its help."""
    return typer.Option(parser=folder_named, metavar="DIR", help=text)


RecipeName = Annotated[
    str, typer.Argument(parser=recipe_named, metavar="RECIPE", help="A shipped recipe (see: list recipes) or a YAML file.")
]
RecipeOrRun = Annotated[
    str, typer.Argument(parser=recipe_named, metavar="RECIPE_OR_RUN", help="A recipe, or the folder of a run.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For example algorithm.beta=0.2")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import the modules that a recipe or run from elsewhere names; their code then runs.")
]
RunPath = Annotated[Path, typer.Argument(parser=folder_named, metavar="RUN", help="The folder of a run.")]

SteerMethod = Annotated[
    str | None, typer.Option(metavar="METHOD", help="twisted, smc, svdd, guidance or best_of; default the recipe's, else auto.")
]
SteerOption = Annotated[
    str | None, typer.Option(metavar="METHOD", help="Steer by the reward: twisted, smc, svdd, guidance, best_of or auto.")
]
ParticlesOption = Annotated[int | None, typer.Option(min=1, help="Particles of steering a sample; default 16.")]
BetaOption = Annotated[float | None, typer.Option(help="Beta of steering; default the algorithm's.")]
TargetOption = Annotated[
    str | None, typer.Option(metavar="LAW", help="Law to steer: model, or reference with smc, which corrects a tuned model.")
]

Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its settings, for example path=FOLDER")]
Host = Annotated[str, typer.Option(help="Address to listen at; other machines reach any but a loopback one.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
Token = Annotated[
    str | None, typer.Option(envvar=TOKEN_VARIABLE, help="Secret that clients must send; better set in the environment.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
MaxImages = Annotated[int, typer.Option(min=1, help="Samples of one question.")]
MaxMegabytes = Annotated[int, typer.Option(min=1, help="Size of one question.")]


def default_folder(recipe: str, what: str) -> Path:
    """runs/RECIPE-WHAT-TIME, to the millisecond: runs that a loop starts together are apart."""
    now = datetime.now()
    return Path("runs") / f"{Path(recipe).stem}-{what.replace('.', '_')}-{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}"


def names(text: str, option: str) -> list[str]:
    """`a,b` to a list without repeats."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UserError(f"{option}: name at least one")
    return parts


def numbers(text: str, kind: type[int] | type[float], option: str) -> list[Any]:
    """`0,1` to a list of numbers."""
    try:
        return [kind(part) for part in names(text, option)]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option}: must be {what} with commas between them (got {text!r})") from error
