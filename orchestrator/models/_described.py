"""Base class of adapters whose options describe the network: its inputs, its prediction and its scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from orchestrator import plugins
from orchestrator.content import source_digest, with_content
from orchestrator.errors import ConfigError
from orchestrator.models._external import ExternalModel
from orchestrator.models._network_time import NetworkTime, whole_steps_problem
from orchestrator.models.kinds import Kind, check_kind, range_of_data
from orchestrator.plugins import options_of
from solvers.prediction import PREDICTIONS, Prediction, check_path
from solvers.schedulers.base import Scheduler

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
        call: Arguments of the network: x, t and, with labels, y, by position or as ``name=y``.
        time: Its time argument: 't' (0 noise, 1 data), '1-t', 'timestep' (0 to N - 1 of discrete_vp, fractional values
            included), 'sigma' (the scheduler's noise level), or ``{kind, scale, offset, shape, integer}`` for scale *
            kind + offset, of shape 'batch' (B,), 'column' (B, 1) or 'scalar', and ``integer: interpolate`` for a
            network that takes whole timesteps only: two forwards per evaluation.
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
    time: Any = "t"
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
        self._check_presentation()
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
        return self.clock(t, self.native)

    def time_argument(self, time: Tensor, x: Tensor) -> Tensor:
        return self.clock.argument(time, x)

    def forwards_per_evaluation(self, guidance_scale: float) -> int:
        return self.clock.forwards * super().forwards_per_evaluation(guidance_scale)

    def evaluate(self, x: Tensor, time: Tensor, label: Tensor) -> Any:
        if not self._takes_fractions:
            self._check_fractions(x, label)
        return self.clock.evaluate(self.call_network, self.native, x, time, label)

    def call_network(self, x: Tensor, time: Tensor, label: Tensor) -> Any:
        """The network's output for x (B, ...), a time in the network's shape and dtype, and label (B,)."""
        positional, keywords = self.arguments.arguments({"x": x, "t": time, "y": label})
        return self.net(*positional, **keywords)

    def _check_fractions(self, x: Tensor, label: Tensor) -> None:
        """Refuse, at the first evaluation, a network of whole timesteps that is used at fractional ones.

        Raises:
            ConfigError: With the option that interpolates between timesteps.
        """
        self._takes_fractions = True
        one = torch.zeros(1, dtype=torch.int64, device=x.device)
        sample, condition = x[one].detach(), label[one]

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
