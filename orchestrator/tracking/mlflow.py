"""MLflow: the only file that imports it. Experiments, runs, metrics, artifacts, and reading them back.

Every run is found by a tag of its own (``bespoke.key``) before one is made, so a resumed sweep goes on in the runs it
had. The database, the experiment and the parent run are made on the driver, before any trial: several processes that
open a new SQLite store together fail.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

# Before the import: these are read when mlflow loads.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException, RestException
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.errors import UserError
from orchestrator.storage import Storage, digest_of

# Its notices on setting up a new store are no news to the user.
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)

T = TypeVar("T")

KEY = "bespoke.key"
PARENT = "mlflow.parentRunId"
ROLE = "bespoke.role"
SWEEP = "bespoke.sweep"
UPDATED = "bespoke.updated"
THETA = "bespoke.theta_digest"
"""Of a trial's run: the digest of its theta's numbers, by which an evaluation finds it."""
LOGGED = "bespoke.evaluated/"
"""Of a run, with a key behind it: digest of the numbers that an evaluation has logged there."""
THETA_FILE = "theta.json"

#: Makes the UI show runs, curves and datasets first, instead of traces of language models.
KIND = {"mlflow.experimentKind": "custom_model_development"}
#: What the UI shows as a run's description, as Markdown.
NOTE = "mlflow.note.content"

RETRIES = 6
"""Attempts at a request while the store is busy: 0.5 s, then doubling, about half a minute in all."""


def _retrying(action: Callable[[], T]) -> T:
    """Run ``action`` again while the store is locked or away."""
    for attempt in range(RETRIES):
        try:
            return action()
        except MlflowException as error:
            transient = error.error_code in ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR") or "locked" in str(error)
            if not transient or attempt == RETRIES - 1:
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("the loop returns or raises")


PING_SECONDS = 5.0

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
"""For a ping: the client itself asks again for minutes."""


class RunLog:
    """One MLflow run that is being written."""

    def __init__(self, client: MlflowClient, run_id: str):
        self.client = client
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log these metrics at one step, in one request."""
        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in values.items()]
        _retrying(lambda: self.client.log_batch(self.run_id, metrics=entries))

    def curve(self, name: str, points: Sequence[tuple[int, float]]) -> None:
        """One metric at many steps, e.g. PSNR at step = NFE."""
        now = int(time.time() * 1000)
        entries = [Metric(name, value, now, step) for step, value in points]
        _retrying(lambda: self.client.log_batch(self.run_id, metrics=entries))

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters; logging the same ones again is no error."""
        entries = [Param(name, str(value)) for name, value in values.items()]
        _retrying(lambda: self.client.log_batch(self.run_id, params=entries))

    def tags(self, values: Mapping[str, str]) -> None:
        entries = [RunTag(name, value) for name, value in values.items()]
        _retrying(lambda: self.client.log_batch(self.run_id, tags=entries))

    def text(self, name: str, text: str) -> None:
        _retrying(lambda: self.client.log_text(self.run_id, text, name))

    def file(self, path: Path, folder: str | None = None) -> None:
        _retrying(lambda: self.client.log_artifact(self.run_id, str(path), folder))

    def pairs(self, name: str, digest: str, location: str, context: str) -> None:
        """Record a pair set as an input of this run."""
        dataset = DatasetEntity(name=name, digest=digest, source_type="local", source=f'{{"uri": "{location}"}}')
        entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
        _retrying(lambda: self.client.log_inputs(self.run_id, datasets=[entry]))

    def curves_once(self, key: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Log these metrics at their steps, unless these very numbers were logged under ``key`` before."""
        digest = digest_of([[name, [[step, repr(value)] for step, value in points]] for name, points in curves.items()])
        tags = _retrying(lambda: self.client.get_run(self.run_id)).data.tags
        if tags.get(LOGGED + key) == digest:
            return
        for name, points in curves.items():
            self.curve(name, points)
        self.tags({LOGGED + key: digest})

    def finish(
        self,
        metrics: Mapping[str, float],
        texts: Mapping[str, str] | None = None,
        parameters: Mapping[str, Any] | None = None,
        status: str = "FINISHED",
    ) -> None:
        """Log the final numbers and artifacts, and close the run."""
        self.metrics(metrics)
        if parameters:
            self.parameters(parameters)
        for name, text in (texts or {}).items():
            self.text(name, text)
        _retrying(lambda: self.client.set_terminated(self.run_id, status))


