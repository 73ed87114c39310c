"""The command line: help with examples, errors without tracebacks, and meaningful exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from orchestrator import plugins
from orchestrator.cli.main import main
from orchestrator.cli.shared import USAGE
from orchestrator.models.facts import ModelFacts
from orchestrator.models.zoo import ZooModel
from orchestrator.results.bill import Bill
from orchestrator.results.store import Result as PointResult
from orchestrator.results.store import ResultStore, rows
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import ROLE, Tracker
from orchestrator.tracking.records import write_run
from solvers.families import GridSolver
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.guided import GuidedSolver
from solvers.schedulers.cond_ot import CondOT
from solvers.theta import ThetaArtifact, load_theta
from sweeps.evaluate import FoundTheta, at_scales
from sweeps.sweep import SweepOutcome

Bespoke = Callable[..., Result]

THETA = ThetaArtifact(GridSolver(Midpoint(), 4, Grid()).to_ns(CondOT())).to_json()

BILL = Bill(lambda guidance_scale: 1)


@pytest.fixture
def bespoke() -> Bespoke:
    """A function that runs the command in this process."""
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def small(tmp_path: Path, experiment: dict[str, Any]) -> Path:
    """The configuration file of the small experiment."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return path


def _assert_refused(result: Result, message: str) -> None:
    """Assert exit code 2 and one message on standard error, without a traceback."""
    assert result.exit_code == 2, result.output
    assert any(line.startswith("error: ") for line in result.stderr.splitlines()) or "Usage: " in result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_every_command_has_a_help_text_with_an_example(bespoke: Bespoke, name: str | None) -> None:
    """The help has a summary sentence, the usage line and, if there are free-form arguments, an example."""
    result = bespoke(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {name or '[OPTIONS]'}")
    command = main if name is None else main.commands[name]
    assert command.help
    assert command.help.partition("\n")[0].rstrip().endswith(".")
    arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
    if name is None or any(not isinstance(argument.type, click.Choice) for argument in arguments):
        assert f"bespoke {name or 'sweep'} " in result.stdout, "an example"


TEXT_OPTIONS = [
    (name, option.opts[0])
    for name, command in sorted(main.commands.items())
    for option in command.params
    if isinstance(option, click.Option) and option.type.name == "text"
]


@pytest.mark.parametrize(("name", "option"), TEXT_OPTIONS)
def test_an_empty_option_is_refused(bespoke: Bespoke, name: str, option: str) -> None:
    """``--storage "$UNSET"`` must not mean the default storage."""
    result = bespoke(name, "a", "b", f"{option}=")
    assert result.exit_code == USAGE
    assert f"{option} is empty, as a variable is that is not set" in result.stderr


@pytest.mark.parametrize("command", ["pairs", "sweep", "pretrain"])
def test_an_unknown_configuration_is_refused(bespoke: Bespoke, tmp_path: Path, command: str) -> None:
    """The message says where the bundled ones are."""
    _assert_refused(bespoke(command, tmp_path / "digit.yaml"), "the bundled ones are in sweeps/configs")


@pytest.mark.parametrize("command", ["pairs", "sweep"])
def test_a_misspelt_key_is_refused_before_anything_starts(bespoke: Bespoke, small: Path, command: str) -> None:
    """Both in the file and on the command line."""
    _assert_refused(bespoke(command, small, "pairs.trian=8"), "pairs.trian: unknown key (did you mean 'train'?)")
    _assert_refused(
        bespoke(command, small, "pairs.train"), "override 'pairs.train' is not key=value, e.g. pairs.train=64"
    )
    small.write_text(small.read_text(encoding="utf-8").replace("fixed:", "fixd:"), encoding="utf-8")
    _assert_refused(bespoke(command, small), "fixd: unknown key (did you mean 'fixed'?)")


def test_an_nfe_that_a_family_cannot_use_is_refused(bespoke: Bespoke, small: Path) -> None:
    """The message names the family and the NFE. Other invalid values are refused by key."""
    _assert_refused(bespoke("sweep", small, "nfe=[4,7]"), "fixed family 'midpoint' at nfe 7")
    _assert_refused(
        bespoke("sweep", small, "learned.0.sigma0=-1"), "learned.0.sigma0.0: Input should be greater than 0 (got -1)"
    )


def test_options_of_the_command_line_reach_the_sweep(
    bespoke: Bespoke, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--storage and --tracking-uri override the configuration; --address and --no-wait are passed to the sweep."""
    received: dict[str, Any] = {}

    def run(config: Any, **named: Any) -> SweepOutcome:
        received.update(named, config=config)
        return SweepOutcome(rows=[], report="report.html", thetas="thetas", failed={}, log=None, truths={}, bill=BILL)

    monkeypatch.setattr("sweeps.sweep.run_sweep", run)
    arguments = ("--storage", "s3://b/a: {x}", "--tracking-uri", "http://head:5000", "--address", "auto", "--no-wait")
    result = bespoke("sweep", small, "nfe=[8]", *arguments)
    assert result.exit_code == 0, result.output
    assert (received["config"].storage, received["config"].tracking_uri) == ("s3://b/a: {x}", "http://head:5000")
    assert (received["config"].nfe, received["address"], received["wait"]) == ((8,), "auto", False)
    cost, *places = result.stdout.splitlines()
    assert cost.startswith("cost: ")
    assert places == ["report: report.html", "thetas: thetas"]


def test_a_sweep_with_failed_points_lists_them_and_exits_with_1(
    bespoke: Bespoke, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is still written, and the exit code lets scripts notice the failure."""
    outcome = SweepOutcome(
        rows=[],
        report="report.html",
        thetas="thetas",
        failed={"Euler nfe4": "ran away"},
        log="sweep.log",
        truths={},
        bill=BILL,
    )
    monkeypatch.setattr("sweeps.sweep.run_sweep", lambda config, **named: outcome)
    result = bespoke("sweep", small)
    assert result.exit_code == 1
    assert "report: report.html" in result.stdout
    assert result.stderr == "failed: Euler nfe4: ran away\ndetails: sweep.log\n"


def test_an_interrupted_command_exits_with_130_and_says_how_to_resume(
    bespoke: Bespoke, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """130 is what shells expect after Ctrl-C. A second Ctrl-C is ignored while Ray stops its processes at exit."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr("orchestrator.cli.main.signal.signal", handlers.__setitem__)

    def interrupted(config: Any, **named: Any) -> SweepOutcome:
        raise KeyboardInterrupt

    monkeypatch.setattr("sweeps.sweep.run_sweep", interrupted)
    result = bespoke("sweep", small)
    assert result.exit_code == 130
    assert "run the same command again to resume" in result.stderr
    assert handlers == {signal.SIGINT: signal.SIG_IGN}


@pytest.mark.parametrize("arguments", [("sweep", "{}"), ("sweep", "{}", "--debug"), ("--debug", "sweep", "{}")])
def test_an_internal_error_is_one_line_and_its_traceback_needs_debug(
    bespoke: Bespoke, small: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """A bug is not reported as a mistake of the user: the exit code is 3, and the line names the place in the code."""
    monkeypatch.setenv("BESPOKE_DEBUG", "")

    def broken(config: Any, **named: Any) -> SweepOutcome:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sweeps.sweep.run_sweep", broken)
    result = bespoke(*(argument.format(small) for argument in arguments))
    assert result.exit_code == 3
    line = rf"error: unexpected {re.escape(__file__)}, line \d+, in broken: RuntimeError: a bug; --debug shows .*"
    *rest, last = result.stderr.splitlines()
    assert re.fullmatch(line, last)
    assert bool(rest) == ("--debug" in arguments) == ("Traceback" in result.stderr)


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_list_prints_every_plugin_of_a_kind(bespoke: Bespoke, kind: str) -> None:
    """One line per plugin. `models` also lists the bundled weights."""
    result = bespoke("list", kind)
    assert result.exit_code == 0
    assert all(any(line.startswith(f"{name} ") for line in result.stdout.splitlines()) for name in plugins.names(kind))
    if kind == "models":
        assert "digits_eps_vp, digits_fm_ot, digits_fm_v_cs" in result.stdout
    if kind == "families":
        assert re.search(r"^midpoint +2 +2  Explicit midpoint", result.stdout, re.MULTILINE)
        assert re.search(
            r"^bns +learned +Bespoke non-stationary solver.*Shaul et al. 2024", result.stdout, re.MULTILINE
        )


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_list_shows_every_option_of_every_plugin(bespoke: Bespoke, kind: str) -> None:
    """Inherited and keyword-only ones too, as text and as JSON, and each plugin alone."""
    text, data = bespoke("list", kind).stdout, json.loads(bespoke("list", kind, "--json").stdout)
    for entry in data:
        fields = [field for field in dataclasses.fields(plugins.load(kind, entry["name"])) if field.init]
        assert {option["name"] for option in entry["options"]} == {field.name for field in fields}
        for option in entry["options"]:
            assert f"    {option['name']} ({option['type']}; " in text
    name = data[0]["name"]
    alone = bespoke("list", kind, name)
    assert alone.exit_code == 0
    assert all(f"  {option['name']} (" in alone.stdout for option in data[0]["options"])
    assert json.loads(bespoke("list", kind, name, "--json").stdout) == data[:1]


def test_list_marks_what_is_required_and_refuses_an_unknown_plugin(bespoke: Bespoke) -> None:
    """Inherited options have the descriptions of the class that defines them."""
    alone = bespoke("list", "models", "torch_module").stdout
    assert "shape (a list of whole numbers; required)" in alone
    assert "time_scale (a finite number; default 1.0)" in alone
    _assert_refused(bespoke("list", "models", "torch_modul"), "did you mean 'torch_module'?")


def test_an_unknown_kind_is_refused_with_the_known_ones(bespoke: Bespoke) -> None:
    """click makes this check."""
    _assert_refused(
        bespoke("list", "solvers"), "'solvers' is not one of 'datasets', 'decoders', 'exporters', 'families'"
    )


@pytest.mark.parametrize("command", [("compare", "digits"), ("ui",)])
def test_a_missing_store_is_refused(bespoke: Bespoke, tmp_path: Path, command: tuple[str, ...]) -> None:
    """Looking for a store does not create it."""
    _assert_refused(
        bespoke(*command, "--storage", tmp_path / "empty"), f"no MLflow store at {tmp_path}/empty/mlflow.db; run"
    )
    assert not (tmp_path / "empty").exists()


# ---- compare ------------------------------------------------------------------------------------------------------


def _point(kind: Any, label: str, nfe: int, psnr: float, **changes: Any) -> PointResult:
    point = {"family": label.lower(), "nfe": nfe, "guidance_scale": 1.0, "sigma0": 1.0, "seed": 0}
    metrics = {
        name: {"mean": value, "stderr": 0.1} for name, value in (("psnr_db", psnr), ("snr_db", 9.0), ("rmse", 0.1))
    }
    values: dict[str, Any] = {
        "key": f"{label}-{kind}-{nfe}-{psnr}".replace(" ", "-"),
        "point": point,
        "name": f"{label} nfe{nfe}",
        "kind": kind,
        "label": label,
        "grid": "uniform",
        "status": "finished",
        "validation_psnr_db": psnr + 0.5,
        "metrics": metrics,
        "forwards": 1000,
    }
    return PointResult(**(values | changes))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PointResult]]:
    """A storage whose MLflow has a finished sweep 'digits' and a sweep 'empty' without trials."""
    root = tmp_path_factory.mktemp("recorded")
    storage = Storage.at(root)
    start = {name: {"mean": 28.0, "stderr": 0.1} for name in ("psnr_db", "snr_db", "rmse")}
    results = [
        _point("common grid", "Euler", 4, 20.0),
        _point("best grid", "Euler", 4, 25.0),
        _point("common grid", "Euler", 8, 30.0),
        _point("learned", "BNS", 4, 35.0, start_metrics=start, start_validation_psnr_db=28.5),
        _point("learned", "BNS", 4, 34.0, start_metrics=start, start_validation_psnr_db=28.5),
    ]
    tracker = Tracker(f"sqlite:///{root}/mlflow.db")
    for name in ("digits", "empty"):
        experiment = tracker.experiment(name, str(root / "artifacts"))
        sweep = tracker.run(experiment, f"sweep/{name}", name, {ROLE: "sweep"})
        for result in results if name == "digits" else []:
            ResultStore(storage, result.key).save(result, THETA, [])
            parameters = {**result.point, "label": result.label, "kind": result.kind}
            log = tracker.trial_run(experiment, sweep.run_id, result.key, result.name, parameters)
            write_run(log, result, ResultStore(storage, result.key))
        sweep.finish({})
    return root, results


def test_compare_prints_the_table_of_the_sweep(bespoke: Bespoke, recorded: tuple[Path, list[PointResult]]) -> None:
    """Read from MLflow alone: the best point of each solver and NFE, or a dash if a solver was not run."""
    result = bespoke("compare", "digits", "--storage", recorded[0])
    assert result.exit_code == 0, result.output
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in result.stdout.splitlines() if "│" in line}
    values = {title: [cell.strip() for cell in columns] for title, columns in cells.items()}
    assert values == {
        "BNS": ["35.00", "—"],
        "start of BNS": ["28.00", "—"],
        "Euler, best grid": ["25.00", "—"],
        "Euler": ["20.00", "30.00"],
    }


def test_compare_as_json_has_a_row_for_every_point(bespoke: Bespoke, recorded: tuple[Path, list[PointResult]]) -> None:
    """A row has everything a script needs, including the path of theta. Points shown in the table are marked."""
    result = bespoke("compare", "digits", "--storage", recorded[0], "--json")
    by_point = {(row["label"], row["kind"], row["nfe"], row["psnr_db"]): row for row in json.loads(result.stdout)}
    assert len(by_point) == len(recorded[1])
    for expected in recorded[1]:
        row = by_point[expected.label, expected.kind, expected.point["nfe"], expected.metrics["psnr_db"]["mean"]]
        for key in ("family", "nfe", "sigma0", "guidance_scale", "seed"):
            assert row[key] == expected.point[key]
        assert (row["snr_db"], row["rmse"], row["forwards"], row["status"]) == (9.0, 0.1, 1000, "finished")
        assert Path(row["theta"]).read_text(encoding="utf-8") == THETA
        assert row["start_psnr_db"] == (28.0 if expected.kind == "learned" else None)
    assert not by_point["BNS", "learned", 4, 34.0]["selected"]
    assert sum(row["selected"] for row in by_point.values()) == 4


def test_compare_as_markdown_prints_a_table_for_a_readme(
    bespoke: Bespoke, recorded: tuple[Path, list[PointResult]]
) -> None:
    """The output can be pasted as it is."""
    from orchestrator.reports.sweep import markdown_table

    result = bespoke("compare", "digits", "--storage", recorded[0], "--markdown")
    assert result.stdout.strip() == markdown_table(rows(recorded[1])).strip()


def test_compare_refuses_an_unknown_experiment(bespoke: Bespoke, recorded: tuple[Path, list[PointResult]]) -> None:
    """The message lists the existing ones. An experiment without finished trials is not an error."""
    _assert_refused(bespoke("compare", "digit", "--storage", recorded[0]), "no experiment 'digit' in MLflow at sqlite:")
    assert bespoke("compare", "empty", "--storage", recorded[0]).exit_code == 0


# ---- evaluate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def theta(tmp_path: Path, facts: ModelFacts) -> Callable[..., Path]:
    """A function that writes a theta of Midpoint; its model is the test model unless the provenance says otherwise."""

    def write(name: str = "theta.json", **provenance: Any) -> Path:
        path = tmp_path / name
        solver = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)
        ThetaArtifact(solver, **{"family": "midpoint", "model_digest": facts.digest, **provenance}).save(path)
        return path

    return write


def test_a_theta_that_cannot_be_read_is_refused_before_anything_starts(
    bespoke: Bespoke, tmp_path: Path, small: Path, theta: Callable[..., Path]
) -> None:
    """The file is missing, is not JSON, or has a value that is not a number."""
    _assert_refused(
        bespoke("evaluate", tmp_path / "none.json", "--config", small), f"no theta artifact at {tmp_path}/none.json"
    )
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    _assert_refused(
        bespoke("evaluate", broken, "--config", small), f"{broken} is not a usable theta artifact: it is not JSON"
    )
    content = json.loads(theta().read_text(encoding="utf-8"))
    broken.write_text(json.dumps(content | {"a": [1.0, "x", 1.0, 1.0, 1.0]}), encoding="utf-8")
    _assert_refused(bespoke("evaluate", broken, "--config", small), "'a' holds 'x', which is not a number")


def test_a_theta_for_a_range_is_evaluated_at_the_scales_of_the_configuration(
    bespoke: Bespoke, tmp_path: Path, small: Path, facts: ModelFacts
) -> None:
    """One row per scale; a scale outside the range is refused before anything starts."""
    solver = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)
    artifact = ThetaArtifact(GuidedSolver(solver, solver, (1.0, 3.0)), family="bns_guided", model_digest=facts.digest)
    single = FoundTheta("single.json", ThetaArtifact(solver))
    chosen = at_scales([FoundTheta("theta.json", artifact), single], (1.0, 2.5))
    assert [theta.artifact.guidance_scale for theta in chosen] == [1.0, 2.5, 1.0]
    artifact.save(tmp_path / "theta.json")
    refused = bespoke("evaluate", tmp_path / "theta.json", "--config", small, "--set", "guidance_scale=[1,6]")
    _assert_refused(refused, "at the guidance scales of the configuration, but guidance_scale 6 is outside the range")
    _assert_refused(refused, "1 to 3; choose one inside it, or distil a theta for 6; set guidance_scale")


def test_a_theta_for_a_range_is_registered(
    bespoke: Bespoke, tmp_path: Path, facts: ModelFacts, storage: Storage
) -> None:
    """The registry holds the whole range."""
    solver = GridSolver(Midpoint(), 4, Grid()).to_ns(facts.scheduler)
    artifact = ThetaArtifact(GuidedSolver(solver, solver, (1.0, 3.0)), family="bns_guided", model_digest=facts.digest)
    artifact.save(tmp_path / "theta.json")
    done = bespoke("register", tmp_path / "theta.json", "--name", "guided", "--storage", storage.root)
    assert done.exit_code == 0, done.output
    text, _ = Tracker(f"sqlite:///{storage.root}/mlflow.db").read_theta("models:/guided/1")
    assert ThetaArtifact.from_json(text, origin="registry").digest == artifact.digest


def test_evaluate_refuses_missing_arguments_and_unknown_thetas(bespoke: Bespoke, small: Path, storage: Storage) -> None:
    """The message says which arguments are accepted, or where the theta was looked up."""
    _assert_refused(
        bespoke("evaluate", "--config", small), "nothing to evaluate: give files, runs:/ID, models:/NAME@ALIAS"
    )
    arguments = ("--config", small, "--storage", storage.root)
    _assert_refused(bespoke("evaluate", "runs:/abc", *arguments), "no MLflow store at")
    Tracker(f"sqlite:///{storage.root}/mlflow.db").experiment("small", None)
    _assert_refused(bespoke("evaluate", "runs:/abc", *arguments), "no theta at runs:/abc in MLflow")
    _assert_refused(
        bespoke("evaluate", "models:/none@champion", *arguments), "no theta at models:/none@champion in MLflow"
    )
    _assert_refused(bespoke("evaluate", "models:/none", *arguments), "write models:/NAME@ALIAS or models:/NAME/VERSION")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("evaluation.metrics=[psnrr]", "unknown metric 'psnrr' (did you mean 'psnr'?)"),
        ("evaluation.metrics=[psnr, psnr]", "evaluation.metrics has 'psnr_db' twice; leave one out"),
        ("evaluation.datasets={speech: {name: spoken_digits}}", "is conditioned on class labels, which SpokenDigits"),
        ("evaluation.baselines=[bns]", "family 'bns' is learned; list it under 'learned'"),
        ("evaluation.baselines=[{family: euler, grid: gits}]", "baseline 'euler' cannot step on grid 'gits'"),
        ("evaluation.samples=0", "evaluation.samples: Input should be greater than or equal to 1"),
        ("evaluation.scorer_device=cuda", "scorer_device 'cuda' needs scorer_gpus above 0"),
    ],
)
def test_an_invalid_evaluation_is_refused_before_anything_starts(
    bespoke: Bespoke, small: Path, theta: Callable[..., Path], override: str, problem: str
) -> None:
    """The settings are checked first, not after an hour of sampling."""
    _assert_refused(bespoke("evaluate", theta(), "--config", small, "--set", override), problem)


def test_a_registered_theta_can_be_read_by_its_alias(
    bespoke: Bespoke, theta: Callable[..., Path], storage: Storage
) -> None:
    """The registry returns the artifact that `bespoke register` stored. Registering again makes a new version."""
    path = theta()
    first = bespoke("register", path, "--name", "digits", "--alias", "champion", "--storage", storage.root)
    assert first.stdout == "models:/digits/1 is now models:/digits@champion\n", first.output
    tracker = Tracker(f"sqlite:///{storage.root}/mlflow.db")
    text, run_id = tracker.read_theta("models:/digits@champion")
    assert ThetaArtifact.from_json(text, origin="registry").digest == load_theta(path).digest
    second = bespoke("register", f"runs:/{run_id}", "--name", "digits", "--storage", storage.root)
    assert second.stdout == "models:/digits/2\n", second.output
    assert tracker.read_theta("models:/digits/2") == (text, run_id)


@pytest.mark.cluster
def test_evaluate_writes_tables_a_report_and_mlflow_runs(
    bespoke: Bespoke, small: Path, theta: Callable[..., Path], copied: Storage, ray_session: None
) -> None:
    """A theta of another model needs --allow-transfer. Two files have two rows, and runs are reused."""
    other = theta(model_digest=ZooModel("digits_fm_v_cs").digest)
    options = ("--config", small, "--storage", copied.root, "--set", "evaluation.baselines=[euler]")
    _assert_refused(bespoke("evaluate", other, *options), "this theta was made for model ")
    _assert_refused(bespoke("evaluate", other, *options), "pass --allow-transfer")
    result = bespoke("evaluate", other, *options, "--json", "--allow-transfer")
    assert result.exit_code == 0, result.output
    rows = {(row["solver"], row["metric"]): row for row in json.loads(result.stdout)}
    assert {solver for solver, _ in rows} == {"Midpoint", "Euler", "Ground truth (dopri5)"}
    assert rows["Midpoint", "psnr_db"]["value"] > rows["Euler", "psnr_db"]["value"]
    assert rows["Midpoint", "psnr_db"]["origin"] == str(other)

    # A second file with an equal solver but another family name gets a row of its own.
    twin = theta(name="twin.json", family="twin")
    plain = bespoke("evaluate", theta(), twin, *options)
    assert plain.exit_code == 0, plain.output
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in plain.stdout.splitlines()]
    values = {row[0]: row[2] for row in cells if row[:1] in (["Midpoint"], ["twin"])}
    assert list(values) == ["Midpoint", "twin"]
    assert values["Midpoint"] == values["twin"]
    digits = len(values["twin"].split(" ")[0].partition(".")[2])
    assert values["twin"].startswith(f"{rows['Midpoint', 'psnr_db']['value']:.{digits}f}")
    folder = Path(copied.root) / "experiments" / "small" / "evaluation"
    assert {path.name for path in folder.iterdir()} == {
        "scores.parquet",
        "tables.md",
        "tables.tex",
        "report.html",
        "samples_labels_guidance1_nfe4.png",
    }
    tracker = Tracker(f"sqlite:///{copied.root}/mlflow.db")
    runs = tracker.client.search_runs([tracker.experiment("small", None)], f"tags.`{ROLE}` = 'evaluation'")
    assert {run.data.params["label"]: run.data.metrics.get("labels/psnr_db") for run in runs} == {
        "Midpoint": pytest.approx(rows["Midpoint", "psnr_db"]["value"]),
        "twin": pytest.approx(rows["Midpoint", "psnr_db"]["value"]),
        "Euler": pytest.approx(rows["Euler", "psnr_db"]["value"]),
    }, "evaluating a theta again reuses its run"


def test_the_theta_fixture_writes_a_valid_artifact(theta: Callable[..., Path]) -> None:
    """The tests above therefore see refusals for the reasons they name, not for a broken artifact."""
    assert load_theta(theta()).solver.nfe == 4


# ---- pretrain -----------------------------------------------------------------------------------------------------


def test_pretrain_writes_a_model_that_loads(bespoke: Bespoke, tmp_path: Path) -> None:
    """Weights and model card are written to --output. A misspelt key is refused first."""
    net = {"net": "film_mlp", "shape": [1, 8, 8], "classes": 10, "width": 8, "depth": 1, "condition_width": 8}
    recipe = {"name": "tiny", "architecture": net, "prediction": "velocity", "scheduler": "cond_ot", "threads": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe | {"storage": str(tmp_path / "storage")}), encoding="utf-8")
    _assert_refused(bespoke("pretrain", path, "iteration=2"), "iteration: unknown key (did you mean 'iterations'?)")
    result = bespoke("pretrain", path, "iterations=2", "batch_size=8", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "tiny.safetensors: held-out loss " in result.stdout
    assert ZooModel(str(tmp_path / "out/tiny.safetensors")).prediction == "velocity"
    card = (tmp_path / "out/tiny.md").read_text(encoding="utf-8")
    assert "Share of ground-truth samples that `digits_cnn` assigns to their label: " in card
    client = MlflowClient(f"sqlite:///{tmp_path}/storage/mlflow.db")
    experiment = client.get_experiment_by_name("pretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    again = bespoke("pretrain", path, "iterations=3", "batch_size=8", "--output", tmp_path / "out")
    assert again.exit_code == 0, again.output  # a different recipe under the same name gets a run of its own
    assert len(client.search_runs([experiment.experiment_id])) == 2
    _assert_refused(bespoke("pretrain", path, "dataset=labels"), "dataset 'labels' has no samples to train on")
    assert client.search_runs([experiment.experiment_id])[0].info.status == "FAILED"
    assert run.data.params["learning_rate"] == "0.002"
    (held_out,) = client.get_metric_history(run.info.run_id, "validation_loss")
    assert held_out.step == 2
    assert f"held-out loss {held_out.value:.4f}" in result.stdout
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {"tiny.md", "tiny.png"}
