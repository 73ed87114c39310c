"""Building blocks of every configuration section: strict models, plugins by name, common fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def as_list(value: Any) -> Any:
    """A single value where a list is expected: ``sigma0: 1`` means ``sigma0: [1]``."""
    return value if isinstance(value, list | tuple) else [value]


def as_plugin(value: Any) -> Any:
    """A bare name means the plugin with its defaults."""
    return {"name": value} if isinstance(value, str) else value


Several = BeforeValidator(as_list)
NotEmpty = Field(min_length=1)
Positive = Annotated[float, Field(gt=0)]
Exponent = Annotated[float, Field(gt=0, le=10)]


class Strict(BaseModel):
    """A frozen section that refuses unknown keys, infinities, and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PluginConfig(Strict):
    """A plugin by name with its options: ``{name: zoo, options: {weights: digits_fm_ot}}``."""

    name: str
    options: dict[str, Any] = {}