class Tracker:
    """An MLflow store.

    Raises:
        UserError: There can be none at this address.
    """

    def __init__(self, uri: str):
        self.uri = uri
        with self._reachable():
            if uri.startswith("sqlite:///"):
                Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            self.client = MlflowClient(tracking_uri=uri)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise UserError(f"MLflow at {self.uri} cannot be used: {error}; check --tracking-uri") from error

    def experiment(self, name: str, artifact_location: str | None) -> str:
        """The id of an experiment, made where it is not there.

        Raises:
            UserError: The tracking store cannot be reached, or the experiment was deleted.
        """
        with self._reachable():
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return self.client.create_experiment(name, artifact_location=artifact_location, tags=KIND)
        if found.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {name!r} was deleted; restore it with `mlflow experiments restore "
                f"-x {found.experiment_id}`, or give the experiment another name"
            )
        return found.experiment_id

    def _find(self, experiment_id: str, key: str) -> Run | None:
        runs = _retrying(lambda: self.client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1))
        return runs[0] if runs else None

    def run(self, experiment_id: str, key: str, name: str, tags: Mapping[str, str] | None = None) -> RunLog:
        """The run with this key, opened again or made."""
        found = self._find(experiment_id, key)
        if found is None:
            found = _retrying(
                lambda: self.client.create_run(experiment_id, run_name=name, tags={KEY: key, **(tags or {})})
            )
        elif found.info.status != "RUNNING":
            _retrying(lambda: self.client.update_run(found.info.run_id, status="RUNNING"))
        return RunLog(self.client, found.info.run_id)

    def trial_run(
        self, experiment_id: str, sweep_run_id: str, key: str, name: str, parameters: Mapping[str, Any]
    ) -> RunLog:
        """The run of one trial, nested under its sweep's: found by its key, or made."""
        tags = {PARENT: sweep_run_id, SWEEP: sweep_run_id, ROLE: "trial"}
        log = self.run(experiment_id, f"{sweep_run_id}/{key}", name, tags)
        log.parameters(parameters)
        return log

    def summary_run(
        self, experiment_id: str, sweep_run_id: str, key: str, name: str, parameters: Mapping[str, Any]
    ) -> RunLog:
        """The run of one family's curves. Beside the sweep, not under it: the chart view then shows it at once."""
        log = self.run(experiment_id, f"{sweep_run_id}/{key}", name, {SWEEP: sweep_run_id, ROLE: "summary"})
        log.parameters(parameters)
        return log

    def runs_of(self, experiment_id: str, sweep_run_id: str, role: str) -> dict[str, Run]:
        """The finished runs of a sweep in one role, by key."""
        query = f"tags.`{SWEEP}` = '{sweep_run_id}' and tags.`{ROLE}` = '{role}' and attributes.status = 'FINISHED'"
        found: dict[str, Run] = {}
        token: str | None = None
        while True:
            page = self._search(experiment_id, query, token)
            found |= {run.data.tags[KEY].removeprefix(f"{sweep_run_id}/"): run for run in page}
            token = page.token
            if not token:
                return found

    def thetas(self, experiment_id: str) -> dict[str, Run]:
        """The newest finished trial run of every theta of an experiment, by the digest of its numbers."""
        query = f"tags.`{ROLE}` = 'trial' and attributes.status = 'FINISHED'"
        found: dict[str, Run] = {}
        token: str | None = None
        while True:
            page = self._search(experiment_id, query, token)
            for run in page:
                if (digest := run.data.tags.get(THETA)) is not None:
                    found.setdefault(digest, run)  # newest first
            token = page.token
            if not token:
                return found

    def read_theta(self, uri: str) -> tuple[str, str]:
        """theta as JSON, and the id of the run that it is from.

        Args:
            uri: ``runs:/RUN_ID``, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

        Raises:
            UserError: There is no such run or model, or it has no theta.
        """
        try:
            run_id = uri.removeprefix("runs:/") if uri.startswith("runs:/") else self._run_of_model(uri)
            with tempfile.TemporaryDirectory() as folder:
                path = self.client.download_artifacts(run_id, THETA_FILE, folder)
                return Path(path).read_text(encoding="utf-8"), run_id
        except (MlflowException, OSError) as error:
            raise UserError(f"no theta at {uri} in MLflow at {self.uri}: {error}") from error

    def _run_of_model(self, uri: str) -> str:
        name, at, alias = uri.removeprefix("models:/").partition("@")
        if at:
            version = self.client.get_model_version_by_alias(name, alias)
        else:
            name, slash, number = name.rpartition("/")
            if not slash or not number.isdecimal():
                raise UserError(f"{uri!r} names no model version; write models:/NAME@ALIAS or models:/NAME/VERSION")
            version = self.client.get_model_version(name, number)
        if not version.run_id:
            raise UserError(f"{uri} was not made by `bespoke register`: its version names no run")
        return version.run_id

    def register(self, name: str, run_id: str, alias: str | None) -> str:
        """A new version of a registered model, of the theta of a run; its number.

        Args:
            name: Of the model; made where there is none.
            run_id: The run that holds theta.
            alias: Name that points to this version from now on.

        Raises:
            UserError: MLflow refuses the name or the alias.
        """
        try:
            with suppress(RestException, MlflowException):  # it is there already: told apart below
                self.client.create_registered_model(name)
            run = self.client.get_run(run_id)
            source = f"{run.info.artifact_uri}/{THETA_FILE}"
            version = self.client.create_model_version(name, source, run_id)
            if alias is not None:
                self.client.set_registered_model_alias(name, alias, version.version)
        except MlflowException as error:
            raise UserError(f"theta cannot be registered as {name!r}: {error}") from error
        return str(version.version)

    def _search(self, experiment_id: str, query: str, token: str | None) -> Any:
        return _retrying(lambda: self.client.search_runs([experiment_id], query, max_results=1000, page_token=token))

    def delete(self, run: Run) -> None:
        """Move a run to MLflow's trash."""
        _retrying(lambda: self.client.delete_run(run.info.run_id))

    def latest_trials(self, experiment_name: str) -> list[Run]:
        """The finished trial runs of the newest sweep of an experiment.

        Raises:
            UserError: The tracking store cannot be reached, there is no such experiment, or it has no sweep.
        """
        with self._reachable():
            experiment = self.client.get_experiment_by_name(experiment_name)
        if experiment is None:
            known = ", ".join(e.name for e in self.client.search_experiments() if e.name != "Default") or "none"
            raise UserError(f"no experiment {experiment_name!r} in MLflow at {self.uri}; there are: {known}")
        sweeps = self._search(experiment.experiment_id, f"tags.`{ROLE}` = 'sweep'", None)
        if not sweeps:
            raise UserError(f"experiment {experiment_name!r} has no sweep yet; run `bespoke sweep`")
        # A sweep that is run again goes on in its old run: what counts is when it was last at work.
        latest = max(sweeps, key=lambda run: (run.data.tags.get(UPDATED, ""), run.info.start_time))
        return list(self.runs_of(experiment.experiment_id, latest.info.run_id, "trial").values())


