"""How each kind of diffusers pipeline calls its network: one class a kind. Knows nothing of solvers or schedulers.

diffusers is imported by whoever makes the pipeline; here its objects are only used.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from orchestrator.errors import ConfigError

Guidance = Literal["none", "classifier_free", "embedded"]


class PipelineNetwork(ABC):
    """The denoising network of a pipeline, called as the pipeline calls it.

    Args:
        pipe: A diffusers pipeline.
        sample_size: Height and width of a sample in the network's own pixels; None for the pipeline's default.

    Attributes:
        pipelines: Names of the pipeline classes.
        component: Name of the pipeline's component that is the network.
        encoders: Names of the components that turn text into conditioning.
        is_flow: Whether it predicts noise minus data along the straight path; otherwise it predicts epsilon, v or x.
        is_continuous: Whether it predicts v on the cosine path, at times 0..1; otherwise it is asked at timesteps.
        scales_noise: Whether the pipeline multiplies its noise by the scheduler's ``init_noise_sigma``.
        guidance: Classifier-free, an input of the network, or none at all.
        channels: Channels of a sample, as the network takes it.
        shape: Shape of one sample.
        rate: Samples a second of decoded sound; None for images.
    """

    pipelines: ClassVar[tuple[str, ...]]
    component: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]] = ()
    is_flow: ClassVar[bool] = False
    is_continuous: ClassVar[bool] = False
    scales_noise: ClassVar[bool] = False
    guidance: Guidance = "none"
    rate: int | None = None

    def __init__(self, pipe: Any, sample_size: int | None = None):
        self.pipe = pipe
        self.net: torch.nn.Module = getattr(pipe, self.component)
        self.config: Any = self.net.config
        self.shape = self._shape(sample_size)
        self._check_network()

    def _shape(self, sample_size: int | None) -> tuple[int, ...]:
        own = self.config.sample_size
        height, width = (own, own) if isinstance(own, int) else tuple(own)
        if sample_size is not None:
            height = width = sample_size
        return (self.config.in_channels, height, width)

    def _check_network(self) -> None:  # noqa: B027 (optional)
        """Refuse networks of this class whose inputs are others than those given here.

        Raises:
            ConfigError: Naming what the network wants.
        """

    def _refuse(self, key: str, wants: str) -> None:
        raise ConfigError(
            f"the {type(self.net).__name__} of this pipeline has {key}={self.config[key]!r}: {wants}, which "
            f"{type(self.pipe).__name__} does not give; choose another pipeline"
        )

    @abstractmethod
    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        """The raw output for a batch.

        Args:
            x: Shape (B, *shape), in the network's dtype.
            timestep: Shape (B,), float32, in the pipeline's own units.
            condition: Shape (B, ...).
            guidance_scale: Embedded guidance; of no meaning to networks of other kinds.
        """

    def check_condition(self, condition: Tensor) -> None:  # noqa: B027 (optional)
        """See :meth:`ModelAdapter.check_condition`."""

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition

    def decode(self, samples: Tensor) -> Tensor:
        """Images in [-1, 1] (not clamped), shape (B, channels, height, width), or sound, (B, channels, samples)."""
        return samples.float()


class UNet2D(PipelineNetwork):
    """Unconditional pixel models: DDPM's and DDIM's pipelines (Ho et al. 2020)."""

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
    """What works on a VAE's latents."""

    def decode(self, samples: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = samples / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        with torch.no_grad():
            return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


class DiT(_Latent):
    """Class-conditional diffusion transformers (Peebles & Xie 2023); dropped labels are one class more."""

    pipelines = ("DiTPipeline",)
    component = "transformer"
    guidance: Guidance = "classifier_free"

    def _check_network(self) -> None:
        if self.shape[1:] != (self.config.sample_size,) * 2:
            raise ConfigError(
                f"sample_size is {self.shape[1]}, but the positions of this transformer are {self.config.sample_size}; "
                f"leave sample_size out"
            )

    @property
    def classes(self) -> int:
        return int(self.config.num_embeds_ada_norm)

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        output = self.net(x, timestep=timestep, class_labels=condition, return_dict=False)[0]
        return output[:, : x.shape[1]]  # the rest is its variance

    def check_condition(self, condition: Tensor) -> None:
        unknown = condition[(condition < 0) | (condition >= self.classes)]
        if len(unknown):
            raise ConfigError(
                f"label {unknown[0].item():g} is none of this model's {self.classes} classes; set "
                f"conditioning.options.classes to {self.classes} or fewer"
            )

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, self.classes)


