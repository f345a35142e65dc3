"""Attributes that a file on a shelf may have beside `Config` and `build`, with the values of a file that lacks them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scoreaction.errors import UserError
from scoreaction.settings import plain


class Traits(BaseModel):
    """The attributes of a file on a shelf, each optional; a file of the package and a user's own have the same.

    >>> from scoreaction.rewards import http, linear
    >>> traits_of(linear, key="reward").example, traits_of(http, key="reward").probe
    ({'direction': [1.0, 0.5]}, False)
    """

    model_config = ConfigDict(frozen=True, strict=True)
    defaults: dict[str, Any] = Field({}, alias="DEFAULTS", description="of a model: settings of other sections that suit it")
    suited: Callable[..., Any] | None = Field(
        None, description="of a model: `suited(config) -> settings` of other sections that follow from its own, over DEFAULTS"
    )
    example: dict[str, Any] = Field({}, alias="EXAMPLE", description="settings for a first trial, the required ones among them")
    probe: bool | None = Field(
        None,
        alias="PROBE",
        description="of a reward: false where an answer costs money or time, so that none is asked for before a run; true"
        " asks even for the oracle of an online run",
    )
    parameters: int | None = Field(
        None, alias="PARAMETERS", gt=0, description="of a reward: number of its weights; `plan` counts them and loads none"
    )
    skeleton: Callable[..., Any] | None = Field(
        None, description="of a model: `skeleton(config) -> Skeleton` without weights, which `plan` takes in place of `build`"
    )
    card: Callable[..., Any] | None = Field(
        None,
        description="of a model: `card(config, folder, off_below) -> Card | None`, how another library loads what a run saved",
    )


def traits_of(module: ModuleType, *, key: str) -> Traits:
    """The attributes of a file; UserError where one has a wrong type."""
    try:
        return Traits.model_validate(vars(module))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{key}: {fault['loc'][0]} in {module.__name__} {plain(fault['msg'])}") from error
