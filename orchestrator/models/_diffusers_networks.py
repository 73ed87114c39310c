"""How each type of diffusers pipeline calls its network, one class per type; independent of solvers and schedulers.

The caller that builds the pipeline imports diffusers; this module only uses its objects.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from orchestrator.errors import ConfigError

Guidance = Literal["none", "classifier_free", "embedded"]
ScaledBy = Literal["init_noise_sigma", "scale_model_input", "nothing"]


class PipelineNetwork(ABC):
    """The denoising network of a pipeline, called in the same way as the pipeline calls it.

    Args:
        pipe: A diffusers pipeline.
        sample_size: Height and width of a sample in the network's own pixels; None for the pipeline's default.

    Attributes:
        pipelines: Names of the pipeline classes.
        component: Name of the pipeline component that is the network.
        encoders: Names of the components that turn text into conditioning.
        is_flow: Whether the network predicts noise minus data on the straight path; otherwise it predicts epsilon, v
            or x.
        is_continuous: Whether it predicts v on the cosine path, at times 0..1; otherwise it is evaluated at timesteps.
        scaled_by: By what the noise is scaled before the network gets it: the scheduler's ``init_noise_sigma``, its
            ``scale_model_input`` alone, or nothing.
        guidance: Classifier-free guidance, guidance as an input of the network (embedded), or none.
        channels: Channels of a sample at the network's input.
        shape: Shape of one sample.
        rate: Sample rate of decoded sound in Hz; None for images.
    """

    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]] = ()
    is_flow: ClassVar[bool] = False
    is_continuous: ClassVar[bool] = False
    scaled_by: ClassVar[ScaledBy] = "nothing"
    guidance: Guidance = "none"
    rate: int | None = None

    def __init__(self, pipe: Any, sample_size: int | None = None):
        self.pipe = pipe
        self.net: torch.nn.Module = getattr(pipe, self.component)
        self.config: Any = self.net.config
        self.shape = self._shape(sample_size)
        self._check_network()

    def _shape(self, sample_size: int | None) -> tuple[int, ...]:
        self.check_size(self.config, sample_size)
        size = self.config.sample_size if sample_size is None else sample_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (self.config.in_channels, height, width)

    @classmethod
    def check_size(cls, config: Mapping[str, Any], sample_size: int | None) -> None:
        """Refuse to guess the size of a sample that neither the network's configuration nor the option gives.

        Raises:
            ConfigError: Both are missing.
        """
        if sample_size is None and config.get("sample_size") is None:
            raise ConfigError(
                "the network's config.json has no sample_size; set the option sample_size to the height and width of a "
                "sample at the network's input (in latents, for latent models)"
            )

    def _check_network(self) -> None:  # noqa: B027 (optional)
        """Refuse networks of this class that need inputs which this call does not provide.

        Raises:
            ConfigError: The network needs another input; the message names it.
        """

    def _refuse(self, key: str, wants: str) -> None:
        raise ConfigError(
            f"the {type(self.net).__name__} of this pipeline has {key}={self.config[key]!r}, so it needs {wants}, "
            f"which {type(self.pipe).__name__} does not provide; choose another pipeline"
        )

    @abstractmethod
    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        """The raw output for a batch.

        Args:
            x: Shape (B, *shape), in the network's dtype.
            timestep: Shape (B,), float32, in the pipeline's own units.
            condition: Shape (B, ...).
            guidance_scale: Scale of embedded guidance; other networks ignore it.
        """

    def check_condition(self, condition: Tensor) -> None:  # noqa: B027 (optional)
        """See :meth:`ModelAdapter.check_condition`."""

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def decode(self, samples: Tensor) -> Tensor:
        """Decode to images in [-1, 1] (not clamped), (B, channels, height, width), or sound, (B, channels, samples)."""
        return samples.float()


class UNet2D(PipelineNetwork):
    """Unconditional pixel models: the DDPM and DDIM pipelines (Ho et al. 2020)."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    component = "unet"

    def _check_network(self) -> None:
        if self.config.time_embedding_type != "positional":
            self._refuse("time_embedding_type", "times other than real-valued timesteps")
        for key in ("num_class_embeds", "class_embed_type"):
            if self.config.get(key) is not None:
                self._refuse(key, "class labels")

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        # A network that also predicts its variance has twice the channels.
        return self.net(x, timestep, return_dict=False)[0][:, : x.shape[1]]

    def check_condition(self, condition: Tensor) -> None:
        labels = condition[condition != 0]
        if len(labels):
            raise ConfigError(
                f"label {labels[0].item():g} for a model without classes; set conditioning.options.classes to 1"
            )


