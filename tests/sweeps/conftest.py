"""Undisturbed runs of whole commands, as references for runs that are disturbed."""

from __future__ import annotations

import shutil

import pytest
from command_place import EVALUATE, Place


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A sweep that ran without faults."""
    place = Place(tmp_path_factory.mktemp("sweep") / "undisturbed")
    output = place.run("sweep", "tiny.yaml")
    assert f"report: {place.root}/experiments/tiny/report.html" in output
    assert "start of BNS" in output
    return place


@pytest.fixture(scope="session")
def evaluated(undisturbed: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An evaluation of that sweep's thetas that ran without faults, on a copy of its storage."""
    place = Place(tmp_path_factory.mktemp("evaluation") / "undisturbed")
    shutil.copytree(undisturbed.root, place.root)
    place.run(*EVALUATE)
    return place
