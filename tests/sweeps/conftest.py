"""What tests of whole commands compare with."""

from __future__ import annotations

import shutil

import pytest
from command_place import EVALUATE, Place


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A sweep that nobody disturbed."""
    place = Place(tmp_path_factory.mktemp("sweep") / "undisturbed")
    output = place.run("sweep", "tiny.yaml")
    assert f"report: {place.root}/experiments/tiny/report.html" in output
    assert "start of BNS" in output
    return place


@pytest.fixture(scope="session")
def evaluated(undisturbed: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An evaluation of that sweep's theta that nobody disturbed; the sweep itself stays as it was."""
    place = Place(tmp_path_factory.mktemp("evaluation") / "undisturbed")
    shutil.copytree(undisturbed.root, place.root)
    place.run(*EVALUATE)
    return place
