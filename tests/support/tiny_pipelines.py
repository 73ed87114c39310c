"""diffusers pipelines with a few thousand random weights: one for every supported kind, in its real file format."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

# The extra 'diffusers' installs it; the extra 'dev' does not.
transformers = pytest.importorskip("transformers")

VP = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def liven(module: torch.nn.Module, gain: float = 0.5) -> Any:
    """Set random weights with which every input affects the output; newly built networks output nearly zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            random = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(random * gain * (3 if "attn2" in name else 1) / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * random + (1.0 if name.endswith("weight") else 0.0))
            if name.endswith(("time_embedding.linear_1.weight", "timestep_embedder.linear_1.weight")):
                # Trained networks vary slowly between timesteps, so the fast sines and cosines get small weights.
                half = parameter.shape[1] // 2
                parameter.mul_(2 * torch.linspace(0, 1, half).square().repeat(2))
    return module.eval()


def ddpm(prediction: str = "epsilon", *, class_labels: bool = False, **scheduler: Any) -> Any:
    """Unconditional, in pixel space."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=4 if class_labels else None,
    )
    settings = {**VP, "prediction_type": prediction, "clip_sample": False, **scheduler}
    return diffusers.DDPMPipeline(liven(unet), diffusers.DDPMScheduler(**settings))


def vae(channels: int = 4, **config: Any) -> Any:
    """A VAE that halves height and width."""
    return liven(
        diffusers.AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(4, 8),
            norm_num_groups=2,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **config,
        )
    )


def dit(prediction: str = "epsilon", classes: int = 1000) -> Any:
    """Class-conditional, in latent space; the second half of the output channels is a variance."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    scheduler = diffusers.DDIMScheduler(**VP, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    return diffusers.DiTPipeline(liven(transformer), vae(), scheduler)


def _letters() -> list[str]:
    return [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]


def clip(width: int, projection: int | None = None) -> tuple[Any, Any]:
    """A text encoder whose tokens are letters, and its tokenizer."""
    names = [*_letters(), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=20)
    config = transformers.CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        projection_dim=projection or width,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    model = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    return liven(model(config), gain=1.0), tokenizer


def _unet_of_text(width: int, **config: Any) -> Any:
    return liven(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=width,
            attention_head_dim=2,
            **config,
        )
    )


def stable_diffusion(prediction: str = "epsilon", **scheduler: Any) -> Any:
    """Stable Diffusion 1.x (epsilon) and 2.x (v_prediction)."""
    encoder, tokenizer = clip(16)
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=_unet_of_text(16),
        scheduler=diffusers.PNDMScheduler(
            **{**SD, "steps_offset": 1, "skip_prk_steps": True, "prediction_type": prediction, **scheduler}
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """SDXL: two text encoders, a pooled embedding and image sizes."""
    (first, first_tokenizer), (second, second_tokenizer) = clip(16), clip(16, projection=16)
    size_width = 4
    unet = _unet_of_text(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_width,
        projection_class_embeddings_input_dim=6 * size_width + 16,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=first_tokenizer,
        tokenizer_2=second_tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SD),
        add_watermarker=False,
    )


def t5(width: int) -> tuple[Any, Any]:
    """A T5 encoder whose tokens are letters, and its tokenizer."""
    names = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    tokenizer = transformers.T5Tokenizer(vocab=[(name, -1.0) for name in names], extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(names),
        d_model=width,
        d_kv=8,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return liven(transformers.T5EncoderModel(config), gain=1.0), tokenizer


def stable_diffusion_3() -> Any:
    """SD3: a flow on a shifted grid with three text encoders."""
    (first, first_tokenizer), (second, second_tokenizer) = clip(16, projection=16), clip(16, projection=16)
    third, third_tokenizer = t5(32)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=liven(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=first,
        tokenizer=first_tokenizer,
        text_encoder_2=second,
        tokenizer_2=second_tokenizer,
        text_encoder_3=third,
        tokenizer_3=third_tokenizer,
    )


def flux(guidance_embeds: bool = True) -> Any:
    """FLUX: a flow with embedded guidance (dev) or without guidance (schnell)."""
    encoder, tokenizer = clip(16)
    second, second_tokenizer = t5(32)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=second_tokenizer,
        transformer=liven(transformer),
    )


