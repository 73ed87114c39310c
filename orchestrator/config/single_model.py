"""The configuration of a command that needs one model, and neither an experiment's solvers nor its sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import plugins
from orchestrator.config.base import in_section
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import parse_config, parse_options, read_yaml
from orchestrator.errors import ConfigError
from orchestrator.models.zoo.adapter import zoo_names

USED = ("name", "model", "conditioning", "guidance_scale", "pairs", "resources", "storage", "tracking_uri")
"""Sections of an experiment that matter; of ``pairs``, the seed. The others are read past."""


def load_single_model(
    source: str,
    overrides: Sequence[str] = (),
    *,
    nfe: Sequence[int],
    guidance_scale: Sequence[float] = (),
    name: str | None = None,
) -> ExperimentConfig:
    """Read and check a model: the configuration of an experiment that distils for it.

    Args:
        source: A model of the zoo; its file; or the YAML file of an experiment, or of ``model`` and ``conditioning``.
        overrides: ``key=value`` with dotted keys.
        nfe: Numbers of velocity evaluations.
        guidance_scale: A guidance scale, or the ends of a range; empty: that of the file.
        name: Name of the experiment; None: that of the file or the model.

    Raises:
        ConfigError: The model is unknown, or a value is invalid; names the key, the value and the remedy.
    """
    for override in overrides:
        _check_used(override)
    content = _content(source, overrides)
    if "model" not in content:
        raise ConfigError(f"{source} has no model; add for example 'model: {{name: zoo, options: {{weights: NAME}}}}'")
    unknown = set(content) - set(ExperimentConfig.model_fields)
    kept = {key: value for key, value in content.items() if key in USED or key in unknown}
    if isinstance(kept.get("pairs"), dict):
        kept["pairs"] = {key: value for key, value in kept["pairs"].items() if key == "seed"}
    kept |= {"nfe": list(nfe), "learned": [{"family": "bns", "method": "levenberg_marquardt", "start": ["euler"]}]}
    kept.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(source).stem).strip("-.") or "model")
    if name is not None:
        kept["name"] = name
    if guidance_scale:
        kept["guidance_scale"] = list(guidance_scale)
    if "conditioning" not in kept and isinstance(kept["model"], dict) and "name" in kept["model"]:
        model = parse_config(kept, source).model
        with in_section("model"):
            adapter = plugins.load("models", model.name)
            adapter.check(model.options)
            kept["conditioning"] = adapter.default_conditioning(model.options)
    config = parse_config(kept, source)
    config.check()
    return config


def _check_used(override: str) -> None:
    """Refuse an override that would have no effect."""
    key = override.partition("=")[0]
    section, _, rest = key.partition(".")
    known = section in ExperimentConfig.model_fields
    if known and section not in USED:
        raise ConfigError(
            f"{override!r} has no effect here: a single model needs only {', '.join(USED)}; the numbers of evaluations "
            f"are given by --nfe, and solvers and sizes follow from the model"
        )
    if section == "pairs" and rest != "seed":
        raise ConfigError(f"{override!r} has no effect here: sizes and tolerances of pairs follow from the model")


def _content(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration as it stands in the file, or that of a model of the zoo."""
    if source in zoo_names() or source.endswith(".safetensors"):
        return parse_options(overrides, {"model": {"name": "zoo", "options": {"weights": source}}})
    if not Path(source).is_file():
        hint = plugins.did_you_mean(source, zoo_names())
        raise ConfigError(
            f"no model {source!r}{hint}; give a model of the zoo ({', '.join(zoo_names())}), or a YAML file that names "
            f"a model, such as sweeps/configs/digits.yaml"
        )
    return read_yaml(source, overrides)
