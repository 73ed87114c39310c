"""``Model``: a frozen network, whatever it is made of, and what conditions it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator import plugins
from orchestrator.api.conditions import Conditioning
from orchestrator.api.display import html_table
from orchestrator.api.identity import LiveNetwork
from orchestrator.api.names import device_of, name_of, slug, title
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import parse_config, read_yaml
from orchestrator.errors import UserError
from orchestrator.models.base import ModelAdapter
from orchestrator.models.in_process import Live
from orchestrator.models.kinds import Kind
from solvers.prediction import Prediction
from solvers.schedulers.base import Scheduler

if TYPE_CHECKING:
    from orchestrator.api.check import Check

STORAGE = "bespoke-data"
"""Storage root of pairs and results, in the current folder, unless another is named."""

IN_PROCESS, BUILT = "in_process", "built"

Conditions = Any
"""What pairs are conditioned on: see :class:`Model`."""


class Model:
    """A frozen network, what it predicts, and what conditions it.

    This constructor takes what lives in this process: any function ``velocity(x, t)``, or a ``torch.nn.Module``. Time t
    runs from 0 (noise) to 1 (data). Other models: :meth:`zoo`, :meth:`diffusers`, :meth:`from_file`, :meth:`adapter`,
    :meth:`from_yaml`.

    Stored pairs and results belong to the network's identity: the bytes of its weights, its code, and everything of
    yours that the code refers to. It is computed again whenever a command begins. A module is frozen only while a
    command runs.

    Args:
        network: Called as ``call`` says: with x (B, *shape), t (B,), and the condition, if any. It returns one tensor
            like x.
        shape: Shape of one sample, e.g. (3, 32, 32).
        prediction: What it returns: 'velocity' (dx/dt towards the data), 'epsilon', 'sample', 'v_prediction', 'score',
            or 'noise_minus_data'.
        native_scheduler: Noise schedule that it was trained with: a name, ``{"name": ..., "options": {...}}``, or a
            scheduler of ``solvers.schedulers``.
        call: Its arguments: 'x, t', 'x, t, y' with labels, 'x, t, obs=c.obs' with named arrays. By default x and t,
            then the label or the array, or several arrays by their names.
        time: Its time: 't', '1-t', 'timestep', 'sigma', or a mapping; docs/your_model.md has the table.
        classes: Number of labels, if it takes labels.
        null_label: Label that stood for "dropped" in training; guidance needs it.
        null: Of named arrays, what stood for "dropped": ``{"obs": 0}``.
        conditions: What conditions the pairs: a mapping of arrays with one row per condition; a list of prompts; a
            dataset of ``orchestrator.datasets``, or its name and options. By default labels, if there are ``classes``.
        data_range: Largest minus smallest value of the data, to which PSNR refers; 2 for [-1, 1].
        data_min, data_max: Values that are black and white in pictures; by default ±data_range / 2.
        kind: What samples are, by which they are shown: image, sound, vectors, series, trajectory, points or video.
        output: Part of what it returns that is the prediction: position, key or attribute.
        output_channels: Channels that it returns, if only the first are the prediction.
        decoder: Decoder of latents to images or sound: ``{"name": ..., "options": {...}}``.
        name: Name for tables and folders.
        device: Device; by default that of its weights, or the CPU.

    Raises:
        UserError: An option is invalid, or two contradict each other; names the value and the remedy.
    """

    _network: Any = None
    _alive: LiveNetwork | None = None

    def __init__(
        self,
        network: Callable[..., Any],
        shape: Sequence[int],
        *,
        prediction: Prediction = "velocity",
        native_scheduler: str | Mapping[str, Any] | Scheduler = "cond_ot",
        call: str | None = None,
        time: str | Mapping[str, Any] = "t",
        classes: int | None = None,
        null_label: int | None = None,
        null: Mapping[str, float | str] | None = None,
        conditions: Conditions = None,
        data_range: float | None = None,
        data_min: float | None = None,
        data_max: float | None = None,
        kind: Kind | None = None,
        output: str | int | None = None,
        output_channels: int | None = None,
        decoder: Mapping[str, Any] | None = None,
        name: str | None = None,
        device: str | None = None,
    ):
        if not callable(network):
            raise UserError(
                f"a model is a function of (x, t) or a torch module, got {network!r}; for what lies in files there are "
                f"Model.zoo, Model.diffusers, Model.from_file, Model.adapter and Model.from_yaml"
            )
        if isinstance(native_scheduler, Scheduler):
            native_scheduler = plugins.describe("schedulers", native_scheduler)
        conditioning = Conditioning.of(conditions)
        options = {
            "shape": list(shape) if isinstance(shape, Sequence) else shape,
            "prediction": prediction,
            "native_scheduler": native_scheduler,
            "call": conditioning.call(classes) if call is None else call,
            "time": time,
            "classes": classes,
            "null_label": null_label,
            "null": dict(null or {}),
            "data_range": data_range,
            "data_min": data_min,
            "data_max": data_max,
            "kind": kind,
            "output": output,
            "output_channels": output_channels,
            "decoder": decoder,
        }
        self._set(IN_PROCESS, options, conditioning, name or name_of(network), device)
        self._network = network
        self._alive = LiveNetwork(network, self.name)
        weights = (weight for part in self._alive.networks for weight in part.parameters())
        if device is None and (weight := next(weights, None)) is not None:
            self.device = str(weight.device)
        self._refresh()
        self._validate()

    def _set(
        self, adapter: str, options: dict[str, Any], conditioning: Conditioning, name: str, device: str | None
    ) -> None:
        self._adapter, self._options, self._conditioning = adapter, options, conditioning
        self.name, self.device = name, device or "cpu"
        self._sections: dict[str, Any] = {}
        self._built: ModelAdapter | None = None

    @classmethod
    def adapter(
        cls,
        adapter: str | ModelAdapter,
        /,
        *,
        conditions: Conditions = None,
        name: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> Model:
        """A model by its adapter: ``Model.adapter("onnx_session", file="net.onnx", shape=(2,), ...)``.

        Args:
            adapter: One of ``bespoke list models``; or an adapter object, which is known by its ``digest``.
            conditions, name, device: As for :class:`Model`.
            options: The adapter's options, as in a configuration.

        Raises:
            UserError: An option is invalid.
        """
        model = cls.__new__(cls)
        if isinstance(adapter, ModelAdapter):
            if options:
                raise UserError(f"{', '.join(options)}: an adapter object has its options already; leave them out")
            options = {"adapter": Live.of(adapter, adapter.digest, adapter.name)}
            name, device, adapter = name or adapter.name, device or device_of(adapter), BUILT
            model._network = options["adapter"].network
        described = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
        model._set(adapter, described, Conditioning.of(conditions), name or title(adapter, options), device)
        model._validate()
        return model

    @classmethod
    def zoo(cls, weights: str, *, conditions: Conditions = None, device: str | None = None) -> Model:
        """A model that ships with the package, such as 'digits_fm_ot', or a file written by ``bespoke pretrain``."""
        return cls.adapter("zoo", weights=weights, conditions=conditions, device=device)

    @classmethod
    def diffusers(
        cls, pipeline: Any, *, conditions: Conditions = None, device: str | None = None, **options: Any
    ) -> Model:
        """A diffusers pipeline.

        Args:
            pipeline: Its folder, its name on the hub, or the pipeline itself; its networks are then frozen in place.
            conditions: For text models, a list of prompts.
            device: As for :class:`Model`.
            options: dtype, sample_size, variant, as of the adapter 'diffusers'; of a pipeline object, sample_size.
        """
        if isinstance(pipeline, str | Path):
            return cls.adapter("diffusers", pipeline=str(pipeline), conditions=conditions, device=device, **options)
        from orchestrator.models.diffusers import DiffusersModel

        return cls.adapter(DiffusersModel.of(pipeline, **options), conditions=conditions, device=device)

    @classmethod
    def from_file(
        cls,
        factory: str,
        shape: Sequence[int],
        *,
        weights: str | Path | None = None,
        prediction: Prediction = "velocity",
        native_scheduler: str | Mapping[str, Any] = "cond_ot",
        conditions: Conditions = None,
        device: str | None = None,
        **options: Any,
    ) -> Model:
        """A network whose class is in a file: ``Model.from_file("nets/flow.py:Flow", (1, 8, 8), weights="flow.pt")``.

        Hosts on other machines load it from there. It is the adapter 'torch_module', with its options.

        Args:
            factory: ``"path/to/file.py:Class"``, or ``"package.module:Class"`` of an installed package.
            shape, prediction, native_scheduler, conditions, device: As for :class:`Model`.
            weights: File of its weights; without it, the class supplies them.
            options: Other options of the adapter, such as ``kwargs``, ``call``, ``classes``, ``weights_key``.
        """
        file, colon, name = str(factory).rpartition(":")
        if colon and file.endswith(".py"):
            options.setdefault("path", str(Path(file).parent))
            factory = f"{Path(file).stem}:{name}"
        described = {"factory": factory, "prediction": prediction, "native_scheduler": native_scheduler, **options}
        if weights is not None:
            described["weights"] = str(weights)
        described.setdefault("call", Conditioning.of(conditions).call(options.get("classes")))
        return cls.adapter("torch_module", conditions=conditions, device=device, shape=shape, **described)

    @classmethod
    def from_yaml(cls, path: str | Path, *, device: str | None = None) -> Model:
        """The model of a configuration, with its conditioning, resources and pairs.

        Args:
            path: A YAML file with at least the key ``model``.
            device: Device instead of the configuration's.

        Raises:
            UserError: The file is invalid.
        """
        content = read_yaml(path)
        model = cls.__new__(cls)
        described = content.pop("model", None)
        if not isinstance(described, Mapping) or "name" not in described:
            raise UserError(f"{path} has no model; add for example 'model: {{name: zoo, options: ...}}'")
        conditioning = Conditioning.of(content.pop("conditioning", None))
        resources = content.get("resources") or {}
        model._set(
            str(described["name"]),
            dict(described.get("options") or {}),
            conditioning,
            str(content.pop("name", None) or Path(path).stem),
            device or resources.get("device"),
        )
        model._sections = content
        model._validate()
        return model

    # ---- identity ------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Give a network of this process a new identity if its weights or its code have changed."""
        if self._alive is None:
            return
        live = self._alive.live()
        if self._options.get("network") != live:
            self._options["network"] = live
            self._built = None

    def _validate(self) -> None:
        """Check the options of the adapter and of the conditioning, without loading the network."""
        plugins.load("models", self._adapter).check(self._located)
        if self._conditioning.described is not None:
            dataset = plugins.build("datasets", **self._conditioning.described)
            plugins.load("models", self._adapter).check_conditioning(self._located, dataset)

    @property
    def _located(self) -> dict[str, Any]:
        return plugins.located("models", self._adapter, self._options)

    @property
    def loaded(self) -> ModelAdapter:
        """The adapter with the network, on its device."""
        self._refresh()
        if self._built is None:
            built: ModelAdapter = plugins.build("models", self._adapter, self._located)
            self._built = built.to(self.device)
        return self._built

    @property
    def digest(self) -> str:
        """sha256 of weights, code and options."""
        return self.loaded.digest

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.loaded.shape

    def at_rest(self) -> AbstractContextManager[None]:
        """While this lasts, modules of this process are in evaluation mode and without gradients."""
        return nullcontext() if self._alive is None else self._alive.at_rest()

    def chosen_scale(self, given: float | tuple[float, float] | None) -> float | tuple[float, float]:
        """A guidance scale, or the ends of a range: what is given, or the scale of the model's file, or 1.

        Raises:
            UserError: The file has several.
        """
        if given is not None:
            return given
        scales = self._sections.get("guidance_scale", 1.0)
        if isinstance(scales, list):
            if len(scales) != 1:
                listed = ", ".join(f"{one:g}" for one in scales)
                raise UserError(
                    f"{self.name} lists the guidance scales {listed}; choose one, or a range that one theta serves, as "
                    f"guidance_scale"
                )
            (scales,) = scales
        return float(scales)

    def check_can_be_sent(self) -> None:
        """Refuse a model of this process that hosts in other processes could not load.

        Raises:
            UserError: Names the reason and the remedy.
        """
        self._refresh()
        if self._network is not None:
            next(option for option in self._options.values() if isinstance(option, Live)).__reduce__()

    # ---- configuration -------------------------------------------------------------------------------------------

    def config(self, *, storage: str | Path = STORAGE, **sections: Any) -> ExperimentConfig:
        """The configuration of an experiment with this model, checked.

        Args:
            storage: Storage root.
            sections: Other keys of a configuration, such as ``nfe=[8]`` or ``pairs={"train": 64}``. They replace those
                of a file that the model was read from.

        Raises:
            UserError: A value is invalid, or the model cannot be conditioned so.
        """
        self._refresh()
        root = str(storage)
        conditioning = self._conditioning.dataset(root)
        if conditioning is None:
            conditioning = plugins.load("models", self._adapter).default_conditioning(self._located)
        resources = dict(self._sections.get("resources") or {}) | {"device": self.device}
        if self.device.startswith("cuda"):
            resources.setdefault("host_gpus", 1)
        resources |= sections.pop("resources", {})
        defaults = {"name": slug(self.name), "nfe": [8], "fixed": ["euler"]}
        content = defaults | self._sections | {"storage": root} | sections
        content |= {
            "model": {"name": self._adapter, "options": self._options},
            "conditioning": conditioning,
            "resources": resources,
        }
        config = parse_config(content, self.name)
        config.check()
        return config

    def to_yaml(self, path: str | Path | None = None, *, comment: str = "", **sections: Any) -> str:
        """The model as a configuration for the command line and clusters.

        Args:
            path: File to write; None: only return the text.
            comment: Lines before it, each beginning with '#'.
            sections: Other keys of a configuration.

        Raises:
            UserError: The model lives only in this process.
        """
        if self._network is not None:
            raise UserError(
                f"{self.name} lives only in this process, and no other could load it; put its class in a file and its "
                f"weights beside it, and use Model.from_file"
            )
        content = self.config(**sections).model_dump(mode="json", exclude_unset=True)
        text = comment + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    # ---- looking at it -------------------------------------------------------------------------------------------

    def check(self, *, guidance_scale: float = 1.0, storage: str | Path = STORAGE) -> Check:
        """Examine the model in at most 200 evaluations of 16 samples; what was measured before is read again.

        Args:
            guidance_scale: Guidance scale (1 is unguided).
            storage: Storage root, in which the measurements are kept.

        Returns:
            Its findings, and in a notebook a table and a figure.

        Raises:
            UserError: The model cannot be evaluated.
        """
        from orchestrator.api.check import Check
        from sweeps.check import run_check

        config = self.config(storage=storage, guidance_scale=[guidance_scale])
        with self.at_rest():
            checked = run_check(config, address=None, wait=True)
        return Check(self.name, checked.examinations[0])

    def _lines(self) -> list[tuple[str, str]]:
        """What is known of the model without loading a network from files."""
        lines = [("adapter", self._adapter)]
        if self._network is not None or self._built is not None:
            adapter = self.loaded
            weights = f"{adapter.parameters:,} weights" if adapter.parameters else "no weights found"
            lines += [
                ("sample", f"{' x '.join(map(str, adapter.shape))} ({math.prod(adapter.shape):,} numbers)"),
                ("predicts", f"{adapter.prediction}, on {adapter.native.name}"),
                ("network", f"{weights}, on {self.device}"),
                ("digest", adapter.digest[:12]),
            ]
        return lines

    def __repr__(self) -> str:
        return f"Model({self.name}: {'; '.join(f'{name} {value}' for name, value in self._lines())})"

    def _repr_html_(self) -> str:
        return html_table(self._lines(), title=f"Model {self.name}")
