"""Frozen diffusers pipelines: images or sound, pixels or latents, classes or text, diffusion or flow, as saved.

The *shift* of a flow (SD3, FLUX) is not a property of its velocity: it only moves the pipeline's own time grid. It is
not read here, because the distilled grid replaces that grid. The same holds for timestep spacing and offsets.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.content import digest, network_digest, own_code
from orchestrator.errors import ConfigError
from orchestrator.models._diffusers_files import chosen_variant, pipeline_json
from orchestrator.models._diffusers_networks import NETWORKS, PipelineNetwork, UNet2D, _Text
from orchestrator.models.base import CompiledNetwork, ModelAdapter, expand_time
from orchestrator.plugins import FOLDER_OR_NAME
from orchestrator.weights.frozen import freeze
from solvers.prediction import Prediction, PredictionField
from solvers.schedulers import CondOT, Cosine, DiscreteVP, Scheduler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOW_TIMESTEPS = 1000
"""Largest timestep of flow pipelines: timesteps run from 0 (data) to this (noise)."""

_SCHEDULER = "scheduler/scheduler_config.json"


def load_pipeline(pipeline: str, dtype: str = "float32", variant: str | None = None) -> Any:
    """Load a pipeline and its weights to the CPU, from safetensors or, without those, from tensor-only .bin files.

    Args:
        pipeline: A folder or a hub id.
        dtype: 'float32', 'bfloat16' or 'float16'.
        variant: See the option of :class:`DiffusersModel`.

    Raises:
        ConfigError: The pipeline cannot be found or loaded, or its class has no adapter.
    """
    index = pipeline_json(pipeline)
    _check_class(pipeline, index)
    from diffusers import DiffusionPipeline

    # The safety filter only replaces images by black ones; it does not affect the velocity.
    left_out: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    overrides = left_out if "safety_checker" in index else {}
    variant = chosen_variant(pipeline, NETWORKS[index["_class_name"]].component, variant)
    try:
        # Both libraries open .bin files with weights_only=True, which runs no code from them.
        pipe = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=DTYPES[dtype], variant=variant, **overrides)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"pipeline {pipeline!r} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_class(pipeline: str, index: dict[str, Any]) -> None:
    name = index.get("_class_name")
    if name not in NETWORKS:
        raise ConfigError(
            f"pipeline {pipeline!r} is a {name}, which has no adapter; there are adapters for {', '.join(NETWORKS)}"
        )


def native_path(network: type[PipelineNetwork], name: str, config: Mapping[str, Any]) -> tuple[Prediction, Scheduler]:
    """The prediction and the training path of a network, read from its pipeline's scheduler.

    Args:
        network: Class of the network.
        name: Class name of the pipeline's scheduler.
        config: Configuration of that scheduler.

    Raises:
        ConfigError: The scheduler does not define them, or does not match the network.
    """
    predicts = config.get("prediction_type", "flow_prediction" if name.startswith("FlowMatch") else "epsilon")
    if network.is_flow != (predicts == "flow_prediction"):
        raise ConfigError(
            f"the pipeline's scheduler {name} is for a prediction of {predicts!r}, but its network is a "
            f"{'flow' if network.is_flow else 'diffusion model'}; give it the scheduler it was published with"
        )
    if network.is_flow:
        return "velocity", CondOT()
    if network.is_continuous:
        if predicts != "v_prediction" or config.get("sigma_data") != 1.0:
            raise ConfigError(
                f"the pipeline's scheduler {name} has prediction_type {predicts!r} and sigma_data "
                f"{config.get('sigma_data')}, but its network was trained for v_prediction and 1.0; give it the "
                f"scheduler it was published with"
            )
        # sigma = tan(pi t' / 2) at the network's time t', with inputs scaled to unit variance, is the cosine path.
        return predicts, Cosine()
    if predicts not in ("epsilon", "sample", "v_prediction") or name.startswith("EDM"):
        raise ConfigError(
            f"the pipeline's scheduler {name} has prediction_type {predicts!r}; supported are epsilon, sample and "
            f"v_prediction at discrete timesteps"
        )
    from diffusers import DDPMScheduler

    # All schedulers of this family share these keys, and DDPMScheduler accepts all of them.
    known = {key: config[key] for key in _PATH_KEYS if key in config}
    training: Any = DDPMScheduler(**known)
    betas = training.betas.double()
    if predicts == "epsilon" and float(betas[-1]) == 1:
        raise ConfigError(
            "the pipeline's scheduler has zero terminal SNR (rescale_betas_zero_snr) but predicts epsilon, which does "
            "not determine the data from pure noise; such networks predict v_prediction: check prediction_type"
        )
    return predicts, DiscreteVP(betas=tuple(betas.tolist()))


_PATH_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass
class DiffusersModel(ModelAdapter):
    """A diffusers pipeline: DDPM, DDIM, DiT, Stable Diffusion 1, 2, XL and 3, FLUX or Stable Audio.

    Latent models are sampled and scored in latents; :meth:`decode` returns images or sound. PSNR uses a data range of
    2 for latents too, although they are unbounded; differences between solvers do not depend on it.

    The guidance scale has the meaning it has in the pipeline: classifier-free guidance or, for FLUX.1 dev, an input of
    the network. Ground truth is never clipped or thresholded, even if the pipeline's own scheduler does so.

    Attributes:
        pipeline: A folder written by ``save_pretrained``, or a hub id ``owner/name``.
        dtype: Dtype of the networks: float32, bfloat16 or float16. It is part of the digest.
        sample_size: Height and width of a sample, in latents for latent models; the pipeline's default if left out.
        variant: Variant of the weights' files, e.g. ``fp16``; needed only if there are several, or on the hub. It is
            loaded in ``dtype``, and not part of the digest, which covers the weights themselves.

    Raises:
        ConfigError: The pipeline cannot be found or used; the message gives the remedy.
    """

    pipeline: str = field(metadata=FOLDER_OR_NAME)
    dtype: str = "float32"
    sample_size: int | None = None
    variant: str | None = None
    network: PipelineNetwork = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.check({f.name: getattr(self, f.name) for f in fields(self) if f.init})
        self._bind(load_pipeline(self.pipeline, self.dtype, self.variant), Path(self.pipeline).name)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        known = {f.name for f in fields(cls) if f.init}
        pipeline, dtype, size = options.get("pipeline"), options.get("dtype", "float32"), options.get("sample_size")
        variant = options.get("variant")
        if not isinstance(pipeline, str) or set(options) - known:
            raise ConfigError(
                f"model adapter 'diffusers' takes the options 'pipeline' (a folder or a hub id), 'dtype', "
                f"'sample_size' and 'variant'; got {options}"
            )
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(f"sample_size must be a positive integer, got {size!r}; leave it out for the default")
        if variant is not None and not (isinstance(variant, str) and variant.isidentifier()):
            raise ConfigError(f"variant must be a word such as fp16, got {variant!r}")
        index = pipeline_json(pipeline)
        _check_class(pipeline, index)
        network = NETWORKS[index["_class_name"]]
        needed = ["diffusers", *(["transformers"] if network.encoders else [])]
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(f"{index['_class_name']} needs {missing[0]}; pip install 'bespoke-solvers[diffusers]'")
        _, scheduler = index.get("scheduler") or (None, None)
        if scheduler is None:
            raise ConfigError(f"pipeline {pipeline!r} has no scheduler; give it the one it was published with")
        native_path(network, scheduler, pipeline_json(pipeline, _SCHEDULER))
        chosen_variant(pipeline, network.component, variant)
        network.check_size(pipeline_json(pipeline, f"{network.component}/config.json"), size)

    @classmethod
    def check_conditioning(cls, options: dict[str, Any], dataset: Any) -> None:
        index = pipeline_json(options["pipeline"])
        _check_kind(options["pipeline"], NETWORKS[index["_class_name"]], dataset)

    @classmethod
    def default_conditioning(cls, options: dict[str, Any]) -> dict[str, Any]:
        index = pipeline_json(options["pipeline"])
        network = NETWORKS[index["_class_name"]]
        if issubclass(network, _Text):
            raise ConfigError(
                f"{options['pipeline']} is a text model; name the dataset 'prompts' with a file of yours that has one "
                f"prompt per line"
            )
        config = pipeline_json(options["pipeline"], f"{network.component}/config.json")
        return {"name": "labels", "options": {"classes": config.get("num_embeds_ada_norm") or 1}}

    @classmethod
    def check_guidance(cls, options: dict[str, Any], scale: float) -> None:
        if scale != 1 and pipeline_json(options["pipeline"])["_class_name"] in UNet2D.pipelines:
            raise ConfigError(
                f"guidance scale {scale:g} has no effect on {options['pipeline']}, whose network has no condition that "
                f"could be dropped; set guidance_scale to 1"
            )

    @classmethod
    def of(cls, pipe: Any, sample_size: int | None = None) -> DiffusersModel:
        """Wrap a pipeline that is already in memory; it is frozen and stays on its device.

        Args:
            pipe: A diffusers pipeline.
            sample_size: See the option of the class.
        """
        _check_class(type(pipe).__name__, {"_class_name": type(pipe).__name__})
        model = cls.__new__(cls)
        model.pipeline, model.sample_size = str(pipe.config.get("_name_or_path") or type(pipe).__name__), sample_size
        model.variant, model.dtype = None, str(pipe.dtype).removeprefix("torch.")
        model._bind(pipe, Path(model.pipeline).name)
        return model

    def _bind(self, pipe: Any, name: str) -> None:
        self.network = NETWORKS[type(pipe).__name__](pipe, self.sample_size)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                freeze(component)
        scheduler = pipe.scheduler
        self.prediction, self.native = native_path(type(self.network), type(scheduler).__name__, scheduler.config)
        self.name, self.shape, self.data_range = name, self.network.shape, 2.0
        self.rate, self.scales_start = self.network.rate, self.network.scaled_by != "nothing"
        self.parameters = sum(parameter.numel() for parameter in self.network.net.parameters())
        self.digest = digest(*_identity(self.network, self.prediction, self.native))

    @property
    def network_dtype(self) -> torch.dtype:
        return next(self.network.net.parameters()).dtype

    def to(self, device: str) -> DiffusersModel:
        self.network.pipe.to(device)
        return self

    def compiled(self) -> DiffusersModel:
        twin, twin.network = copy.copy(self), copy.copy(self.network)
        twin.network.net = CompiledNetwork(self.network.net, self.name)
        return twin

    def predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self._evaluate(x, t, condition, 1.0)

    def _evaluate(self, x: Tensor, t: Tensor, condition: Tensor, embedded_guidance: float) -> Tensor:
        times = expand_time(self.timestep(t), x.float())
        inner = x.to(self.network_dtype)
        output = self.network(inner, times, condition, embedded_guidance).to(x.dtype)
        # Flows in diffusers point from data to noise.
        return -output if self.network.is_flow else output

    def timestep(self, t: Tensor) -> Tensor:
        """The pipeline's timestep at native time ``t``: real-valued, float64, of the same shape."""
        if isinstance(self.native, DiscreteVP):
            return self.native.timestep(t)
        return 1 - t if self.network.is_continuous else FLOW_TIMESTEPS * (1 - t)

    def network_time(self, t: Tensor) -> Tensor:
        return self.timestep(t)

    def encode_conditions(self, condition: Tensor, dataset: Any) -> Tensor:
        """Encode the conditions of a dataset for the network: text is encoded, labels are kept.

        Args:
            condition: Conditions drawn by ``dataset``, int64, shape (B,).
            dataset: The source of the conditions; it must have ``texts`` for text models.

        Returns:
            Labels unchanged; for text, float32 of shape (B, width) with all parts of the embeddings in one vector.

        Raises:
            ConfigError: The model takes text and the dataset has none, or the reverse.
        """
        _check_kind(self.name, type(self.network), dataset)
        if not isinstance(self.network, _Text):
            labels: Tensor = super().encode_conditions(condition, dataset)
            return labels
        return self.network.encode(dataset.texts(condition.tolist())).cpu()

    def check_condition(self, condition: Tensor) -> None:
        self.network.check_condition(condition)

    def null_condition(self, condition: Tensor) -> Tensor:
        return self.network.null_condition(condition)

    def forwards_per_evaluation(self, guidance_scale: float) -> int:
        return super().forwards_per_evaluation(guidance_scale) if self.network.guidance == "classifier_free" else 1

    def field(self, condition: Tensor, guidance_scale: float) -> PredictionField:
        """See the base class.

        Raises:
            ConfigError: The model does not support guidance, but the scale is not 1.
        """
        kind = self.network.guidance
        if kind == "classifier_free" and guidance_scale != 1:
            return super().field(condition, guidance_scale)
        if kind == "none" and guidance_scale != 1:
            raise ConfigError(
                f"guidance_scale is {guidance_scale:g}, but {self.name} does not support guidance; set it to 1"
            )
        # Without guidance, neither a dropped condition nor the text encoders that make it are needed.
        return PredictionField(
            lambda x, t: self._evaluate(x, t, condition.clone(), guidance_scale),
            self.prediction,
            self.native,
            self.scheduler,
        )

    def decode(self, samples: Tensor) -> Tensor:
        """Decode samples (B, *shape) to images in about [-1, 1] or sound, float32; latent models use the VAE."""
        return self.network.decode(samples)


