"""``edm``: networks like the published ones of EDM (Karras et al. 2022), from a pickle or from safetensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from orchestrator.content import own_code, pickled_modules, source_digest
from orchestrator.errors import ConfigError
from orchestrator.importing import find_modules_in, import_factory
from orchestrator.models._external import ExternalModel
from orchestrator.models._factories import build_module, build_without_weights
from orchestrator.models._weights import load_weights, misfit, read_weights
from orchestrator.plugins import PATH
from orchestrator.storage import Storage
from orchestrator.weights.frozen import freeze
from solvers.prediction import Prediction
from solvers.schedulers.base import Scheduler
from solvers.schedulers.edm import EDM

METADATA_KEY = "bespoke_edm"
"""Metadata key in a safetensors file; its value is a JSON object with the factory and its kwargs."""

INTERFACE = ("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max")
"""Attributes that every EDM network has."""

PUBLISHED_RANGE = (0.002, 80.0)
"""sigma_min and sigma_max of the published sampler, which clips them to the network's range."""


@dataclass
class EDMNetwork(ExternalModel):
    """An EDM network: the denoiser D(x; sigma, class_labels) on the variance-exploding path.

    The denoiser predicts the sample (E[x1 | x_sigma]). Its input is x1 + sigma * eps without scaling. Labels are
    one-hot, and a dropped label is all zeros. The field is thus u = sigma' (x - D(x; sigma)) / sigma on the scheduler
    'edm', from sigma_max at t = 0 to sigma_min at its end. This is the published ODE in the time
    t = 1 - sigma / sigma_max. The published sampler then takes one Euler step from sigma_min to 0; the samples here
    end at sigma_min.

    Published checkpoints are pickles, which can run arbitrary code when opened and need the EDM repository (``path``).
    :func:`export_safetensors` converts one to a safetensors file that runs no code.

    Attributes:
        file: A .pkl whose entry 'ema' is the network, or a .safetensors written by :func:`export_safetensors`.
        trust_pickle: Whether a .pkl may run its code.
        factory: For safetensors: class of the network, as ``"package.module:name"``.
        path: Folder of modules that are not installed, such as the EDM repository; or a list of folders.
        sigma_min: Noise level at which sampling ends; by default 0.002, or the network's own minimum if larger.
        sigma_max: Noise level at which sampling starts; by default 80, or the network's own maximum if smaller.
        data_range: Largest minus smallest value of the data; 2 for [-1, 1].

    Raises:
        ConfigError: An option is invalid, or the network does not have the EDM interface.

    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 1-4.
    """

    file: str = field(metadata=PATH)
    trust_pickle: bool = False
    factory: str | None = None
    path: str | list[str] | None = field(default=None, metadata=PATH)
    sigma_min: float | None = None
    sigma_max: float | None = None
    data_range: float = 2.0

    prediction: ClassVar[Prediction] = "sample"  # type: ignore[misc]

    def __post_init__(self) -> None:
        self.source = self.existing_file("file", self.file, (".pkl", ".safetensors"))
        self.name = self.source.stem
        if self.is_pickle and self.trust_pickle is not True:
            raise self.refused(
                f"{self.source} is a pickle, and opening it can run arbitrary code; set trust_pickle: true if you "
                f"trust its source, or export it to safetensors (export_safetensors in orchestrator.models.edm)"
            )
        if not self.is_pickle and self.trust_pickle:
            raise self.refused("trust_pickle has no effect on safetensors, which run no code; leave it out")
        if self.is_pickle and self.factory is not None:
            raise self.refused("factory has no effect on a pickle, which names its own class; leave it out")
        for option in ("sigma_min", "sigma_max", "data_range"):
            value = getattr(self, option)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
            if not number and not (value is None and option != "data_range"):
                raise self.refused(f"{option} must be a positive number, got {value!r}")

    @property
    def is_pickle(self) -> bool:
        return self.source.suffix == ".pkl"

    @classmethod
    def default_conditioning(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {"name": "labels", "options": {"classes": cls(**options).classes or 1}}

    # ---- the network --------------------------------------------------------------------------------------------

    def inspect(self) -> None:
        if self.is_pickle:
            return  # a pickle cannot be inspected without loading it
        module = build_without_weights(self._made)
        with self.refusing():
            read_weights(module, self.source)
        self._check_interface(module)

    def load(self) -> nn.Module:
        module = self._unpickled() if self.is_pickle else self._made()
        if not self.is_pickle:
            with self.refusing():
                load_weights(module, self.source)
        self._check_interface(module)
        return freeze(module)

    def _unpickled(self) -> nn.Module:
        try:
            find_modules_in(self.path)
            with self.source.open("rb") as stream:
                content = pickle.load(stream)
        except Exception as error:  # a pickle's code may raise anything
            raise self.refused(
                f"{self.source} cannot be opened: {type(error).__name__}: {error}; set path to the folder of the "
                f"repository that wrote it (it holds dnnlib and torch_utils)"
            ) from error
        if not isinstance(content, Mapping) or "ema" not in content:
            got = f"the keys {', '.join(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
            raise self.refused(f"{self.source} must be a pickled dictionary with the network as 'ema', got {got}")
        if not isinstance(content["ema"], nn.Module):
            raise self.refused(f"'ema' of {self.source} is not a torch module but {type(content['ema']).__name__}")
        return content["ema"]

    def _made(self) -> nn.Module:
        """Build the network described in a safetensors file, without loading its weights."""
        described = self._description()
        if self.factory is None:
            # The file may come from anywhere, so the factory it names must not be called unchecked.
            raise self.refused(
                f"{self.source} names the factory {described['factory']!r}; set factory to the class that you trust to "
                f"build the network"
            )
        with self.refusing():
            return build_module(import_factory(self.factory, self.path), self.factory, described["kwargs"])

    def _description(self) -> dict[str, Any]:
        """The factory and kwargs that :func:`export_safetensors` wrote to the metadata."""
        try:
            with safe_open(self.source, framework="pt") as file:
                described = json.loads((file.metadata() or {})[METADATA_KEY])
            return {"factory": str(described["factory"]), "kwargs": dict(described["kwargs"])}
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise self.refused(
                f"{self.source} does not describe how to build its network ({error}); write it with "
                f"export_safetensors in orchestrator.models.edm"
            ) from error

    def _check_interface(self, module: nn.Module) -> None:
        missing = [name for name in INTERFACE if not hasattr(module, name)]
        if missing:
            raise self.refused(
                f"{type(module).__name__} does not have the interface of EDM networks: {', '.join(missing)} missing; "
                f"use the adapter 'torch_module', whose options describe it"
            )
        if not self._rounds_noise_levels(module):
            return
        raise self.refused(
            f"{type(module).__name__} rounds noise levels to a table, so its velocity jumps in time and no solver "
            f"converges on it; use a network that takes any noise level"
        )

    def _rounds_noise_levels(self, module: nn.Module) -> bool:
        rounding = getattr(module, "round_sigma", None)
        if rounding is None:
            return False
        levels = torch.logspace(-1, 0.5, 7)
        if any(value.is_meta for value in [*module.parameters(), *module.buffers()]):
            return False  # a table on the meta device has no values yet
        return not torch.allclose(torch.as_tensor(rounding(levels)).to(levels), levels, rtol=1e-5)

    # ---- properties of the network ------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (int(self.net.img_channels), int(self.net.img_resolution), int(self.net.img_resolution))

    @cached_property
    def native(self) -> Scheduler:  # type: ignore[override]
        least, largest = float(self.net.sigma_min), float(self.net.sigma_max)
        low = max(PUBLISHED_RANGE[0], least) if self.sigma_min is None else float(self.sigma_min)
        high = min(PUBLISHED_RANGE[1], largest) if self.sigma_max is None else float(self.sigma_max)
        if not least <= low < high <= largest:
            raise self.refused(
                f"noise levels from {low:g} to {high:g} are not within the range of {self.name}, {least:g} to "
                f"{largest:g}; correct sigma_min and sigma_max, or remove them"
            )
        return EDM(sigma_min=low, sigma_max=high)

    @cached_property
    def classes(self) -> int | None:  # type: ignore[override]
        return int(self.net.label_dim) or None

    @cached_property
    def null_label(self) -> int | None:  # type: ignore[override]
        return self.classes

    @cached_property
    def network_dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32  # as in the published sampler; a network casts to half precision itself

    def network_time(self, t: Tensor) -> Tensor:
        return self.native.sigma(t)

    def evaluate(self, x: Tensor, time: Tensor, label: Tensor) -> Any:
        if self.classes is None:
            return self.net(x, time, None)
        # The dropped label is number `classes`. Its column is cut off, so it becomes all zeros.
        one_hot = nn.functional.one_hot(label, self.classes + 1)[:, : self.classes]
        return self.net(x, time, one_hot.to(x.dtype))

    def identity(self) -> Iterable[Any]:
        native = self.native
        assert isinstance(native, EDM)
        options = {"sigma_min": native.sigma_min, "sigma_max": native.sigma_max, "data_range": self.data_range}
        yield options | {"factory": self.factory}
        yield self.source
        if self.factory is None:
            yield own_code(pickled_modules(self.source))
        else:
            factory = import_factory(self.factory, self.path)
            yield source_digest(self.factory.partition(":")[0], factory.__module__)


def export_safetensors(
    net: nn.Module,
    destination: str | Path,
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    path: str | list[str] | None = None,
) -> Path:
    """Write an EDM network to a safetensors file that this adapter loads without a pickle.

    Args:
        net: The network, e.g. the entry 'ema' of an opened published pickle.
        destination: A .safetensors file; an existing one is replaced.
        factory: Class of the network, as ``"package.module:name"``, e.g. ``"training.networks:EDMPrecond"``.
        kwargs: Arguments it was built with, as plain values; published networks record theirs (init_kwargs).
        path: Folder of the class's module, if it is not installed.

    Raises:
        ConfigError: The class cannot be built with these arguments, its weights have other names or shapes, or the
            copy's outputs differ from those of ``net``.
    """
    target = Path(destination)
    if target.suffix != ".safetensors":
        raise ConfigError(f"destination must be a file that ends in .safetensors, got {str(destination)!r}")
    if kwargs is None:
        kwargs = getattr(net, "init_kwargs", None)
        if kwargs is None:
            raise ConfigError(
                f"{type(net).__name__} does not record the arguments it was built with; pass them as kwargs"
            )
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in net.state_dict().items()}
    try:
        copy = build_module(import_factory(factory, path), factory, kwargs)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if any(problems := misfit(copy, weights)):
        raise ConfigError(
            f"the weights of the network do not fit {factory} with kwargs {dict(kwargs)}: {problems}; pass the "
            f"arguments the network was built with"
        )
    copy.load_state_dict(weights)
    if not torch.allclose(_probe(copy), _probe(net), rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"{factory} with kwargs {dict(kwargs)} and the same weights gives other outputs than the network; pass "
            f"the arguments the network was built with"
        )
    description = json.dumps({"factory": factory, "kwargs": dict(kwargs)})
    Storage.at(target.parent).write(target.name, save(weights, metadata={METADATA_KEY: description}))
    return target


def _probe(net: nn.Module) -> Tensor:
    """Evaluate D at two noise levels, with a label if the network takes one."""
    first = next(net.parameters())
    channels, size, labels = (int(getattr(net, name)) for name in ("img_channels", "img_resolution", "label_dim"))
    x = torch.linspace(-2, 2, 2 * channels * size * size).view(2, channels, size, size).to(first.device)
    label = torch.eye(labels, device=first.device)[:1].expand(2, labels) if labels else None
    was_training = net.training
    with torch.no_grad():
        answer: Tensor = net.eval()(x, torch.tensor([0.5, 5.0], device=first.device), label)
    net.train(was_training)
    return answer.float().cpu()


ADAPTER = EDMNetwork
