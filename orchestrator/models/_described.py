"""Base class of adapters whose options describe the network: its inputs, its prediction and its scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.content import source_digest, with_content
from orchestrator.errors import ConfigError
from orchestrator.models._external import ExternalModel
from orchestrator.models.kinds import Kind, check_kind, range_of_data
from orchestrator.plugins import options_of
from solvers.prediction import PREDICTIONS, Prediction
from solvers.schedulers.base import Scheduler
from solvers.schedulers.discrete_vp import DiscreteVP

Time = Literal["t", "1-t", "timestep", "sigma"]

PRESENTATION = ("kind", "data_min", "data_max")
"""Options by which samples are shown; they are not part of the digest."""

SYMBOLS = ("x", "t", "y")
"""Inputs of a network: the state, the time in the network's own convention, and the label."""


class Call(NamedTuple):
    """The calling convention of a network.

    Attributes:
        positional: Symbols of the positional arguments, in order.
        keywords: Symbol of each keyword argument, by argument name.
    """

    positional: tuple[str, ...]
    keywords: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Call:
        """Parse a text like ``"x, t, y"``, ``"x, t, class_labels=y"`` or ``"sample=x, timestep=t"``.

        Raises:
            ValueError: The text is not a valid call.
        """
        positional: list[str] = []
        keywords: dict[str, str] = {}
        for part in (part.strip() for part in text.split(",")):
            name, equals, symbol = (piece.strip() for piece in part.partition("="))
            if not equals and not keywords:
                positional.append(name)
            elif equals and name.isidentifier() and name not in keywords:
                keywords[name] = symbol
            else:
                raise ValueError(f"call={text!r}: {part!r} is not valid here; write it like 'x, t, class_labels=y'")
        symbols = [*positional, *keywords.values()]
        if sorted(symbols) not in (["t", "x"], ["t", "x", "y"]):
            raise ValueError(
                f"call={text!r} must name x (the state) and t (the time) once each, and y (the label) at most once; "
                f"write it like 'x, t' or 'sample=x, timestep=t, class_labels=y'"
            )
        return cls(tuple(positional), keywords)

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*self.positional, *self.keywords.values())

    def arguments(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, filled from the values by symbol."""
        return [values[s] for s in self.positional], {name: values[s] for name, s in self.keywords.items()}


@dataclass(kw_only=True)
class DescribedModel(ExternalModel):
    """A network whose conventions are described by options; options that contradict each other are refused.

    Attributes:
        shape: Shape of one sample.
        prediction: Quantity the network predicts: epsilon, sample, v_prediction or velocity.
        native_scheduler: Scheduler the network was trained with: a name, or ``{name: ..., options: {...}}``.
        data_range: Largest minus smallest value of the data, 2 for [-1, 1]; by default data_max - data_min, or 2.
        kind: What samples are, by which they are shown: image, sound, vectors, series, trajectory, points or video. By
            default sound if the decoder makes sound, else by the shape: (D,) vectors, (T, D) and (C, T) series,
            (C, H, W) image, (C, T, H, W) video.
        data_min, data_max: Smallest and largest value of the data, black and white in pictures; by default
            ±data_range / 2. The pictures of a decoder are in [-1, 1].
        call: Arguments of the network: x, t and, with labels, y, by position or as ``name=y``.
        time: Convention of its time argument: 't' (0 noise, 1 data), '1-t', 'timestep' (0 to N - 1 of discrete_vp,
            fractional values included), or 'sigma' (the scheduler's noise level).
        time_scale: Factor applied to that time; 1000 for flow networks that count 1-t in thousandths.
        classes: Number of labels, 0 to classes - 1; required if ``call`` has a y.
        null_label: Label that stood for "dropped" in training; required for guidance.
        decoder: For a latent model, the decoder from samples to images or sound: ``{name: ..., options: {...}}``.

    Raises:
        ConfigError: An option is invalid, or two options contradict each other.
    """

    local: ClassVar[tuple[str, ...]] = ()
    """Options that only locate files; they are not part of the digest."""

    shape: tuple[int, ...]
    prediction: Prediction
    native_scheduler: Any
    data_range: float | None = None  # type: ignore[assignment]
    kind: Kind | None = None
    data_min: float | None = None
    data_max: float | None = None
    call: str = "x, t"
    time: Time = "t"
    time_scale: float = 1.0
    classes: int | None = None
    null_label: int | None = None
    decoder: Any = field(default=None, metadata=options_of("decoders"))

    @classmethod
    def check_guidance(cls, options: dict[str, Any], scale: float) -> None:
        plugins.build("models", cls.plugin(), options).check_scale(scale)

    def __post_init__(self) -> None:
        if not isinstance(self.shape, list | tuple) or not self.shape or not all(_is_count(n) for n in self.shape):
            raise self.refused(f"shape must list the sizes of one sample, e.g. [3, 32, 32], got {self.shape!r}")
        self.shape = tuple(self.shape)
        if self.prediction not in PREDICTIONS:
            hint = plugins.did_you_mean(str(self.prediction), list(PREDICTIONS))
            raise self.refused(f"unknown prediction {self.prediction!r}{hint}; choose one of {', '.join(PREDICTIONS)}")
        scale = self.time_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise self.refused(f"time_scale must be a positive number, got {scale!r}")
        self._check_presentation()
        self.native = self._build_scheduler()
        self._check_prediction()
        self._check_time()
        try:
            self.arguments = Call.parse(self.call)
        except (ValueError, AttributeError) as error:
            raise self.refused(str(error)) from error
        self._check_labels()
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
        if options.get("classes") is not None:
            try:
                dataset.check_labels(options["classes"], "the model")
            except ValueError as error:
                raise ConfigError(str(error)) from error

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
        built: Scheduler = plugins.build("schedulers", **self.native_scheduler)
        return built

    def _check_prediction(self) -> None:
        native = self.native
        first, last = native(native.t_min), native(native.t_max)
        if self.prediction == "epsilon" and float(first.alpha) == 0:
            raise self.refused(
                f"an epsilon prediction on {native.name!r} does not determine the data where sampling starts, "
                f"t={native.t_min:g}: alpha is 0 there, so the velocity is infinite; set prediction to 'velocity' for "
                f"a flow network, or start later with the scheduler's option t_min, e.g. 0.001"
            )
        if self.prediction == "sample" and float(last.sigma) == 0:
            raise self.refused(
                f"a sample prediction on {native.name!r} does not determine the noise where sampling ends, "
                f"t={native.t_max:g}: sigma is 0 there, so the velocity is infinite; end earlier with the scheduler's "
                f"option t_max, e.g. 0.999"
            )
        if self.prediction == "v_prediction":
            point = native(torch.linspace(native.t_min, native.t_max, 9, dtype=torch.float64))
            norms = point.alpha**2 + point.sigma**2
            if bool(((norms - 1).abs() > 1e-6).any()):
                raise self.refused(
                    f"v_prediction needs alpha^2 + sigma^2 = 1, but {native.name!r} has "
                    f"{float(norms[(norms - 1).abs().argmax()]):.6g}; choose vp, discrete_vp or cosine, or the "
                    f"prediction 'velocity'"
                )

    def _check_time(self) -> None:
        if self.time not in get_args(Time):
            raise self.refused(f"time must be one of {', '.join(map(repr, get_args(Time)))}, got {self.time!r}")
        if self.time == "timestep" and not isinstance(self.native, DiscreteVP):
            raise self.refused(
                f"time 'timestep' counts the training timesteps of 'discrete_vp', but the scheduler is "
                f"{self.native.name!r}, which has none; choose 't', '1-t' (with time_scale) or 'sigma'"
            )

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

    def network_time(self, t: Tensor) -> Tensor:
        match self.time:
            case "t":
                time = t
            case "1-t":
                time = 1 - t
            case "timestep":
                assert isinstance(self.native, DiscreteVP)
                time = self.native.timestep(t)
            case "sigma":
                time = self.native.sigma(t)
        return time * self.time_scale

    def evaluate(self, x: Tensor, time: Tensor, label: Tensor) -> Any:
        positional, keywords = self.arguments.arguments({"x": x, "t": time, "y": label})
        return self.net(*positional, **keywords)

    def identity(self) -> Iterable[Any]:
        left_out = (*self.local, "decoder", *PRESENTATION)
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in left_out}
        yield with_content(options)
        for function in self.native.functions:
            yield source_digest(function.__module__)
        if self.decoder is not None:
            yield self.decoder["name"]
            yield self._decoder.content


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
