"""The command `scoreaction`: train, plan, doctor, pretrain, distill, pairs, cluster, sample, steer, evaluate, list and others.

Exit codes: 0 done; 2 the input is wrong; 1 it failed; 130 interrupted. Whatever goes wrong is one line on stderr; `--debug`
shows the traceback.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from scoreaction.commands.exits import exit_of, said_by_the_first
from scoreaction.commands.making import making
from scoreaction.commands.streams import forgive
from scoreaction.commands.using import using
from scoreaction.errors import one_line

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


app.add_typer(making)
app.add_typer(using)


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
