"""``import orchestrator`` starts nothing and loads nothing; its names are those of the API."""

from __future__ import annotations

import subprocess
import sys

import pytest

import orchestrator
import orchestrator.api

HEAVY = ("torch", "ray", "mlflow", "matplotlib", "numpy", "pydantic", "yaml", "sweeps", "solvers")


def test_the_import_loads_no_other_package_and_lists_the_names() -> None:
    """In a new process, also after the names were listed, as an editor does."""
    code = (
        "import sys, threading, orchestrator\n"
        "names = set(dir(orchestrator))\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], threading.active_count(), "
        "set(orchestrator.__all__) <= names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 1 True\n"


def test_the_names_are_those_of_the_api() -> None:
    """Each is resolved; an unknown one is an AttributeError, as of any module."""
    assert sorted(orchestrator.__all__) == sorted(orchestrator.api.__all__)
    for name in orchestrator.__all__:
        assert getattr(orchestrator, name) is getattr(orchestrator.api, name)
    with pytest.raises(AttributeError, match="module 'orchestrator' has no attribute 'Modell'"):
        _ = orchestrator.Modell  # type: ignore[attr-defined]


def test_ray_and_mlflow_are_loaded_by_what_needs_them() -> None:
    """A model and its repr need neither."""
    code = (
        "import sys\nfrom orchestrator import Model\n"
        "print(Model(lambda x, t: -x, (2,)).name, [name for name in ('ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "model []\n"
