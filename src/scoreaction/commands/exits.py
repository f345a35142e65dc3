"""Exit codes: 0 done; 2 the input is wrong; 1 it failed; 130 interrupted."""

from __future__ import annotations

import errno
import os
from typing import Any

import typer

from scoreaction.errors import Failed, Interrupted, UserError, missing

UsageError: Any = typer.BadParameter.__base__  # typer brings its own copy of click or uses click, by version


def said_by_the_first(error: BaseException) -> bool:
    """True in all processes of a run but the first where an error is that of every process, so that one of them says it."""
    shared = isinstance(error, UserError | Interrupted) or getattr(error.__cause__ or error, "shared", False)
    return shared and os.environ.get("RANK", "0") != "0" and "WORLD_SIZE" in os.environ


def exit_of(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, UsageError):
        return 2, f"{error.format_message()} See scoreaction --help"
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return 2, f"{error.filename}: is too long a name; choose a shorter one"
    if isinstance(error, Interrupted):
        return 130, str(error)
    if isinstance(error, Failed):
        return 1, str(error)
    if isinstance(error, ModuleNotFoundError):
        return 1, f"this {missing(error.name or str(error))}"
    return 1, f"{type(error).__name__}: {error} (--debug shows where)"