def stable_audio() -> Any:
    """Stable Audio: v_prediction on the continuous cosine path, in latent audio frames, with text and length."""
    encoder, tokenizer = t5(16)
    tokenizer.model_max_length = 12
    transformer = diffusers.StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        global_states_input_dim=32,
        time_proj_dim=16,
    )
    sound = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=1,
        sampling_rate=64,
    )
    return diffusers.StableAudioPipeline(
        vae=liven(sound),
        text_encoder=encoder,
        projection_model=liven(StableAudioProjectionModel(16, 16, min_value=0, max_value=4)),
        tokenizer=tokenizer,
        transformer=liven(transformer),
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(),
    )


#: Constructor and guidance scale of the tests, by name.
KINDS: dict[str, tuple[Callable[[], Any], float]] = {
    "ddpm-epsilon": (ddpm, 1.0),
    "ddpm-v": (lambda: ddpm("v_prediction"), 1.0),
    "dit": (dit, 3.0),
    "sd-epsilon": (stable_diffusion, 3.0),
    "sd-v": (lambda: stable_diffusion("v_prediction"), 3.0),
    "sdxl": (stable_diffusion_xl, 3.0),
    "sd3": (stable_diffusion_3, 3.0),
    "flux": (flux, 3.5),
    "stable-audio": (stable_audio, 3.0),
}

PROMPTS = ["a cat", "two dogs at sea"]
LABELS = [1, 7]
SIDE = 16
"""Side of an image of the latent pipelines: twice the side of the latents."""


def sample_size(pipe: Any) -> int | None:
    """The size to pass to the adapter: FLUX's transformer does not record one, all others do."""
    return 8 if isinstance(pipe, diffusers.FluxPipeline) else None


def noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Standard normal noise for two samples."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, scheduler: Any, steps: int, scale: float, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Run the unchanged pipeline with ``scheduler`` and return its last state, before decoding or clamping.

    Args:
        pipe: A pipeline of this module.
        scheduler: A diffusers scheduler; it stays set on the pipeline.
        steps: num_inference_steps.
        scale: guidance_scale.
        shape: Shape of one sample in the adapter.
        seed: Seed of the noise, the same as in :func:`noise`.
    """
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    states: list[torch.Tensor] = []
    original_step = scheduler.step

    @functools.wraps(original_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        output = original_step(*args, **kwargs)
        states.append(output[0])
        return output

    scheduler.step = step
    generator = torch.Generator().manual_seed(seed)
    try:
        if isinstance(pipe, diffusers.DDPMPipeline | diffusers.DDIMPipeline):
            pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="pt")
            return states[-1]
        if isinstance(pipe, diffusers.DiTPipeline):
            pipe(LABELS, generator=generator, num_inference_steps=steps, guidance_scale=scale, output_type="pt")
            return states[-1][:2]
        start = noise(shape, seed)
        if isinstance(pipe, diffusers.StableAudioPipeline):
            pipe(
                PROMPTS,
                latents=start,
                num_inference_steps=steps,
                guidance_scale=scale,
                output_type="latent",
                audio_end_in_s=None,
            )
            return states[-1]
        channels, height, width = shape
        packs = isinstance(pipe, diffusers.FluxPipeline)
        pipe(
            PROMPTS,
            height=SIDE,
            width=SIDE,
            latents=pipe._pack_latents(start, 2, channels, height, width) if packs else start,
            num_inference_steps=steps,
            guidance_scale=scale,
            output_type="latent",
        )
        return pipe._unpack_latents(states[-1], SIDE, SIDE, 2) if packs else states[-1]
    finally:
        del scheduler.step
