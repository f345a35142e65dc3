"""Truth: the public names, as Python has them: each stands on a page of the site's reference."""

from __future__ import annotations

import re
from pathlib import Path

from twins import accepts

import scoreaction
from scoreaction import algorithms

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PUBLIC = [*(f"scoreaction.{name}" for name in scoreaction.__all__)]
PUBLIC += [f"scoreaction.algorithms.{name}" for name in algorithms.__all__]


def test_every_public_name_has_a_page() -> None:
    """`make docs` fails on a name that does not exist; this on one that is missing. Twins: a page less, a name more."""
    pages = [path.read_text(encoding="utf-8") for path in sorted(REFERENCE.glob("*.md"))]
    shown = re.findall(r"^::: (\S+)$", "\n".join(pages), re.M)

    def complete(names: list[str]) -> None:
        assert set(PUBLIC) <= set(names), set(PUBLIC) - set(names)
        assert len(names) == len(set(names)), "a name stands on two pages"

    fewer = re.findall(r"^::: (\S+)$", "\n".join(pages[1:]), re.M)
    accepts(complete, shown, a_page_less=fewer, twice=[*shown, shown[0]])
