"""theta is exported as a file for other programs, and can be loaded again with the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orchestrator import plugins
from orchestrator.cli.main import main
from orchestrator.export.base import Exporter, ExportError
from orchestrator.export.python import PythonFile
from orchestrator.export.safetensors import Safetensors
from solvers.families import GridSolver
from solvers.families.adams_bashforth import AdamsBashforth
from solvers.grids import Grid
from solvers.ns import InvalidThetaError, NSSolver
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact, load_theta
from solvers.theta_content import METADATA_KEY

NFE = 6


@pytest.fixture
def artifact() -> ThetaArtifact:
    """A theta with every provenance field set and no round numbers."""
    solver = GridSolver(AdamsBashforth(3), NFE, Grid("warped", 1.3, 1.7)).to_ns(CondOT())
    return ThetaArtifact(
        solver,
        family="bns",
        start="AB3 on the uniform grid",
        prediction="velocity",
        scheduler="cond_ot",
        native_scheduler="cond_ot",
        guidance_scale=3.0,
        sigma0=2.0,
        model_digest="ab" * 32,
        pairs_digest="cd" * 8,
        validation_psnr_db=41.25,
        packages={"torch": "2.14.1"},
    )


def velocity(x: Any, t: Any) -> Any:
    """A velocity for any array type, at a time of any number type."""
    return 0.3 * x - x * x * float(t) + 1.0


def noise() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def names_in(path: Path) -> dict[str, Any]:
    """The names that an exported Python file defines."""
    names: dict[str, Any] = {}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return names


# ---- python -------------------------------------------------------------------------------------------------------


def test_the_python_file_gives_the_solvers_samples(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """It adds the same terms in the same order: equal up to rounding in float64."""
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    samples = names_in(path)["sample"](velocity, noise())
    torch.testing.assert_close(samples, artifact.solver.sample(velocity, noise()), rtol=1e-13, atol=1e-13)


def test_the_python_file_holds_the_exact_numbers(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """No digit of theta is lost."""
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    names, solver = names_in(path), artifact.solver
    assert names["TIMES"] == tuple(solver.times.tolist())
    assert names["A"] == tuple(solver.a.tolist())
    assert names["B"] == tuple(tuple(row[:k]) for k, row in enumerate(solver.b.tolist()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_python_file_takes_numpy_arrays_and_keeps_their_dtype(
    artifact: ThetaArtifact, tmp_path: Path, dtype: Any
) -> None:
    """It depends on no array library; the float64 numbers of theta must not widen a float32 batch."""
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    samples = names_in(path)["sample"](velocity, noise().numpy().astype(dtype))
    assert samples.dtype == dtype
    np.testing.assert_allclose(samples, artifact.solver.sample(velocity, noise()).numpy(), rtol=1e-5, atol=1e-5)


def test_the_python_file_needs_no_packages(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """It samples a float in an interpreter that sees neither site-packages nor this checkout."""
    PythonFile().export(artifact, tmp_path / "sampler.py")
    code = "import sys; sys.path.insert(0, '.'); import sampler; print(sampler.sample(lambda x, t: -x * t, 2.0))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    expected = artifact.solver.sample(lambda x, t: -x * t, torch.tensor([2.0], dtype=torch.float64))
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-12), done.stderr


def test_the_python_file_is_short_and_names_its_model(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """It fits on a page and names the model, the guidance scale and the path."""
    (path,) = PythonFile().export(artifact, tmp_path / "sampler.py")
    names, text = names_in(path), path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 50
    assert (names["MODEL_DIGEST"], names["GUIDANCE_SCALE"], names["SCHEDULER"]) == ("ab" * 32, 3.0, "cond_ot")


@pytest.mark.parametrize("text", ['"""\nimport os\n"""', "x\\", "é\n\nBOMB = 1\n", "{times}"])
def test_hostile_text_does_not_become_code(artifact: ThetaArtifact, tmp_path: Path, text: str) -> None:
    """Text from a foreign theta file never becomes code."""
    solver = artifact.solver
    (path,) = PythonFile().export(ThetaArtifact(solver, family=text, scheduler=text), tmp_path / "sampler.py")
    names = names_in(path)
    assert names["SCHEDULER"] == text
    assert {"os", "BOMB"}.isdisjoint(names)


def test_a_file_name_that_python_cannot_import_is_rejected(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """The import shown in the file's first line must work."""
    with pytest.raises(ExportError, match=r"Python cannot import a file named 'bns-nfe8.py'; .* e\.g\. bns_nfe8\.py"):
        PythonFile().export(artifact, tmp_path / "bns-nfe8.py")


# ---- safetensors --------------------------------------------------------------------------------------------------