class _Latent(PipelineNetwork):
    """A network on the latents of a VAE."""

    def decode(self, samples: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = samples / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        with torch.no_grad():
            return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


class DiT(_Latent):
    """Class-conditional diffusion transformers (Peebles & Xie 2023); dropped labels are one additional class."""

    pipelines = ("DiTPipeline",)
    component = "transformer"
    scaled_by = "scale_model_input"
    guidance: Guidance = "classifier_free"

    def _check_network(self) -> None:
        if self.shape[1:] != (self.config.sample_size,) * 2:
            raise ConfigError(
                f"sample_size is {self.shape[1]}, but this transformer has positions for {self.config.sample_size}; "
                f"leave sample_size out"
            )

    @property
    def classes(self) -> int:
        return int(self.config.num_embeds_ada_norm)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        output = self.net(x, timestep=timestep, class_labels=condition, return_dict=False)[0]
        return output[:, : x.shape[1]]  # the other channels are the predicted variance

    def check_condition(self, condition: Tensor) -> None:
        unknown = condition[(condition < 0) | (condition >= self.classes)]
        if len(unknown):
            raise ConfigError(
                f"label {unknown[0].item():g} is not one of this model's {self.classes} classes; set "
                f"conditioning.options.classes to {self.classes} or fewer"
            )

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.classes)


class _Text(_Latent):
    """A network conditioned on text; the parts of the embeddings are flattened into one vector per prompt."""

    guidance: Guidance = "classifier_free"
    _null: Tensor | None = None
    #: Shapes of the parts of a condition, in their order in the vector; set when the first prompt is encoded.
    _layout: dict[str, tuple[int, ...]] | None = None

    @abstractmethod
    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Encode prompts to the parts of their conditioning, each (B, ...), and those for dropped prompts."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parts of a condition, in their order in the vector."""
        if self._layout is None:
            self._null = self.encode([""], dropped=True)
        assert self._layout is not None
        return self._layout

    def encode(self, prompts: list[str], *, dropped: bool = False) -> Tensor:
        """Encode prompts to conditioning, shape (B, width), float32, on the encoders' device.

        Args:
            prompts: The prompts.
            dropped: Whether to return the conditioning that stands for dropped prompts instead.
        """
        with torch.no_grad():
            kept, null = self._embed(prompts)
        parts = null if dropped and null is not None else kept
        self._layout = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        return torch.cat([part.float().flatten(1) for part in parts.values()], dim=1)

    def unpack(self, condition: Tensor) -> dict[str, Tensor]:
        """Split a condition (B, width) into its named parts, in the network's dtype."""
        sizes = [math.prod(shape) for shape in self.layout.values()]
        parts = condition.to(next(self.net.parameters()).dtype).split(sizes, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.layout.items(), parts, strict=True)}

    def null_condition(self, condition: Tensor) -> Tensor:
        if self._null is None:
            self._null = self.encode([""], dropped=True)
        return self._null.to(condition.device, condition.dtype).expand(len(condition), -1)

    def check_condition(self, condition: Tensor) -> None:
        width = sum(math.prod(shape) for shape in self.layout.values())
        if condition.ndim != 2 or not condition.is_floating_point() or condition.shape[1] != width:
            raise ConfigError(
                f"conditioning has shape {tuple(condition.shape)} and {condition.dtype}, but this text model takes "
                f"{width} numbers per prompt; set conditioning.name to prompts"
            )


