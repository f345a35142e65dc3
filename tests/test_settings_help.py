"""Truth: the fields as they were written, also those that JSON does not have."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from twins import same

from scoreaction.recipes.settings_help import settings_table


class Nested(BaseModel):
    depth: int = 1


class Odd(BaseModel):
    renamed: int = Field(3, alias="other-name")
    made: list[int] = Field(default_factory=lambda: [1, 2])
    inner: Nested = Nested()
    kids: list[Odd] = []
    whatever: object = None


class Foreign(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    dtype: torch.dtype = torch.float32


def lines(config: type[BaseModel]) -> dict[str, list[str]]:
    table = settings_table(config).partition("key ")[2].splitlines()[1:]
    return {line.split()[0]: line.split(maxsplit=2)[1:] for line in table}


def test_odd_fields_have_their_line() -> None:
    found = lines(Odd)
    same(list(found), ["renamed", "made", "inner.depth", "kids", "whatever"], of_another=list(lines(Nested)))
    assert found["renamed"] == ["3", "whole number"]
    assert settings_table(Odd).splitlines()[2].split(maxsplit=3)[1:] == ["[1,", "2]", "list of whole numbers"]
    assert found["whatever"] == ["null", "anything"]
    assert list(lines(Foreign)) == ["dtype"]


class Lists(BaseModel):
    shown: list[Literal["wandb", "trackio"]] | None = None
    means: list[list[float]] = [[0.0]]
    rounds: list[Annotated[int, Field(ge=8)]] = [8]
    seed: int = Field(0, ge=0, lt=2**32)


def test_what_a_list_takes_can_be_typed_as_it_is_said() -> None:
    """A name has no plural, a kind has one, and a bound all of its digits. Twin: an s behind whatever comes last."""
    takes = {line.split()[0]: line for line in settings_table(Lists).splitlines()[1:]}
    for key, said, wrong in (
        ("shown", "list of wandb or trackio or null", "list of wandb or trackios or null"),
        ("means", "list of lists of numbers", "list of list of numbers" + "s"),
        ("rounds", "list of whole numbers from 8", "list of whole number from 8s"),
        ("seed", "whole number from 0 below 4294967296", "whole number from 0 below 4.29497e+09"),
    ):
        same(takes[key].endswith("  " + said), True, as_it_was=takes[key].endswith("  " + wrong))
