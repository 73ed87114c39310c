"""Building blocks of the configuration sections: strict models, plugins by name, common field types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.uris import values_without_secrets


def as_list(value: Any) -> Any:
    """Wrap a single value in a list: ``sigma0: 1`` means ``sigma0: [1]``."""
    return value if isinstance(value, list | tuple) else [value]


def as_plugin(value: Any) -> Any:
    """Expand a bare name to the plugin with default options."""
    return {"name": value} if isinstance(value, str) else value


Several = BeforeValidator(as_list)
NotEmpty = Field(min_length=1)
NFE = Annotated[int, Field(ge=1, le=1000, strict=True)]
Positive = Annotated[float, Field(gt=0)]
Exponent = Annotated[float, Field(gt=0, le=10)]


class Strict(BaseModel):
    """A frozen section that rejects unknown keys, infinities, and NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_as_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers; Python would take them for 1 and 0."""
        inside = value if isinstance(value, list | tuple) else [value]
        kinds = _kinds_in(cls.model_fields[info.field_name or ""].annotation)
        if any(isinstance(item, bool) for item in inside) and float in kinds and not kinds & {bool, Any}:
            raise ValueError("must be a number; YAML reads yes, no, on and off as true and false")
        return value

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((name, values_without_secrets({name: value})[name]) for name, value in super().__repr_args__())


@contextmanager
def in_section(path: str) -> Iterator[None]:
    """Put the full path of a section before errors about it that do not name it.

    Raises:
        ConfigError: The body raised a ``ConfigError`` or ``ValueError``.
    """
    try:
        yield
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _kinds_in(annotation: Any) -> set[Any]:
    """A type and all types that it is made of."""
    return {annotation}.union(*map(_kinds_in, get_args(annotation)))


class PluginConfig(Strict):
    """A plugin's name and options: ``{name: zoo, options: {weights: digits_fm_ot}}``."""

    name: str
    options: dict[str, Any] = {}

    def build(self, kind: str) -> Any:
        """The plugin of this kind; raises like :func:`orchestrator.plugins.build`."""
        return plugins.build(kind, self.name, self.options)


def _located(kind: str) -> AfterValidator:
    """Makes the paths in the options of a plugin of this kind absolute, see :func:`orchestrator.plugins.located`."""
    return AfterValidator(
        lambda plugin: plugin.model_copy(update={"options": plugins.located(kind, plugin.name, plugin.options)})
    )


Model = Annotated[PluginConfig, _located("models")]
Source = Annotated[PluginConfig, _located("datasets")]
"""A dataset: conditioning, real samples, or both."""
MetricChoice = Annotated[PluginConfig, BeforeValidator(as_plugin), _located("metrics")]
ObjectiveChoice = Annotated[PluginConfig, BeforeValidator(as_plugin), _located("objectives")]