def _check_kind(name: str, network: type[PipelineNetwork], dataset: Any) -> None:
    has_texts = hasattr(dataset, "texts")
    if issubclass(network, _Text) != has_texts:
        kind, suitable = ("a text model", "prompts") if not has_texts else ("not a text model", "labels")
        raise ConfigError(
            f"{name} is {kind}, so {type(dataset).__name__} does not fit it; set conditioning.name to {suitable}"
        )


def _identity(network: PipelineNetwork, prediction: str, native: Scheduler) -> Iterator[Any]:
    """Everything that samples depend on, decoded or not: networks, tokenizers, and the path.

    The file format, the pipeline's sampler and the sample size are not part of it; the size is part of the pair spec.
    """
    components: dict[str, Any] = network.pipe.components
    for name in sorted(components):
        component = components[name]
        if name in NOT_MEASURED or component is None:
            continue
        yield name
        if isinstance(component, torch.nn.Module):
            yield network_digest(component)
        elif name.startswith("tokenizer"):
            yield from _tokenizer_parts(component)
    betas = native.betas if isinstance(native, DiscreteVP) else None
    yield [prediction, native.name, betas, network.pipe.config.get("force_zeros_for_empty_prompt")]


NOT_MEASURED = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")
"""Components of pipelines that no sample depends on. The path that a scheduler defines is part of the digest."""


def _tokenizer_parts(tokenizer: Any) -> Iterator[Any]:
    """What texts are split by: the vocabulary and rules, limits and special tokens, and code of the user's own."""
    yield own_code([type(tokenizer).__module__])
    yield [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side]
    yield {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        yield {key: value for key, value in rules.items() if key not in ("truncation", "padding")}  # set by each call
        return
    with tempfile.TemporaryDirectory() as folder:
        yield from sorted(map(Path, tokenizer.save_vocabulary(folder)))


ADAPTER = DiffusersModel
