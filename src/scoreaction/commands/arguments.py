"""Arguments that commands share: recipes, runs, folders, and lists in one text."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from scoreaction.errors import UserError


def folder_named(text: str) -> Path:
    """A folder that may not be there yet."""
    if not text:
        raise typer.BadParameter("is empty; name a folder.")
    return Path(text)


def output_option(text: str) -> Any:
    """The option --output; the text is its help."""
    return typer.Option(parser=folder_named, metavar="DIR", help=text)


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see: list recipes) or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="For example algorithm.beta=0.2")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import the modules that a recipe or run from elsewhere names; their code then runs.")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]

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
