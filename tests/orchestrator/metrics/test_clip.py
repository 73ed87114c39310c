"""CLIP score and PickScore agree with transformers, on a tiny random CLIP saved in its own file format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from orchestrator import plugins
from orchestrator.datasets.digits import Digits
from orchestrator.datasets.prompts import Prompts
from orchestrator.errors import ConfigError
from orchestrator.features.inception import to_uint8
from orchestrator.metrics.base import Batch

transformers = pytest.importorskip("transformers")

PROMPTS = Prompts(prompts=("a cat", "a dog on a mat", "tea"))


@dataclass(frozen=True)
class SavedCLIP:
    """A CLIP model in a folder."""

    folder: Path

    def logits(self, images: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The logits of transformers' own model, (B, B)."""
        model = transformers.CLIPModel.from_pretrained(self.folder)
        processor = transformers.CLIPProcessor.from_pretrained(self.folder)
        pictures = [picture.permute(1, 2, 0).numpy() for picture in to_uint8(images)]
        inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            return model(**inputs).logits_per_image


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> SavedCLIP:
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    encoder, tokenizer = tiny.clip(16)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = transformers.CLIPConfig(
        text_config=encoder.config.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    tiny.liven(transformers.CLIPModel(config), gain=1.0).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return SavedCLIP(folder)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Five images and the indices of their prompts."""
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, np.array([0, 2, 1, 1, 0]), PROMPTS)


def test_scores_agree_with_transformers(clip: SavedCLIP, batch: Batch) -> None:
    """PickScore is the model's logit for each image and its prompt. The CLIP score is the same cosine, unscaled."""
    expected = clip.logits(batch.samples, PROMPTS.texts(batch.conditions)).diag()  # type: ignore[arg-type]
    pick = plugins.build("metrics", "pick_score", {"weights": str(clip.folder), "processor": None})
    score = plugins.build("metrics", "clip_score", {"weights": str(clip.folder)})
    torch.testing.assert_close(pick.measure(batch)[:, 0].float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score.measure(batch) * pick.scale, pick.measure(batch), rtol=1e-6, atol=1e-6)
    assert score.measure(batch).abs().max() <= 1


def test_a_score_does_not_depend_on_the_rest_of_the_batch(clip: SavedCLIP, batch: Batch) -> None:
    """Padding to longer prompts changes nothing."""
    score = plugins.build("metrics", "clip_score", {"weights": str(clip.folder)})
    assert batch.conditions is not None
    alone = [score.measure(Batch(batch.samples[i : i + 1], batch.conditions[i : i + 1], PROMPTS)) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), score.measure(batch), rtol=0, atol=1e-5)


def test_the_name_of_the_network_is_part_of_the_metric_name(clip: SavedCLIP) -> None:
    """Scores of different networks are different metrics."""
    assert plugins.build("metrics", "clip_score", {"weights": str(clip.folder)}).column == "clip_score[tiny-clip]"
    assert plugins.build("metrics", "pick_score").column == "pick_score[PickScore_v1]"


def test_missing_weights_are_refused_before_anything_starts(clip: SavedCLIP, tmp_path: Path) -> None:
    """The message says how to fetch them or which file is missing. Nothing is downloaded."""
    with pytest.raises(
        ConfigError, match=r"needs the weights 'openai/clip-vit-base-patch32'.*`hf download openai/clip"
    ):
        plugins.build("metrics", "clip_score").check(PROMPTS)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        plugins.build("metrics", "clip_score", {"weights": str(tmp_path)}).check(PROMPTS)
    plugins.build("metrics", "clip_score", {"weights": str(clip.folder)}).check(PROMPTS)


def test_a_dataset_without_texts_is_refused(clip: SavedCLIP) -> None:
    """There is no text to compare an image with."""
    with pytest.raises(ConfigError, match="needs the text of each image, which dataset Digits does not provide"):
        plugins.build("metrics", "clip_score", {"weights": str(clip.folder)}).check(Digits())