class StableDiffusion(_Text):
    """Stable Diffusion 1.x and 2.x: a latent U-Net with cross-attention to CLIP tokens (Rombach et al. 2022)."""

    pipelines = ("StableDiffusionPipeline",)
    component = "unet"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    scaled_by = "init_noise_sigma"

    def _check_network(self) -> None:
        if self.config.in_channels != self.pipe.vae.config.latent_channels:
            self._refuse("in_channels", "an image or a mask in addition to the latents")
        for key in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
            if self.config.get(key) is not None:
                self._refuse(key, "class labels or an embedded guidance scale")

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        parts = self.unpack(condition)
        return self.net(x, timestep, encoder_hidden_states=parts["prompt_embeds"], return_dict=False)[0]

    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        embeds, null = self.pipe.encode_prompt(prompts, self.pipe.device, 1, True)
        return {"prompt_embeds": embeds}, {"prompt_embeds": null}


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding, and the image size as an input (Podell et al. 2023)."""

    pipelines = ("StableDiffusionXLPipeline",)
    encoders = ("text_encoder", "text_encoder_2")

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        parts = self.unpack(condition)
        return self.net(
            x,
            timestep,
            encoder_hidden_states=parts["prompt_embeds"],
            added_cond_kwargs={"text_embeds": parts["pooled_prompt_embeds"], "time_ids": parts["time_ids"]},
            return_dict=False,
        )[0]

    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        embeds, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=prompts, device=self.pipe.device, do_classifier_free_guidance=True
        )
        size = tuple(side * self.pipe.vae_scale_factor for side in self.shape[1:])
        time_ids = torch.tensor([*size, 0, 0, *size], device=embeds.device, dtype=embeds.dtype).repeat(len(embeds), 1)
        return (
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "time_ids": time_ids},
            {"prompt_embeds": null, "pooled_prompt_embeds": null_pooled, "time_ids": time_ids},
        )


class StableDiffusion3(_Text):
    """Stable Diffusion 3: a rectified flow in latents, conditioned on three text encoders (Esser et al. 2024)."""

    pipelines = ("StableDiffusion3Pipeline",)
    component = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    is_flow = True

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        parts = self.unpack(condition)
        return self.net(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=parts["prompt_embeds"],
            pooled_projections=parts["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        embeds, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=self.pipe.device
        )
        return (
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            {"prompt_embeds": null, "pooled_prompt_embeds": null_pooled},
        )


class Flux(_Text):
    """FLUX.1: a flow in latents; the guidance scale is an input of the network (dev) or distilled away (schnell).

    Samples have the channels of the VAE. The pipeline works on the same numbers, packed into 2x2 patches.
    """

    pipelines = ("FluxPipeline",)
    component = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    is_flow = True

    def __init__(self, pipe: Any, sample_size: int | None = None):
        super().__init__(pipe, sample_size)
        self.guidance = "embedded" if self.config.guidance_embeds else "none"

    @classmethod
    def check_size(cls, config: Mapping[str, Any], sample_size: int | None) -> None:
        """The pipeline has a default of its own."""

    def _shape(self, sample_size: int | None) -> tuple[int, ...]:
        side = self.pipe.default_sample_size if sample_size is None else sample_size
        if side % 2:
            raise ConfigError(f"sample_size is {side}, but FLUX packs latents in 2x2 patches; give an even number")
        return (self.config.in_channels // 4, side, side)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        parts = self.unpack(condition)
        count, channels, height, width = x.shape
        text_ids = torch.zeros(parts["prompt_embeds"].shape[1], 3, device=x.device, dtype=x.dtype)
        image_ids = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, x.device, x.dtype)
        scale = torch.full((count,), guidance_scale, device=x.device) if self.guidance == "embedded" else None
        output = self.net(
            hidden_states=self.pipe._pack_latents(x, count, channels, height, width),
            timestep=timestep / 1000,
            guidance=scale,
            pooled_projections=parts["pooled_prompt_embeds"],
            encoder_hidden_states=parts["prompt_embeds"],
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        patches = output.view(count, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        embeds, pooled, _ = self.pipe.encode_prompt(prompt=prompts, prompt_2=None, device=self.pipe.device)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, None


class StableAudio(_Text):
    """Stable Audio Open: a transformer over latent frames of sound, conditioned on text and length (Evans et al. 2024).

    Every sample has the maximum length of the model. A dropped prompt is encoded as zeros; the length is kept.
    """

    pipelines = ("StableAudioPipeline",)
    component = "transformer"
    encoders = ("text_encoder", "projection_model")
    is_continuous = True
    scaled_by = "init_noise_sigma"

    def _shape(self, sample_size: int | None) -> tuple[int, ...]:
        if sample_size is not None:
            raise ConfigError(
                f"sample_size is {sample_size}, but StableAudioPipeline always samples "
                f"{self.config.sample_size} frames; leave it out"
            )
        return (self.config.in_channels, self.config.sample_size)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        parts = self.unpack(condition)
        positions = get_1d_rotary_pos_embed(
            self.pipe.rotary_embed_dim, x.shape[2] + 1, use_real=True, repeat_interleave_real=False
        )
        return self.net(
            x,
            timestep,
            encoder_hidden_states=parts["prompt_embeds"],
            global_hidden_states=parts["duration_embeds"],
            rotary_embedding=tuple(part.to(x.device) for part in positions),
            return_dict=False,
        )[0]

    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        pipe = self.pipe
        text = pipe.encode_prompt(prompts, pipe.device, False)
        seconds = self.config.sample_size * pipe.vae.hop_length / pipe.vae.config.sampling_rate
        start, end = pipe.encode_duration(0.0, seconds, pipe.device, False, len(prompts))
        embeds = torch.cat([text, start, end], dim=1)
        lengths = torch.cat([start, end], dim=2)
        return (
            {"prompt_embeds": embeds, "duration_embeds": lengths},
            {"prompt_embeds": torch.zeros_like(embeds), "duration_embeds": lengths},
        )

    @property
    def rate(self) -> int:  # type: ignore[override]
        return int(self.pipe.vae.config.sampling_rate)

    def decode(self, samples: Tensor) -> Tensor:
        vae = self.pipe.vae
        with torch.no_grad():
            return vae.decode(samples.to(vae.dtype)).sample.float()


NETWORKS: dict[str, type[PipelineNetwork]] = {
    pipeline: network
    for network in (UNet2D, DiT, StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, StableAudio)
    for pipeline in network.pipelines
}
"""Network class for each pipeline class name in ``model_index.json``."""
