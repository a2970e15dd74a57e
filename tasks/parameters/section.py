"""What all sections of params.yaml share: strictness, and the kinds of values that occur in several.

No field has a default: a default in Python is a parameter that DVC can't see.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
HubName = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]

AUTO = "auto"
"""Instead of a value: what the rule of the model's size says (`tasks.parameters.rules`)."""


Auto = Literal["auto"]


def _or_auto(value: Any, validate: Any) -> Any:
    try:
        return validate(value)
    except ValidationError as error:
        said = {"said": error.errors()[0]["msg"]}
        raise PydanticCustomError("neither_number_nor_auto", "{said}, or auto", said) from error


OrAuto = WrapValidator(_or_auto)
"""Annotates `a number | Auto`: one sentence for what is neither, that of the number."""


class Section(BaseModel):
    """A section of params.yaml; strict about unknown keys and types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
