"""Building blocks of the configuration sections: strict models, plugins by name, common field types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orchestrator.uris import values_without_secrets


def as_list(value: Any) -> Any:
    """Wrap a single value in a list: ``sigma0: 1`` means ``sigma0: [1]``."""
    return value if isinstance(value, list | tuple) else [value]


def as_plugin(value: Any) -> Any:
    """Expand a bare name to the plugin with default options."""
    return {"name": value} if isinstance(value, str) else value


Several = BeforeValidator(as_list)
NotEmpty = Field(min_length=1)
Positive = Annotated[float, Field(gt=0)]
Exponent = Annotated[float, Field(gt=0, le=10)]


class Strict(BaseModel):
    """A frozen section that rejects unknown keys, infinities, and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((name, values_without_secrets({name: value})[name]) for name, value in super().__repr_args__())


class PluginConfig(Strict):
    """A plugin's name and options: ``{name: zoo, options: {weights: digits_fm_ot}}``."""

    name: str
    options: dict[str, Any] = {}
