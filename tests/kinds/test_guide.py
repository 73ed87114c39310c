"""The configurations of docs/your_model.md are those of the examples, which go all the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kinds.examples import EXAMPLES, Example

from orchestrator.config.reading import load_config, parse_config

ROOT = Path(__file__).parents[2]


def blocks() -> dict[str, dict[str, Any]]:
    """The YAML blocks of the guide after its section on diffusers, by name; a block without one is an excerpt."""
    _, _, text = (ROOT / "docs/your_model.md").read_text(encoding="utf-8").partition("\n## A network of your own\n")
    contents = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    return {content["name"]: content for content in contents if "name" in content}


BLOCKS = blocks()
FIRST = "digit_flow"
"""The block that shows a whole configuration; the others show what differs from it."""


@pytest.mark.parametrize("name", BLOCKS)
def test_a_configuration_of_the_guide_is_valid_as_printed(
    name: str, files: Callable[[Example], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked with the model's files in place, and describes the example of its name with the same options."""
    example = EXAMPLES[name]
    monkeypatch.chdir(files(example))
    whole = {key: value for key, value in BLOCKS[FIRST].items() if key in ("nfe", "fixed", "learned")} | BLOCKS[name]
    config = parse_config(whole, "the guide")
    config.check()
    tested = load_config(example.config)
    assert (config.model, config.conditioning, config.guidance_scale) == (
        tested.model,
        tested.conditioning,
        tested.guidance_scale,
    )