class _Text(_Latent):
    """What is conditioned on text: the embeddings' parts, flattened into one vector a prompt."""

    guidance: Guidance = "classifier_free"
    _null: Tensor | None = None
    #: Shapes of the parts of a condition, in their order in the vector; known once a prompt has been encoded.
    _layout: dict[str, tuple[int, ...]] | None = None

    @abstractmethod
    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The parts of these prompts' conditioning, each (B, ...), and those of dropped prompts."""

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parts of a condition, in their order in the vector."""
        if self._layout is None:
            self._null = self.encode([""], dropped=True)
        assert self._layout is not None
        return self._layout

    def encode(self, prompts: list[str], *, dropped: bool = False) -> Tensor:
        """The conditioning of these prompts, shape (B, width), float32, on the encoders' device.

        Args:
            prompts: Text.
            dropped: Whether the conditioning that stands for a dropped prompt is wanted instead.
        """
        with torch.no_grad():
            given, null = self._embed(prompts)
        parts = null if dropped and null is not None else given
        self._layout = {name: tuple(part.shape[1:]) for name, part in parts.items()}
        return torch.cat([part.float().flatten(1) for part in parts.values()], dim=1)

    def unpack(self, condition: Tensor) -> dict[str, Tensor]:
        """The parts of a condition (B, width), in the network's dtype."""
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
                f"conditioning of shape {tuple(condition.shape)} and {condition.dtype} for a model of text, which "
                f"takes {width} numbers a prompt; set conditioning.name to prompts"
            )


class StableDiffusion(_Text):
    """Stable Diffusion 1.x and 2.x: a latent U-Net with cross-attention to CLIP's tokens (Rombach et al. 2022)."""

    pipelines = ("StableDiffusionPipeline",)
    component = "unet"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    scales_noise = True

    def _check_network(self) -> None:
        if self.config.in_channels != self.pipe.vae.config.latent_channels:
            self._refuse("in_channels", "an image or a mask beside the latents")
        for key in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
            if self.config.get(key) is not None:
                self._refuse(key, "class labels or an embedded guidance scale")

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor, guidance_scale: float) -> Tensor:
        parts = self.unpack(condition)
        return self.net(x, timestep, encoder_hidden_states=parts["prompt_embeds"], return_dict=False)[0]

    def _embed(self, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        given, null = self.pipe.encode_prompt(prompts, self.pipe.device, 1, True)
        return {"prompt_embeds": given}, {"prompt_embeds": null}


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled embedding, and the image's size as an input (Podell et al. 2023)."""

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
        given, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=prompts, device=self.pipe.device, do_classifier_free_guidance=True
        )
        size = tuple(side * self.pipe.vae_scale_factor for side in self.shape[1:])
        time_ids = torch.tensor([*size, 0, 0, *size], device=given.device, dtype=given.dtype).repeat(len(given), 1)
        return (
            {"prompt_embeds": given, "pooled_prompt_embeds": pooled, "time_ids": time_ids},
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
        given, null, pooled, null_pooled = self.pipe.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, device=self.pipe.device
        )
        return (
            {"prompt_embeds": given, "pooled_prompt_embeds": pooled},
            {"prompt_embeds": null, "pooled_prompt_embeds": null_pooled},
        )


class Flux(_Text):
    """FLUX.1: a flow in latents, whose guidance scale is an input of the network (dev) or distilled away (schnell).

    A sample has the VAE's channels; the pipeline works on the same numbers packed in 2x2 patches.
    """

    pipelines = ("FluxPipeline",)
    component = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    is_flow = True

    def __init__(self, pipe: Any, sample_size: int | None = None):
        super().__init__(pipe, sample_size)
        self.guidance = "embedded" if self.config.guidance_embeds else "none"

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
        given, pooled, _ = self.pipe.encode_prompt(prompt=prompts, prompt_2=None, device=self.pipe.device)
        return {"prompt_embeds": given, "pooled_prompt_embeds": pooled}, None


class StableAudio(_Text):
    """Stable Audio Open: a transformer over latent frames of sound, conditioned on text and length (Evans et al. 2024).

    Every sample is as long as the model allows. A dropped prompt is zeros; the length stays.
    """

    pipelines = ("StableAudioPipeline",)
    component = "transformer"
    encoders = ("text_encoder", "projection_model")
    is_continuous = True
    scales_noise = True

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
        given = torch.cat([text, start, end], dim=1)
        lengths = torch.cat([start, end], dim=2)
        return (
            {"prompt_embeds": given, "duration_embeds": lengths},
            {"prompt_embeds": torch.zeros_like(given), "duration_embeds": lengths},
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
"""The network's class by the name of the pipeline's class, as ``model_index.json`` has it."""
