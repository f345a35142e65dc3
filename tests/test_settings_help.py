"""Truth: the fields as they were written, also those that JSON does not have."""

from __future__ import annotations

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
