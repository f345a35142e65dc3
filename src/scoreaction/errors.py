"""Errors of the command line: one line each, which names the key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Failed(RuntimeError):
    """Failure of a run; the message is one line."""


class Interrupted(Exception):
    """Interruption of a run by the user; the message is the command that continues it."""


class UserError(ValueError):
    """Mistake in a setting or a file; the message is one line that names it and the remedy."""


def one_line(text: object, *, most: int | None = None) -> str:
    """A text in one line that a terminal shows as it is: others' control characters are written out, the rest is cut off.

    >>> one_line("red \x1b[31m\\n  end"), one_line("a" * 9, most=4)
    ('red \\\\x1b[31m end', 'aaaa...')
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(str(text).split()))
    return line if most is None or len(line) <= most else f"{line[:most]}..."


def check_kind(key: str, value: object, kind: type, such: str) -> None:
    """UserError, with one such, where a value is of another kind: a name, a class or a mapping in the place of an object.

    >>> check_kind("train", {"lr": 1e-3}, int, "sa.Train(lr=1e-3)")
    Traceback (most recent call last):
    scoreaction.errors.UserError: train: must be an object such as sa.Train(lr=1e-3) (got {'lr': 0.001})
    """
    if not isinstance(value, kind):
        raise UserError(f"{key}: must be an object such as {such} (got {one_line(repr(value), most=60)})")


DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "open_clip": "open_clip_torch",
    "rapidocr": "rapidocr onnxruntime",
    "onnxruntime": "rapidocr onnxruntime",
}
"""Packages whose name to install is not the one to import, or not all that has to be installed."""


def missing(package: str) -> str:
    """The line for a package, by the name that is imported, that is not installed.

    >>> missing("sklearn")
    'needs the package sklearn: pip install scikit-learn'
    """
    top = package.partition(".")[0]
    return f"needs the package {top}: pip install {DISTRIBUTIONS.get(top, top)}"


def nearest(wrong: str, known: Iterable[str]) -> str:
    """Hint for an unknown name: the nearest known one, or those that are as near, or all of them.

    >>> nearest("bata", ["beta", "clip"])
    'did you mean beta?'
    >>> nearest("ddop", ["ddpo", "ddpp", "vard"])
    'did you mean ddpo or ddpp?'
    >>> nearest("zzz", ["beta", "clip"])
    'choose from beta, clip'
    """
    names = sorted(known)
    likeness = {name: difflib.SequenceMatcher(None, name, wrong).ratio() for name in names}
    best = max(likeness.values(), default=0.0)
    if best >= 0.6:
        return f"did you mean {' or '.join(name for name in names if likeness[name] == best)}?"
    return f"choose from {', '.join(names)}" if names else "there is none to choose"
