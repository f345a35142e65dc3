"""What the user is told when something is wrong: one line that names the key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Failed(RuntimeError):
    """A run went wrong; the message is one line."""


class Interrupted(Exception):
    """A run was stopped by the user; the message says how to go on."""


class UserError(ValueError):
    """What the user gave is wrong; the message is one line that names the key or the file, and the remedy."""


def nearest(wrong: str, known: Iterable[str]) -> str:
    """What to say after 'unknown': the nearest known name, or all of them.

    >>> nearest("bata", ["beta", "clip"])
    'did you mean beta?'
    >>> nearest("zzz", ["beta", "clip"])
    'choose from beta, clip'
    """
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(names)}" if names else "there is none to choose"
