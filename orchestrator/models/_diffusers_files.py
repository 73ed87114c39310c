"""Files of diffusers pipelines, as ``save_pretrained`` or the hub leaves them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = re.compile(r"diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.(safetensors|bin)")


def pipeline_json(pipeline: str, file: str = "model_index.json") -> dict[str, Any]:
    """Read a JSON file of a pipeline from its folder, or from the hub (the local cache first).

    Args:
        pipeline: A folder written by ``save_pretrained``, or a hub id ``owner/name``.
        file: The file, relative to the folder.

    Raises:
        ConfigError: It is neither, the hub cannot be reached, or the file is damaged; the message gives the remedy.
    """
    folder = Path(pipeline)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise ConfigError(
                f"{folder} holds no {file}, so it is not a pipeline; make one with pipe.save_pretrained(…)"
            )
        return _parsed(folder / file)
    if not _HUB_ID.fullmatch(pipeline):
        raise ConfigError(
            f"no pipeline folder at {pipeline}, and it is not a hub id 'owner/name' either; give a folder written by "
            f"pipe.save_pretrained(…)"
        )
    from huggingface_hub import hf_hub_download

    try:
        return _parsed(Path(hf_hub_download(pipeline, file)))
    # The remedy is the same for every cause (offline, unknown or gated repository, proxy).
    except Exception as error:
        raise ConfigError(
            f"pipeline {pipeline!r} is not a folder here and could not be fetched from the hub "
            f"({type(error).__name__}); check the name and the network, or run `hf download {pipeline} --local-dir "
            f"FOLDER` on a machine that is online and give that folder"
        ) from error


def _parsed(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); download or save the pipeline again") from error
    return index


def variants_in(folder: Path) -> list[str | None]:
    """Variants of the weights in the folder of a network; None stands for files without one, and comes first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {match["variant"] for name in names if (match := _WEIGHTS.fullmatch(name))}
    return sorted(found, key=lambda variant: (variant is not None, variant))


def chosen_variant(pipeline: str, component: str, variant: str | None) -> str | None:
    """The variant of a pipeline's weights to load: the one that is asked for, or the only one in its folder.

    Args:
        pipeline: A folder, or a hub id, whose files cannot be listed: its variant is the one that is asked for.
        component: Component that holds the network.
        variant: Variant that is asked for, e.g. ``"fp16"`` for ``diffusion_pytorch_model.fp16.safetensors``; None for
            the files without one, if there are any.

    Raises:
        ConfigError: The folder has no such weights; the message lists the variants it has.
    """
    if not Path(pipeline).is_dir():
        return variant
    folder, there = Path(pipeline) / component, variants_in(Path(pipeline) / component)
    if variant in there:
        return variant
    variants = [name for name in there if name is not None]
    if not there:
        raise ConfigError(
            f"{folder} holds no weights (diffusion_pytorch_model.safetensors or .bin); download or save the pipeline "
            f"again, all of it"
        )
    if variant is None and len(variants) == 1:
        return variants[0]
    asked = "has weights only as variants" if variant is None else f"has no weights of the variant {variant!r}, only of"
    rest = ", ".join([*variants, *(["those without a variant"] if None in there else [])])
    raise ConfigError(f"{folder} {asked} {rest}; set variant to one of them, or leave it out for those without")
