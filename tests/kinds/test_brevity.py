"""A stranger's network needs few lines of YAML, and none of glue."""

from __future__ import annotations

import pytest
import yaml
from kinds.examples import EXAMPLES

MOST = 10
HEADERS = ("model:", "options:")
GIVEN = ("shape:", "native_scheduler:")


@pytest.mark.parametrize("name", ["imputer", "reach", "waves"])
def test_a_nested_checkpoint_and_named_conditions_take_at_most_ten_lines(name: str) -> None:
    """Lines of the sections `model` and `conditioning`, beside the shape, the schedule, and bare headers.

    The imputer's network takes a dictionary of conditions, and its weights lie two levels deep under a prefix.
    """
    text = EXAMPLES[name].config.read_text(encoding="utf-8")
    described = text[text.index("model:") : text.index("pairs:")].splitlines()
    lines = [line.strip() for line in described if line.strip() not in HEADERS and not line.strip().startswith(GIVEN)]
    assert len(lines) <= MOST, lines
    options = yaml.safe_load(text)["model"]["options"]
    assert "weights_key" in options
    code = EXAMPLES[name].config.parents[1] / "code" / f"{options['factory'].partition(':')[0]}.py"
    assert not {"orchestrator", "solvers", "bespoke"} & set(code.read_text(encoding="utf-8").split())