def open_experiment(uri: str, name: str, storage: Storage) -> tuple[Tracker, str]:
    """MLflow and the id of an experiment in it, both made where they are not there yet.

    A server keeps artifacts where it was told to; a local store's belong beside the data.

    Args:
        uri: The tracking store.
        name: Of the experiment.
        storage: The data.
    """
    tracker = Tracker(uri)
    artifacts = storage.location("mlartifacts") if uri.startswith("sqlite:") else None
    return tracker, tracker.experiment(name, artifacts)


def check_readable(uri: str) -> None:
    """Refuse a SQLite store that is not there: opening it would make an empty one.

    Raises:
        UserError: Naming the file and the remedy.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.is_file():
        raise UserError(f"no MLflow store at {path}; run `bespoke sweep` first, or give --storage or --tracking-uri")


def wants_system_metrics() -> bool:
    """Whether MLflow's own switch asks for system metrics."""
    return bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())


def monitor_system(uri: str, run_id: str, node: str) -> Any:
    """MLflow's monitor of this machine, begun: it logs ``system/NODE/…`` to the run, after what the run has already."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor  # trials import this file, too

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=uri)
    monitor.start()
    return monitor


def ping(uri: str) -> None:
    """Ask the tracking store for anything at all, within seconds. A SQLite file that is not there yet is no error.

    Raises:
        UserError: Naming the address and what is wrong with it.
    """
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return  # the first sweep makes it; opening it here would
    before = {name: os.environ.get(name) for name in IMPATIENT}
    try:
        parts = urlsplit(uri)
        if parts.scheme in ("http", "https"):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=PING_SECONDS).close()
        os.environ.update(IMPATIENT)
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ValueError) as error:
        raise UserError(f"MLflow at {uri} cannot be used: {error}; check --tracking-uri") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
