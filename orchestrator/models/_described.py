"""Base class of adapters whose options describe the network: its inputs, its prediction and its scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.content import source_digest, with_content
from orchestrator.datasets.tensors import null_problem
from orchestrator.errors import RAISED, ConfigError, describe, is_users
from orchestrator.importing import find_modules_in
from orchestrator.models._call import NAMED, Call
from orchestrator.models._external import ExternalModel
from orchestrator.models._network_time import NetworkTime, whole_steps_problem
from orchestrator.models._outputs import prediction_in
from orchestrator.models.kinds import Kind, check_kind, range_of_data
from orchestrator.pairs import Condition, Conditions
from orchestrator.plugins import PATH, options_of
from solvers.prediction import PREDICTIONS, Prediction, check_path
from solvers.schedulers.base import Scheduler

PRESENTATION = ("kind", "data_min", "data_max")
"""Options by which samples are shown; they are not part of the digest."""

NEWER = {"newer": True}
"""Metadata of an option that is younger than stored digests: at its default it is not part of them."""


@dataclass(kw_only=True)
class DescribedModel(ExternalModel):
    """A network whose conventions are described by options; options that contradict each other are refused.

    Attributes:
        shape: Shape of one sample.
        prediction: Quantity the network predicts: epsilon (noise), sample (data), v_prediction (alpha noise - sigma
            data), velocity (dx/dt towards the data), score (-noise / sigma), or noise_minus_data (the velocity of flow
            networks that count time from the data).
        native_scheduler: Scheduler the network was trained with: a name, or ``{name: ..., options: {...}}``.
        data_range: Largest minus smallest value of the data, 2 for [-1, 1]; by default data_max - data_min, or 2.
        kind: What samples are, by which they are shown: image, sound, vectors, series, trajectory, points or video. By
            default sound if the decoder makes sound, else by the shape: (D,) vectors, (T, D) and (C, T) series,
            (C, H, W) image, (C, T, H, W) video.
        data_min, data_max: Smallest and largest value of the data, black and white in pictures; by default
            ±data_range / 2. The pictures of a decoder are in [-1, 1].
        call: Arguments of the network, by position or as ``name=y``: x, t, with labels y, and named conditions as
            ``c.NAME``, where NAME is an array of the dataset ``tensors``; ``name.entry=c.NAME`` for an entry of an
            argument that is a dictionary.
        time: Its time argument: 't' (0 noise, 1 data), '1-t', 'timestep' (0 to N - 1 of discrete_vp, fractional values
            included), 'sigma' (the scheduler's noise level), or ``{kind, scale, offset, shape, integer}`` for scale *
            kind + offset, of shape 'batch' (B,), 'column' (B, 1) or 'scalar', and ``integer: interpolate`` for a
            network that takes whole timesteps only: two forwards per evaluation.
        time_scale: Factor applied to that time; 1000 for flow networks that count 1-t in thousandths.
        classes: Number of labels, 0 to classes - 1; required if ``call`` has a y.
        null_label: Label that stood for "dropped" in training; required for guidance with labels alone.
        null: For guidance with named conditions, what stood for "dropped" in training: for each condition that was
            dropped, a number, as in ``{obs: 0}``, or the name of an array of the dataset.
        output: Which part of what the network returns is the prediction: position in a tuple, key of a dictionary, or
            attribute, such as sample; by default it returns one tensor.
        output_channels: Number of channels that the network returns, if the prediction is only the first of them, as
            in networks that learn a variance.
        path: Folder of modules that are not installed, or a list of folders; added to ``sys.path``, in hosts as well.
            The functions of a custom scheduler are imported from there.
        decoder: For a latent model, the decoder from samples to images or sound: ``{name: ..., options: {...}}``.

    Raises:
        ConfigError: An option is invalid, or two options contradict each other.
    """

    local: ClassVar[tuple[str, ...]] = ("path",)
    """Options that only locate files; they are not part of the digest."""

    shape: tuple[int, ...]
    prediction: Prediction
    native_scheduler: Any
    data_range: float | None = None  # type: ignore[assignment]
    kind: Kind | None = None
    data_min: float | None = None
    data_max: float | None = None
    call: str = "x, t"
    time: Any = "t"
    time_scale: float = 1.0
    classes: int | None = None
    null_label: int | None = None
    null: dict[str, Any] = field(default_factory=dict)
    output: str | int | None = field(default=None, metadata=NEWER)
    output_channels: int | None = field(default=None, metadata=NEWER)
    path: str | list[str] | None = field(default=None, metadata=PATH)
    decoder: Any = field(default=None, metadata=options_of("decoders"))

    @classmethod
    def without_network(cls, options: dict[str, Any]) -> DescribedModel:
        model: DescribedModel = plugins.build("models", cls.plugin(), options)
        return model

    @classmethod
    def check_guidance(cls, options: dict[str, Any], scale: float) -> None:
        plugins.build("models", cls.plugin(), options).check_scale(scale)

    @classmethod
    def default_conditioning(cls, options: dict[str, Any]) -> dict[str, Any]:
        model = plugins.build("models", cls.plugin(), options)
        if model.arguments.conditions:
            raise model.refused(
                f"call={model.call!r} takes named arrays ({', '.join(model.arguments.conditions)}); name the dataset "
                f"that holds them"
            )
        classes, null = model.classes or 1, model.null_label
        if classes > 1 and null == 0:
            return {"name": "labels", "options": {"classes": classes - 1, "first": 1}}
        return {"name": "labels", "options": {"classes": classes - (classes > 1 and null == classes - 1)}}

    def __post_init__(self) -> None:
        if not isinstance(self.shape, list | tuple) or not self.shape or not all(_is_count(n) for n in self.shape):
            raise self.refused(f"shape must list the sizes of one sample, e.g. [3, 32, 32], got {self.shape!r}")
        self.shape = tuple(self.shape)
        if self.prediction not in PREDICTIONS:
            hint = plugins.did_you_mean(str(self.prediction), list(PREDICTIONS))
            raise self.refused(f"unknown prediction {self.prediction!r}{hint}; choose one of {', '.join(PREDICTIONS)}")
        self._check_presentation()
        self._check_output()
        self.native = self._build_scheduler()
        with self.refusing():
            check_path(self.prediction, self.native)
            self.clock = NetworkTime.parse(self.time, self.time_scale)
            self.clock.check(self.native)
        self.time, self.time_scale = self.clock.options(self.time, self.time_scale)
        try:
            self.arguments = Call.parse(self.call)
        except (ValueError, AttributeError) as error:
            raise self.refused(str(error)) from error
        self._takes_fractions = self.clock.kind != "timestep" or self.clock.integer is not None
        self._check_labels()
        self._check_null()
        if self.decoder is not None:
            if not isinstance(self.decoder, Mapping) or not {"name"} <= set(self.decoder) <= {"name", "options"}:
                raise self.refused(f"decoder must be {{name: ..., options: {{...}}}}, got {self.decoder!r}")
            plugins.load("decoders", self.decoder["name"])

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        super().check(options)
        if options.get("decoder") is not None:
            rate = getattr(plugins.build("decoders", **options["decoder"]), "rate", None)
            kind = options.get("kind")
            if kind is not None and (kind == "sound") != (rate is not None):
                makes = "does not make sound" if rate is None else "makes sound"
                raise ConfigError(
                    f"model adapter {cls.plugin()!r}: kind {kind!r} does not fit decoder "
                    f"{options['decoder']['name']!r}, which {makes}; leave kind out"
                )

    @classmethod
    def check_conditioning(cls, options: dict[str, Any], dataset: Any) -> None:
        model = plugins.build("models", cls.plugin(), options)
        try:
            if model.classes is not None:
                dataset.check_labels(model.classes, "the model")
            model.check_names(dataset)
            dataset.mask_of(np.zeros(1, dtype=np.int64), model.shape)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def check_names(self, dataset: Any) -> None:
        """Refuse a dataset without the named conditions of the call, or in which those of ``null`` do not fit.

        Raises:
            ConfigError: Names the conditions, and the arrays that the dataset has.
        """
        layout = dataset.layout
        missing = [name for name in self.arguments.conditions if name not in layout]
        if missing:
            arrays = ", ".join(f"{name} ({row})" for name, row in layout.items())
            have = f"has {arrays}; correct the names" if layout else "has none; set conditioning.name to tensors"
            raise ConfigError(
                f"call={self.call!r} takes the named arrays {', '.join(missing)}, but the dataset "
                f"{type(dataset).__name__} {have}"
            )
        for name, value in self.null.items():
            problem = null_problem(name, value, layout)
            if problem is not None:
                raise self.refused(problem)

    @cached_property
    def _decoder(self) -> Any:
        return None if self.decoder is None else plugins.build("decoders", **self.decoder)

    @property
    def rate(self) -> int | None:  # type: ignore[override]
        """Sample rate of the decoded sound in Hz; None without a decoder, and for images."""
        return getattr(self._decoder, "rate", None)

    def decode(self, samples: Tensor) -> Tensor:
        return samples if self._decoder is None else self._decoder(samples)

    @property
    def decodes(self) -> bool:
        return self.decoder is not None

    def _check_output(self) -> None:
        if isinstance(self.output, bool) or not isinstance(self.output, str | int | None):
            raise self.refused(f"output must be a position, a key or an attribute, got {self.output!r}")
        if self.output_channels is not None and not (
            _is_count(self.output_channels) and self.output_channels > self.shape[0]
        ):
            raise self.refused(
                f"output_channels must be a number above the {self.shape[0]} channels of a sample, got "
                f"{self.output_channels!r}; leave it out if the network returns the prediction alone"
            )

    def _check_presentation(self) -> None:
        with self.refusing():
            self.data_range = range_of_data(self.data_range, self.data_min, self.data_max)
            check_kind(self.kind, self.shape, decoded=self.decodes)
        if self.decodes and self.data_min is not None:
            raise self.refused(
                "data_min and data_max have no effect with a decoder, whose pictures are in [-1, 1]; set data_range, "
                "the range of the latents, instead"
            )

    def _build_scheduler(self) -> Scheduler:
        spec = self.native_scheduler
        spec = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping) or not {"name"} <= set(spec) <= {"name", "options"}:
            raise self.refused(
                f"native_scheduler must be a name or {{name: ..., options: {{...}}}}, got {self.native_scheduler!r}"
            )
        self.native_scheduler = {"name": spec["name"], "options": dict(spec.get("options") or {})}
        with self.refusing():
            # A custom scheduler's functions lie where the model's code is.
            self.code = tuple(map(str, find_modules_in(self.path)))
        try:
            built: Scheduler = plugins.build("schedulers", **self.native_scheduler)
        except RAISED as error:  # functions of a custom scheduler may raise anything
            cause = error.__cause__ if isinstance(error, ConfigError) else error
            if cause is None or not is_users(cause):
                raise
            name = self.native_scheduler["name"]
            raise self.refused(
                f"a function of native_scheduler {name!r} fails: {describe(cause, called=True)}"
            ) from error
        return built

    def _check_labels(self) -> None:
        labelled = "y" in self.arguments.symbols
        if labelled and (not _is_count(self.classes)):
            raise self.refused(f"call={self.call!r} takes labels; set classes to their number, got {self.classes!r}")
        for option in ("classes", "null_label"):
            if not labelled and getattr(self, option) is not None:
                raise self.refused(f"{option} has no effect: call={self.call!r} has no y; add y, or remove the option")
        label = self.null_label
        if label is not None and (isinstance(label, bool) or not isinstance(label, int)):
            raise self.refused(f"null_label must be an integer, got {label!r}")

    def _check_null(self) -> None:
        conditions = self.arguments.conditions
        if not isinstance(self.null, Mapping):
            raise self.refused(f"null must give a value for each dropped condition, e.g. {{obs: 0}}, got {self.null!r}")
        for name, value in self.null.items():
            if name not in conditions:
                listed = f"whose conditions are {', '.join(conditions)}" if conditions else "which names no condition"
                raise self.refused(f"null names {name!r}, which is not in call={self.call!r}, {listed}; correct it")
            if not isinstance(value, int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
                raise self.refused(f"null must give a number or the name of an array for {name!r}, got {value!r}")

    @property
    def can_drop(self) -> bool:
        return super().can_drop or bool(self.null)

    def check_scale(self, guidance_scale: float) -> None:
        if guidance_scale != 1 and not self.can_drop and (conditions := self.arguments.conditions):
            raise self.refused(
                f"guidance scale {guidance_scale:g} needs a value for dropped conditions, but {self.name} has none; "
                f"set guidance_scale to 1, or set null, e.g. {{{conditions[0]}: 0}}, if the network was trained with "
                f"dropped conditions"
            )
        super().check_scale(guidance_scale)

    @property
    def _conditions(self) -> list[str]:
        """Names of the arrays that conditions need: those of the call, and those that stand for dropped ones."""
        labels = ["y"] if "y" in self.arguments.symbols else []
        dropped = [value for value in self.null.values() if isinstance(value, str)]
        return list(dict.fromkeys([*labels, *self.arguments.conditions, *dropped]))

    def encode_conditions(self, condition: Tensor, dataset: Any) -> Any:
        if not dataset.named or not self._conditions:
            return condition
        return dataset.tensors(condition.numpy(), self._conditions)

    def check_condition(self, condition: Any) -> None:
        super().check_condition(condition.tensors.get("y") if isinstance(condition, Conditions) else condition)

    def null_condition(self, condition: Any) -> Any:
        if not isinstance(condition, Conditions):
            return super().null_condition(condition)
        held = condition.tensors
        dropped = {
            name: held[value] if isinstance(value, str) else torch.full_like(held[name], value)
            for name, value in self.null.items()
        }
        if "y" in held:
            dropped["y"] = super().null_condition(held["y"])
        return condition.replaced(dropped)

    def network_time(self, t: Tensor) -> Tensor:
        return self.clock(t, self.native)

    def whole_times(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.clock.whole_times(self.clock(t, self.native), self.native)

    def time_argument(self, time: Tensor, x: Tensor) -> Tensor:
        return self.clock.argument(time, x)

    def forwards_per_evaluation(self, guidance_scale: float) -> int:
        return self.clock.forwards * super().forwards_per_evaluation(guidance_scale)

    def inputs_of(self, x: Tensor, time: Tensor, condition: Condition) -> dict[str, Tensor]:
        """The network's inputs by symbol; floating conditions get the dtype of ``x``."""
        if not isinstance(condition, Conditions):
            return {"x": x, "t": time, "y": condition}
        given = {name: c.to(x.dtype) if c.is_floating_point() else c for name, c in condition.tensors.items()}
        named = {NAMED + name: value for name, value in given.items()}
        return {**given, **named, "x": x, "t": time}  # "y" are the labels

    def evaluate(self, x: Tensor, time: Tensor, condition: Any) -> Any:
        if not self._takes_fractions:
            self._check_fractions(x, condition)
        return self.clock.evaluate(self.call_network, self.native, x, time, condition)

    def call_network(self, x: Tensor, time: Tensor, condition: Any) -> Any:
        """The network's output for x (B, ...), a time in the network's shape and dtype, and conditions."""
        positional, keywords = self.arguments.arguments(self.inputs_of(x, time, condition))
        return self._prediction_in(self.net(*positional, **keywords))

    def _prediction_in(self, output: Any) -> Any:
        if self.output is None and self.output_channels is None:
            return output
        with self.refusing():
            return prediction_in(output, self.output, self.output_channels, self.shape[0])

    def _check_fractions(self, x: Tensor, conditions: Any) -> None:
        """Refuse, at the first evaluation, a network of whole timesteps that is used at fractional ones.

        Raises:
            ConfigError: With the option that interpolates between timesteps.
        """
        self._takes_fractions = True
        one = torch.zeros(1, dtype=torch.int64, device=x.device)
        sample, condition = x[one].detach(), conditions[one]

        def network(time: Tensor) -> Any:
            like = time.to(x.device).reshape((1, 1) if self.clock.shape == "column" else (1,))
            return self.call_network(sample.clone(), like[0] if self.clock.shape == "scalar" else like, condition)

        if problem := whole_steps_problem(network, self.clock.middle(self.native), self.clock.scale):
            raise self.refused(
                f"{self.name} takes whole timesteps only: {problem}; set time to {{kind: timestep, integer: "
                f"interpolate}}, which interpolates its outputs between neighbouring timesteps by two forwards per "
                f"evaluation"
            )

    def identity(self) -> Iterable[Any]:
        left_out = {*self.local, "decoder", *PRESENTATION, *(() if self.null else ("null",))}
        left_out |= {f.name for f in fields(self) if "newer" in f.metadata and getattr(self, f.name) == f.default}
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in left_out}
        yield with_content(options)
        for function in self.native.functions:
            yield source_digest(function.__module__)
        if self.decoder is not None:
            yield self.decoder["name"]
            yield self._decoder.content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
