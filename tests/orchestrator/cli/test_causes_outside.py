"""Causes outside the program, for every command: one sentence with the value and the remedy, exit code 2, no traceback.

Each case is a kind of cause that users meet. None of them may start Ray.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli.main import main
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.schedulers.cond_ot import CondOT
from solvers.theta import ThetaArtifact

BESPOKE = Path(sys.executable).with_name("bespoke")

Prepare = Callable[[Path], object]


def _write(name: str, content: bytes) -> Prepare:
    return lambda folder: (folder / name).write_bytes(content)


def _link(name: str, target: str) -> Prepare:
    return lambda folder: (folder / name).symlink_to(target)


def _folder(name: str) -> Prepare:
    return lambda folder: (folder / name).mkdir(parents=True)


def _foreign_database(folder: Path) -> None:
    """A SQLite file of another program, where MLflow's store should be."""
    (folder / "store").mkdir()
    with sqlite3.connect(folder / "store/mlflow.db") as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('not-one-of-mlflow')")
    database.close()


def _nothing(folder: Path) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path, experiment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the command, with a valid configuration and a valid theta."""
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    theta = ThetaArtifact(GridSolver(Midpoint(), 4, Grid()).to_ns(CondOT())).to_json()
    (tmp_path / "theta.json").write_text(theta, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def reached(*arguments: Any) -> None:
        raise AssertionError("the command started Ray")

    monkeypatch.setattr("sweeps.ray_session.connect", reached)
    return tmp_path


def _run(arguments: str) -> Result:
    return CliRunner().invoke(main, [a.replace("~", " ") for a in arguments.split(" ")])


def _assert_one_sentence(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output
    assert message in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    assert any(line.startswith(("error: ", "Error: ", "Usage: ")) for line in lines), result.stderr


SWEEP = "sweep {} --storage store"

CASES: dict[str, tuple[Prepare, str, str]] = {
    # ---- configurations
    "a folder as configuration": (_folder("c"), "sweep c", "no configuration at c"),
    "a missing configuration": (_nothing, "pairs absent.yaml", "no configuration at absent.yaml"),
    "a broken link": (_link("c", "nowhere"), "sweep c", "no configuration at c"),
    "links in a circle": (_link("c", "c"), "pairs c", "no configuration at c"),
    "a binary file as configuration": (_write("c", b"\x8f\x00\x01"), "sweep c", "c is not"),
    "an empty configuration": (_write("c", b""), "sweep c", "c must be a mapping"),
    "a list as configuration": (_write("c", b"- a\n"), "evaluate --config c", "c must be a mapping"),
    "a truncated configuration": (_write("c", b"name: x\nmodel: {name: zoo"), "sweep c", "c is not YAML"),
    "tabs in a configuration": (_write("c", b"name: x\nmodel:\n\tname: zoo\n"), "sweep c", "c is not YAML"),
    "a configuration of another command": (_nothing, "pretrain good.yaml", "good.yaml is not a valid"),
    "a configuration of another command, too": (_nothing, "distil-network good.yaml", "good.yaml is not a valid"),
    "a theta as configuration": (_nothing, "sweep theta.json", "theta.json is not a valid configuration"),
    "an unknown key with a near name": (_nothing, "sweep good.yaml pairs.trian=4", "did you mean 'train'?"),
    "an override without a value": (_nothing, "sweep good.yaml nfe", "'nfe' is not key=value"),
    "an unknown variant": (_nothing, "sweep good.yaml variant=big", "no variant 'big'"),
    "NFE 0": (_nothing, "sweep good.yaml nfe=[0]", "nfe"),
    "a negative NFE": (_nothing, "sweep good.yaml nfe=[-4]", "nfe"),
    "an NFE beyond all bounds": (_nothing, "sweep good.yaml nfe=[1000000000]", "nfe"),
    "NFE not a number": (_nothing, "sweep good.yaml nfe=[.nan]", "nfe"),
    "an infinite guidance scale": (_nothing, "sweep good.yaml guidance_scale=[.inf]", "guidance_scale"),
    "an infinite tolerance": (_nothing, "sweep good.yaml pairs.rtol=.inf", "pairs.rtol"),
    "an empty list": (_nothing, "sweep good.yaml nfe=[]", "nfe"),
    "duplicate entries": (_nothing, "sweep good.yaml nfe=[4,4]", "nfe"),
    "a text where a number belongs": (_nothing, "sweep good.yaml pairs.train=many", "pairs.train"),
    "more pairs than any disk holds": (_nothing, "sweep good.yaml pairs.train=1000000000000000000", "pairs.train"),
    "a negative seed": (_nothing, "sweep good.yaml seeds=[-1]", "seeds"),
    "a name with a slash": (_nothing, "sweep good.yaml name=a/b", "name"),
    "a name that leads out": (_nothing, "sweep good.yaml name=..", "name"),
    "a name of 300 characters": (_nothing, f"sweep good.yaml name={'x' * 300}", "name"),
    "an unknown solver": (_nothing, "sweep good.yaml fixed=[eulr]", "did you mean 'euler'?"),
    "an unknown metric": (_nothing, "sweep good.yaml metrics=[psrn]", "did you mean 'psnr'?"),
    "a method's option of another": (
        _nothing,
        "sweep good.yaml learned.0.method={name:~adam,~options:~{lr:~1}}",
        "'adam' has no option 'lr'; its options are: none",
    ),
    "guidance without a label for it": (
        _write("net.py", b"from torch import nn\nclass Net(nn.Module):\n  def forward(self, x, t):\n    return x\n"),
        "sweep good.yaml guidance_scale=[2] model={name:~torch_module,~options:~{factory:~'net:Net',~path:~.,"
        "~shape:~[1,2,3],~prediction:~velocity,~native_scheduler:~cond_ot}}"
        " conditioning={name:~labels,~options:~{classes:~1}}",
        "guidance scale 2 needs a label for the dropped condition, but Net has none",
    ),
    # ---- a single model
    "an unknown model": (_nothing, "distil digit_fm_ot --nfe 8", "did you mean 'digits_fm_ot'?"),
    "a folder as a model": (_folder("m.yaml"), "distil m.yaml --nfe 8", "no model 'm.yaml'"),
    "a theta as a model": (_nothing, "distil theta.json --nfe 8", "theta.json has no model"),
    "a distillation without NFE": (_nothing, "distil good.yaml", "Missing option '--nfe'"),
    "an NFE that is no number": (_nothing, "distil good.yaml --nfe eight", "'eight' is not a whole number"),
    "an NFE of 0": (_nothing, "distil good.yaml --nfe 0", "nfe"),
    "a guidance scale that is none": (_nothing, "distil good.yaml --nfe 8 --guidance-scale 1-5", "'1-5' is not a"),
    "a range that runs down": (_nothing, "distil digits_fm_ot --nfe 8 --guidance-scale 5:1", "from 5 to 1"),
    "a choice of guidance scales": (
        _nothing,
        "distil good.yaml --nfe 8 guidance_scale=[1,3]",
        "lists the guidance scales 1, 3; choose one with --guidance-scale 1, or a range",
    ),
    "a budget of nothing": (_nothing, "distil digits_fm_ot --nfe 8 --budget 0", "0 is not in the range"),
    "a key that a distillation does not use": (_nothing, "distil digits_fm_ot --nfe 8 seeds=[1]", "has no effect here"),
    # ---- thetas
    "a folder as theta": (_folder("t"), "export t --to python x.py", "t"),
    "a truncated theta": (_write("t", b'{"format": "bespoke-th'), "export t --to python x.py", "it is not JSON"),
    "an empty theta": (_write("t", b""), "export t --to python x.py", "t is not a usable theta"),
    "JSON that is not a theta": (_write("t", b"[]"), "register t --name x --storage store", "'format' is not"),
    "a pickle as theta": (_write("t.safetensors", b"\x80\x04."), "export t.safetensors --to python x.py", "t.safeten"),
    "a missing theta": (_nothing, "evaluate absent.json --config good.yaml", "no theta artifact at absent.json"),
    "nothing to evaluate": (_nothing, "evaluate --config good.yaml", "nothing to evaluate"),
    "a run that does not exist": (
        _nothing,
        "evaluate runs:/0 --config good.yaml --storage store",
        "no MLflow store at",
    ),
    # ---- destinations
    "a destination below a file": (_nothing, "export theta.json --to python theta.json/x.py", "theta.json"),
    "a folder as destination": (_folder("x.py"), "export theta.json --to python x.py", "x.py"),
    "a destination where nothing can be written": (_nothing, "export theta.json --to python /proc/x.py", "/proc/"),
    "another suffix": (_nothing, "export theta.json --to python x.txt", "ends in .py"),
    "an unknown exporter": (_nothing, "export theta.json --to pyhton x.py", "did you mean 'python'?"),
    "a file as output folder": (_nothing, "pretrain good.yaml --output theta.json", "good.yaml is not a valid"),
    # ---- storage and MLflow
    "a file as storage": (_nothing, "sweep good.yaml --storage theta.json", "theta.json"),
    "a file as storage of pairs": (_nothing, "pairs good.yaml --storage theta.json", "theta.json"),
    "a storage where nothing can be written": (_nothing, "pairs good.yaml --storage /proc/x", "/proc/x"),
    "an unknown scheme of a storage": (_nothing, "pairs good.yaml --storage ftp://host/x", "ftp"),
    "no storage to list": (_nothing, "store list --storage stroe", "no storage at"),
    "no storage to prune": (_nothing, "store prune --unused --storage stroe", "no storage at"),
    "a URI without a bucket": (_nothing, "sweep good.yaml --storage s3://", "names no bucket"),
    "no MLflow store": (_nothing, "compare x --storage store", "no MLflow store at"),
    "no MLflow store for the UI": (_nothing, "ui --storage store", "no MLflow store at"),
    "a text as MLflow store": (
        lambda folder: (_folder("store")(folder), _write("store/mlflow.db", b"not a database, a text" * 99)(folder)),
        "compare x --storage store",
        "mlflow.db",
    ),
    "a folder as MLflow store": (
        _folder("store/mlflow.db"),
        "register theta.json --name x --storage store",
        "mlflow.db",
    ),
    "a database of another program": (_foreign_database, "compare x --storage store", "mlflow.db"),
    "an MLflow that is not there": (_nothing, "compare x --tracking-uri http://127.0.0.1:9", "http://127.0.0.1:9"),
    "an unknown scheme of MLflow": (_nothing, "compare x --tracking-uri gopher://x", "gopher://x"),
    "a registered name with a slash": (_nothing, "register theta.json --name a/b --storage store", "'a/b'"),
    "an empty registered name": (_nothing, "register theta.json --name= --storage store", "name"),
    # ---- other options
    "a port out of range": (_nothing, "ui --port 99999", "99999"),
    "a port that is not a number": (_nothing, "ui --port http", "http"),
    "an unknown kind of plugin": (_nothing, "list solvers", "solvers"),
    "an unknown command": (_nothing, "swep good.yaml", "swep"),
    "an unknown option": (_nothing, "sweep good.yaml --stroage x", "--stroage"),
    "a dataset's unknown option": (_nothing, "reference digits side=4 --to x.safetensors", "has no option 'side'"),
    "a missing folder of images": (
        _nothing,
        "reference image_folder folder=absent side=8 --features digits_cnn --to x.safetensors --storage store",
        "absent",
    ),
    "a text as image": (
        lambda folder: (_folder("i")(folder), _write("i/a.png", b"not an image")(folder)),
        "reference image_folder folder=i side=8 --features digits_cnn --to x.safetensors --storage store",
        "a.png",
    ),
    "no samples per batch": (_nothing, "reference digits --features digits_cnn --to x.safetensors --batch-size 0", "0"),
    "a negative number to keep": (
        _nothing,
        "reference digits --features digits_cnn --to x.safetensors --keep -1",
        "-1",
    ),
    "an unknown device": (
        _nothing,
        "reference digits --features digits_cnn --to x.safetensors --device gpu --storage store",
        "gpu",
    ),
    "a suffix of statistics": (_nothing, "reference digits --to x.npz", "x.npz"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cause_outside_is_one_sentence(case: str, folder: Path) -> None:
    """The sentence names the value; nothing has started."""
    prepare, arguments, message = CASES[case]
    prepare(folder)
    _assert_one_sentence(_run(arguments), message)


@pytest.mark.parametrize(
    "file", [b"\x8f\x00", b"", b"- a", b"{", None], ids=["binary", "empty", "list", "half", "folder"]
)
def test_a_cluster_file_that_is_none_is_a_problem(folder: Path, file: bytes | None) -> None:
    """`cluster check` lists problems and exits with 1."""
    if file is None:
        (folder / "c").mkdir()
    else:
        (folder / "c").write_bytes(file)
    result = _run("cluster check c")
    assert result.exit_code == 1
    assert result.output.startswith("c: ")
    assert "Traceback" not in result.output


def test_a_port_in_use_is_named(folder: Path) -> None:
    """Before a server of MLflow is started on it."""
    _run("register theta.json --name x --storage store")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _assert_one_sentence(_run(f"ui --storage store --port {port}"), f"port {port}")


# ---- the process itself -------------------------------------------------------------------------------------------


def _process(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("bespoke", str(BESPOKE))],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "variables", "code"),
    [
        ("bespoke list families | head -1; exit ${PIPESTATUS[0]}", {}, None),
        ("bespoke list families > /dev/full", {}, 2),
        ("bespoke list families >&-", {}, None),
        ("bespoke list families", {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}, 0),
        ("mkdir gone && cd gone && rmdir ../gone && bespoke compare x", {}, 2),
        ("bespoke compare x --storage store", {"HOME": "/nowhere"}, 2),
        ("bespoke sweep good.yaml nfe=[0]", {"TMPDIR": "/nowhere"}, 2),
        ("bespoke sweep $'\\xff.yaml'", {}, 2),
        ("bespoke compare x --tracking-uri http://127.0.0.1:9", {"MLFLOW_HTTP_REQUEST_TIMEOUT": "soon"}, 2),
        ("bespoke doctor --storage theta.json --tracking-uri http://127.0.0.1:9", {"OMP_NUM_THREADS": "1"}, 1),
    ],
    ids=[
        "a reader that leaves",
        "a full device as output",
        "a closed output",
        "an ASCII locale",
        "a current folder that was deleted",
        "no home",
        "no temporary folder",
        "a file name that is not text",
        "a variable that is not a number",
        "a doctor with a file as storage",
    ],
)
def test_the_surroundings_of_the_process(
    folder: Path, command: str, variables: dict[str, str], code: int | None
) -> None:
    """Pipes, devices, locales and variables give no traceback; None as code: any."""
    result = _process(command, folder, **variables)
    assert "Traceback" not in result.stderr, result.stderr
    assert "unexpected" not in result.stderr, result.stderr
    assert code is None or result.returncode == code, (result.returncode, result.stderr)
