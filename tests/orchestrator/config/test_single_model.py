"""A model alone makes a configuration: by its name in the zoo, from an experiment, or from a file with nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.single_model import load_single_model
from orchestrator.errors import ConfigError


def _file(tmp_path: Path, content: dict[str, Any]) -> str:
    path = tmp_path / "some model.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "conditioning"),
    [
        ("digits_fm_ot", {"name": "labels", "options": {"classes": 10}}),
        ("cifar10_gray16_fm_ot", {"name": "labels", "options": {"classes": 10}}),
        ("spoken_digits_fm_ot", {"name": "spoken_digits", "options": {}}),
    ],
)
def test_models_of_the_zoo_know_their_conditioning(name: str, conditioning: dict[str, Any]) -> None:
    """And give the experiment their name."""
    config = load_single_model(name, nfe=[8])
    assert config.conditioning.model_dump() == conditioning
    assert (config.name, config.nfe, config.guidance_scale) == (name, (8,), (1.0,))


def test_of_an_experiment_only_the_model_counts(tmp_path: Path, experiment: dict[str, Any]) -> None:
    """Solvers, sizes and seeds are read past, even such as could not run at this NFE."""
    experiment |= {"fixed": ["rk4"], "nfe": [4], "guidance_scale": [3.0]}
    experiment["pairs"]["seed"] = 7
    experiment["resources"]["host_memory_gb"] = 2.5
    config = load_single_model(_file(tmp_path, experiment), ["storage=elsewhere"], nfe=[5], name="mine")
    assert (config.name, config.nfe, config.guidance_scale, config.fixed) == ("mine", (5,), (3.0,), ())
    assert (config.pairs.seed, config.pairs.train, config.storage) == (7, 520, "elsewhere")
    assert config.resources.host_memory_gb == 2.5


def test_a_file_may_hold_nothing_but_a_model(tmp_path: Path) -> None:
    """The experiment is named after the file; overrides reach into the model."""
    file = _file(tmp_path, {"model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}}})
    config = load_single_model(file, ["model.options.weights=digits_eps_vp"], nfe=[8], guidance_scale=[1.0, 5.0])
    assert (config.name, config.guidance_scale) == ("some-model", (1.0, 5.0))
    assert config.model.options == {"weights": "digits_eps_vp"}


@pytest.mark.parametrize(
    ("content", "override", "message"),
    [
        ({"name": "x"}, None, "has no model; add for example 'model:"),
        ({"model": {"name": "zoo"}}, None, "'weights', a name or a path"),
        ({"model": {"name": "zoo", "options": {"weights": "digit_fm_ot"}}}, None, "did you mean 'digits_fm_ot'"),
        ({"model": {"name": "zo", "options": {}}}, None, "did you mean 'zoo'"),
        ({"modle": {}, "model": {"name": "zoo", "options": {"weights": "digits_fm_ot"}}}, None, "did you mean 'model'"),
        (None, "nfe=[4]", "'nfe=[4]' has no effect here: a single model needs only name, model, "),
        (None, "learned.0.iterations=4", "has no effect here"),
        (None, "pairs.train=64", "sizes and tolerances of pairs follow from the model"),
        (None, "resorces.device=cuda", "did you mean 'resources'"),
    ],
)
def test_what_cannot_work_or_has_no_effect_is_refused(
    tmp_path: Path, content: dict[str, Any] | None, override: str | None, message: str
) -> None:
    """In the terms of the file, before a network is built."""
    source = "digits_fm_ot" if content is None else _file(tmp_path, content)
    with pytest.raises(ConfigError) as raised:
        load_single_model(source, [] if override is None else [override], nfe=[8])
    assert message in str(raised.value)


def test_an_unknown_model_lists_those_that_there_are() -> None:
    """With the nearest name."""
    with pytest.raises(ConfigError, match=r"no model 'digits_fm' \(did you mean .*\); give a model of the zoo \(cifar"):
        load_single_model("digits_fm", nfe=[8])
