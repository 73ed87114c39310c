"""What tests of whole commands compare with."""

from __future__ import annotations

import pytest
from command_place import Place


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A sweep that nobody disturbed."""
    place = Place(tmp_path_factory.mktemp("sweep") / "undisturbed")
    output = place.run("sweep", "tiny.yaml")
    assert f"report: {place.root}/experiments/tiny/report.html" in output
    assert "start of BNS" in output
    return place