def test_safetensors_restore_the_whole_artifact(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """Numbers bit for bit, and every provenance field."""
    (path,) = Safetensors().export(artifact, tmp_path / "theta.safetensors")
    assert load_theta(path).to_json() == artifact.to_json()


def test_any_safetensors_reader_can_read_the_three_tensors(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """times, a and b are stored in the solver's layout, so other programs need no code from this project."""
    (path,) = Safetensors().export(artifact, tmp_path / "theta.safetensors")
    with safe_open(path, framework="pt") as file:
        solver = NSSolver(*(file.get_tensor(name) for name in ("times", "a", "b")))
    assert torch.equal(solver.flat(), artifact.solver.flat())


def _write_theta(path: Path, provenance: Any = None, **changes: Tensor | None) -> Path:
    """Write a one-step Euler solver with changes to its tensors; None omits a tensor."""
    tensors = {
        "times": torch.zeros(1, dtype=torch.float64),
        "a": torch.ones(2, dtype=torch.float64),
        "b": torch.tensor([[0.0], [1.0]], dtype=torch.float64),
    } | changes
    content = {"format": "bespoke-theta", "version": 1, "nfe": 1} if provenance is None else provenance
    text = content if isinstance(content, str) else json.dumps(content)
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={METADATA_KEY: text})
    return path


def test_a_hand_written_file_is_loaded(tmp_path: Path) -> None:
    """The unchanged file is valid, so the errors below come from the changes."""
    assert load_theta(_write_theta(tmp_path / "theta.safetensors")).solver.nfe == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.tensor([1.0, float("nan")]).double()}, r"'a' holds nan; every number must be finite"),
        ({"b": torch.tensor([[0.0], [float("inf")]]).double()}, r"'b\[1\]' holds inf; every number must be finite"),
        ({"b": torch.tensor([[float("nan")], [1.0]]).double()}, r"'b' must be strictly lower triangular"),
        ({"b": torch.tensor([[0.5], [1.0]]).double()}, r"'b' must be strictly lower triangular: a state may use only"),
        ({"times": torch.tensor([1.5]).double()}, r"'times' must lie in \[0, 1\], got 1\.5"),
        ({"a": torch.tensor([1.0, 1e7]).double()}, r"'a' holds 10000000\.0; every number must be .* at most 1e6"),
        ({"a": torch.ones(2)}, r"'a' must be float64 of shape \(2,\) for nfe 1, got F32 of shape \(2,\)"),
        ({"a": torch.ones(3).double()}, r"'a' must be float64 of shape \(2,\) for nfe 1, got F64 of shape \(3,\)"),
        ({"b": None}, r"its tensors must be times, a, b, got a, times"),
        ({"c": torch.ones(1)}, r"its tensors must be times, a, b, got a, b, c, times"),
        ({"provenance": {"format": "bespoke-theta", "version": 1}}, r"'nfe' must be an integer from 1 to 1000, got No"),
        ({"provenance": {"format": "x", "version": 1, "nfe": 1}}, r"its 'format' is not 'bespoke-theta'"),
        ({"provenance": {"format": "bespoke-theta", "version": 2, "nfe": 1}}, r"version 2 is unknown"),
        (
            {"c": torch.ones(1), "provenance": {"format": "bespoke-theta", "version": 2}},
            r"version 2 is unknown; this release reads version 1; a newer release wrote it: update this one",
        ),
        (
            {"provenance": {"format": "bespoke-theta", "version": 1, "nfe": 1, "slope": 0.5}},
            r"fields that this release does not know \('slope'\) and that may change its samples; read it with",
        ),
        ({"provenance": {"format": "bespoke-theta", "version": 1, "nfe": 10**9}}, r"'nfe' must be .* got 1000000000"),
        ({"provenance": {"format": "bespoke-theta", "version": 1, "nfe": 1, "sigma0": -1}}, r"'sigma0' must be posit"),
        ({"provenance": "[" * 100_000}, r"its 'bespoke_theta' is not JSON"),
        ({"provenance": "[]"}, r"its 'format' is not 'bespoke-theta'"),
    ],
)
def test_an_invalid_or_hostile_file_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Values that JSON artifacts may not contain, and claims that only a header can make."""
    path = _write_theta(tmp_path / "theta.safetensors", **changes)
    with pytest.raises(InvalidThetaError, match=rf"theta\.safetensors is not a usable theta artifact: .*{message}"):
        load_theta(path)


def test_a_file_larger_than_any_theta_is_rejected_unread(tmp_path: Path) -> None:
    """The size is checked first, because reading allocates memory for the whole file."""
    path = tmp_path / "theta.safetensors"
    with path.open("wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(InvalidThetaError, match=r"it has 1,000,000,000,000 bytes, but the largest theta has 29,1"):
        load_theta(path)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8 + b"{}", b"PK no weights"])
def test_a_file_that_is_not_safetensors_is_rejected(tmp_path: Path, data: bytes) -> None:
    """An empty file, a header of 2^64 bytes, and other content."""
    path = tmp_path / "theta.safetensors"
    path.write_bytes(data)
    with pytest.raises(InvalidThetaError, match="it is not safetensors"):
        load_theta(path)


def test_safetensors_without_a_theta_are_rejected(tmp_path: Path) -> None:
    """The weights of a model, for example; the message names the command that writes a theta."""
    save_file({"weight": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(InvalidThetaError, match="its metadata has no 'bespoke_theta'; make one with `bespoke export`"):
        load_theta(tmp_path / "net.safetensors")


def test_the_suffix_selects_the_loader(artifact: ThetaArtifact, tmp_path: Path) -> None:
    """JSON and safetensors of the same theta load as the same artifact."""
    artifact.save(tmp_path / "theta.json")
    Safetensors().export(artifact, tmp_path / "theta.safetensors")
    first, second = (load_theta(tmp_path / f"theta.{suffix}") for suffix in ("json", "safetensors"))
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_the_error_for_a_missing_file_names_its_path(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no theta artifact at .*theta\.{suffix}"):
        load_theta(tmp_path / f"theta.{suffix}")


# ---- all one-file exporters, and the command ----------------------------------------------------------------------

ONE_FILE = {"python": ".py", "safetensors": ".safetensors"}


@pytest.mark.parametrize("name", ONE_FILE)
def test_an_exporter_is_looked_up_by_its_module_name(name: str) -> None:
    """There is no registry: NAME in `--to NAME` is the module's name."""
    plugin = plugins.load("exporters", name)
    assert issubclass(plugin, Exporter)
    assert plugin.name == name


