"""Finds other people's published weights on this machine. Never downloads anything."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.files import data_files


def local_folder(weights: str, wanted: str) -> Path:
    """The folder of a network in the format of transformers.

    Args:
        weights: A folder, or the name of a repository on the Hugging Face hub that is in the local cache.
        wanted: What needs it, for errors.

    Raises:
        ConfigError: It is neither, with where it was looked for and how to get it.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        if not data_files(folder, ["config.json"], below=False):
            raise ConfigError(f"{wanted} needs a network in the format of transformers: {folder} has no config.json")
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(f"{wanted} needs transformers; pip install 'bespoke-solvers[diffusers]'") from error
    try:
        return Path(snapshot_download(weights, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{wanted} needs the weights {weights!r}, which are neither a folder here nor in the cache {HF_HUB_CACHE}; "
            f"fetch them with `hf download {weights}`, or set the option to a folder"
        ) from error