@pytest.mark.parametrize("name", ONE_FILE)
def test_an_invalid_theta_is_not_exported(name: str, artifact: ThetaArtifact, tmp_path: Path) -> None:
    """A diverged solver, for example, is not exported."""
    a = artifact.solver.a.clone()
    a[2] = float("nan")
    broken = ThetaArtifact(NSSolver(artifact.solver.times, a, artifact.solver.b))
    with pytest.raises(InvalidThetaError, match="theta to be exported is not a usable theta artifact: 'a' holds nan"):
        plugins.load("exporters", name)().export(broken, tmp_path / f"theta{ONE_FILE[name]}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ONE_FILE)
@pytest.mark.parametrize("destination", ["theta.txt", ""])
def test_a_destination_of_another_type_is_rejected(
    name: str, destination: str, artifact: ThetaArtifact, tmp_path: Path
) -> None:
    """A folder, or a file with a misleading suffix."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ExportError, match=rf"the export is one file that ends in \{ONE_FILE[name]}, .*write for exam"):
        plugins.load("exporters", name)().export(artifact, folder / destination)


@pytest.mark.parametrize("name", ONE_FILE)
def test_an_export_creates_its_folder_and_replaces_an_existing_file(
    name: str, artifact: ThetaArtifact, tmp_path: Path
) -> None:
    """Running the command twice leaves one file and no temporary files."""
    destination = tmp_path / "new" / f"theta{ONE_FILE[name]}"
    for _ in range(2):
        assert plugins.load("exporters", name)().export(artifact, destination) == [destination]
    assert list(destination.parent.iterdir()) == [destination]


@pytest.mark.parametrize("name", ONE_FILE)
def test_the_command_writes_the_file_and_prints_its_path(name: str, artifact: ThetaArtifact, tmp_path: Path) -> None:
    """`bespoke export THETA --to NAME DESTINATION`."""
    artifact.save(tmp_path / "theta.json")
    destination = tmp_path / f"mine{ONE_FILE[name]}"
    done = CliRunner().invoke(main, ["export", str(tmp_path / "theta.json"), "--to", name, str(destination)])
    assert (done.exit_code, done.stdout.strip()) == (0, str(destination))
    assert destination.is_file()


@pytest.mark.parametrize(
    ("theta", "name", "message"),
    [
        ("theta.json", "pyton", "error: unknown exporter 'pyton' (did you mean 'python'?); there are: "),
        ("other.json", "python", "error: no theta artifact at "),
    ],
)
def test_the_command_rejects_unknown_exporters_and_missing_files(
    theta: str, name: str, message: str, artifact: ThetaArtifact, tmp_path: Path
) -> None:
    """The command prints an error without a traceback and exits with code 2."""
    artifact.save(tmp_path / "theta.json")
    done = CliRunner().invoke(main, ["export", str(tmp_path / theta), "--to", name, str(tmp_path / "mine.py")])
    assert done.exit_code == 2
    assert message in done.stderr


def test_exporters_are_listed() -> None:
    """Each line starts with the exporter's name."""
    output = CliRunner().invoke(main, ["list", "exporters"]).stdout
    assert all(any(line.startswith(f"{name} ") for line in output.splitlines()) for name in ONE_FILE)
