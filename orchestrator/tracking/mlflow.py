"""Writes and reads experiments, runs, metrics and artifacts in MLflow.

A run is looked up by its tag ``bespoke.key`` before it is created, so that a resumed sweep continues in its existing
runs. The driver creates the database, the experiment and the parent run before any trial starts, since processes that
open a new SQLite store at the same time fail.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from mlflow import MlflowClient
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException, RestException

from orchestrator.errors import UserError
from orchestrator.lock import exclusive
from orchestrator.progress import note
from orchestrator.storage import Storage, digest_of
from orchestrator.tracking.ping import STORE_ERRORS, ping
from orchestrator.tracking.sqlite_store import create_store, creating, decode_folders
from orchestrator.tracking.uri import SQLITE, sqlite_path, unusable
from orchestrator.uris import shown, without_secrets

# Hides the notices about setting up a new store.
for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)

T = TypeVar("T")

KEY = "bespoke.key"
PARENT = "mlflow.parentRunId"
ROLE = "bespoke.role"
SWEEP = "bespoke.sweep"
UPDATED = "bespoke.updated"
THETA = "bespoke.theta_digest"
"""Tag of a trial's run with the digest of its theta, by which an evaluation finds the run."""
LOGGED = "bespoke.evaluated/"
"""Prefix of tags, completed by a key, with the digest of the curves that an evaluation logged under this key."""
THETA_FILE = "theta.json"

#: Makes the UI show runs, curves and datasets first, instead of traces of language models.
KIND = {"mlflow.experimentKind": "custom_model_development"}
#: Tag with the description of a run, shown in the UI as Markdown.
DESCRIPTION = "mlflow.note.content"

RETRIES = 6
"""Attempts at a request while the store is busy. Pauses start at 0.5 s and double, to about 16 s in all."""


def _retrying(action: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call ``action`` with these arguments, and retry it while the store is locked or unavailable."""
    for attempt in range(RETRIES):
        try:
            return action(*arguments, **options)
        except MlflowException as error:
            transient = error.error_code in ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR") or "locked" in str(error)
            if not transient or attempt == RETRIES - 1:
                raise
            time.sleep(0.5 * 2**attempt)
    raise AssertionError("the loop returns or raises")


NAME_LENGTH = 200
"""Longest name of a metric or parameter here; MLflow's limit is 250, and suffixes such as ``_stderr`` follow."""


def entity_name(text: str) -> str:
    """A name that MLflow accepts for a metric or parameter: ``text`` itself if it is one.

    MLflow refuses brackets, '@', quotes and others, and names that read as another path. A name that had to be changed
    ends with a digest of ``text``, so that two texts never share one name.
    """
    name = posixpath.normpath(re.sub(r"[^\w./: -]", "-", text)[:NAME_LENGTH]).lstrip("./")
    return text if name == text else f"{name}-{digest_of(text)[:8]}"


def _key(text: str) -> str:
    """A run's key as it can stand in a query, which has no escape for quotes. The inverse of :func:`unquote`."""
    return re.sub(r"[%'\"`\\]", lambda match: f"%{ord(match[0]):02x}", text)


class RunLog:
    """Writes one MLflow run."""

    def __init__(self, client: MlflowClient, run_id: str):
        self.client = client
        self.run_id = run_id

    def _log(self, **entries: Sequence[Metric] | Sequence[Param] | Sequence[RunTag]) -> None:
        _retrying(self.client.log_batch, self.run_id, **entries)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at one step, in one request."""
        now = int(time.time() * 1000)
        self._log(metrics=[Metric(entity_name(name), float(value), now, step) for name, value in values.items()])

    def curve(self, name: str, points: Sequence[tuple[int, float]]) -> None:
        """Log one metric at many steps, e.g. PSNR at step = NFE."""
        now = int(time.time() * 1000)
        self._log(metrics=[Metric(entity_name(name), value, now, step) for step, value in points])

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters. Logging the same values again is allowed."""
        self._log(params=[Param(entity_name(name), without_secrets(str(value))) for name, value in values.items()])

    def tags(self, values: Mapping[str, str]) -> None:
        self._log(tags=[RunTag(name, without_secrets(value)) for name, value in values.items()])

    def file(self, path: Path) -> None:
        _retrying(self.client.log_artifact, self.run_id, str(path))

    def pairs(self, name: str, digest: str, location: str, context: str) -> None:
        """Record a pair set as an input of this run."""
        dataset = DatasetEntity(name=name, digest=digest, source_type="local", source=json.dumps({"uri": location}))
        entry = DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])
        _retrying(self.client.log_inputs, self.run_id, datasets=[entry])

    def curves_once(self, key: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Log curves, unless the same values were already logged under ``key``."""
        digest = digest_of([[name, [[step, repr(value)] for step, value in points]] for name, points in curves.items()])
        tags = _retrying(self.client.get_run, self.run_id).data.tags
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
        """Log the final metrics, parameters and artifacts, and close the run."""
        self.metrics(metrics)
        if parameters:
            self.parameters(parameters)
        for name, text in (texts or {}).items():
            _retrying(self.client.log_text, self.run_id, text, name)
        _retrying(self.client.set_terminated, self.run_id, status)


class Tracker:
    """Client of an MLflow store.

    Args:
        uri: Tracking URI.

    Raises:
        UserError: There cannot be a store at this address.
    """

    def __init__(self, uri: str):
        self.uri = uri
        decode_folders(uri)
        with self._reachable():
            self.client = MlflowClient(tracking_uri=uri)
        path = sqlite_path(uri)
        if path is not None and (undecoded := uri.removeprefix(SQLITE)) != str(path):
            with suppress(OSError):  # MLflow creates the folder of the name that is not decoded, and leaves it empty
                os.removedirs(Path(undecoded).parent)

    @classmethod
    def open(cls, uri: str, *, create: bool = False) -> Tracker:
        """The client of a store that answers. A command opens the store before its trials do.

        Args:
            uri: Tracking URI.
            create: Whether to create a SQLite store that does not exist.

        Raises:
            UserError: The store does not exist or does not answer; names the address, the reason and the remedy.
        """
        path = sqlite_path(uri)
        if path is None:
            ping(uri)
            return cls(uri)
        if not create and not path.is_file():
            raise UserError(
                f"no MLflow store at {path}; run `bespoke sweep` first, or give --storage or --tracking-uri"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(uri, str(error)) from error
        if not os.access(path.parent, os.W_OK):
            return cls(uri)
        # Two processes that create the tables of one new store at the same time would both fail.
        with exclusive(Storage.at(path.parent), f".{path.name}.lock", wait=True, announce=note):
            ping(uri)
            with creating:
                if not path.exists():
                    create_store(uri, path)
                return cls(uri)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except STORE_ERRORS as error:
            raise unusable(self.uri, str(error)) from error

    def experiment(self, name: str, artifact_location: str | None) -> str:
        """The id of an experiment, which is created if it does not exist.

        Raises:
            UserError: The tracking store cannot be reached, the experiment was deleted, or the name is MLflow's own.
        """
        if name == "Default":
            raise UserError(
                "experiment name 'Default' is MLflow's own, whose artifacts are not kept in the storage; choose another"
            )
        with self._reachable():
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                try:
                    return self.client.create_experiment(name, artifact_location=artifact_location, tags=KIND)
                except MlflowException:  # another command may have created it since
                    experiment = self.client.get_experiment_by_name(name)
                    if experiment is None:
                        raise
        if experiment.lifecycle_stage != "active":
            raise UserError(
                f"MLflow experiment {name!r} was deleted; restore it with `MLFLOW_TRACKING_URI="
                f"{shlex.quote(shown(self.uri))} mlflow experiments restore -x {experiment.experiment_id}`, or give "
                f"the experiment another name"
            )
        return experiment.experiment_id

    def run(self, experiment_id: str, key: str, name: str, tags: Mapping[str, str] | None = None) -> RunLog:
        """The run with this key, reopened or created."""
        key = _key(key)
        runs = _retrying(self.client.search_runs, [experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
        if runs:
            run = runs[0]
            if run.info.status != "RUNNING":
                _retrying(self.client.update_run, run.info.run_id, status="RUNNING")
        else:
            run = _retrying(self.client.create_run, experiment_id, run_name=name, tags={KEY: key, **(tags or {})})
        return RunLog(self.client, run.info.run_id)

    def trial_run(
        self, experiment_id: str, sweep_run_id: str, key: str, name: str, parameters: Mapping[str, Any]
    ) -> RunLog:
        """The run of one trial, nested under the sweep's run; reopened or created."""
        tags = {PARENT: sweep_run_id, SWEEP: sweep_run_id, ROLE: "trial"}
        log = self.run(experiment_id, f"{sweep_run_id}/{key}", name, tags)
        log.parameters(parameters)
        return log

    def summary_run(
        self, experiment_id: str, sweep_run_id: str, key: str, name: str, parameters: Mapping[str, Any]
    ) -> RunLog:
        """The run of one family's curves. It is not nested under the sweep's run, so that the chart view shows it."""
        log = self.run(experiment_id, f"{sweep_run_id}/{key}", name, {SWEEP: sweep_run_id, ROLE: "summary"})
        log.parameters(parameters)
        return log

    def _search(self, experiment_id: str, query: str) -> Iterator[Run]:
        """All runs that match a query, the newest first."""
        token: str | None = None
        while True:
            page = _retrying(self.client.search_runs, [experiment_id], query, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def runs_of(self, experiment_id: str, sweep_run_id: str, role: str) -> dict[str, Run]:
        """The finished runs of a sweep with one role, by key."""
        query = f"tags.`{SWEEP}` = '{sweep_run_id}' and tags.`{ROLE}` = '{role}' and attributes.status = 'FINISHED'"
        runs = self._search(experiment_id, query)
        return {unquote(run.data.tags[KEY]).removeprefix(f"{sweep_run_id}/"): run for run in runs}

    def thetas(self, experiment_id: str) -> dict[str, Run]:
        """The newest finished trial run of every theta of an experiment, by the digest of theta."""
        runs: dict[str, Run] = {}
        for run in self._search(experiment_id, f"tags.`{ROLE}` = 'trial' and attributes.status = 'FINISHED'"):
            if (digest := run.data.tags.get(THETA)) is not None:
                runs.setdefault(digest, run)
        return runs

    def read_theta(self, uri: str) -> tuple[str, str]:
        """theta as JSON, and the id of its run.

        Args:
            uri: ``runs:/RUN_ID``, ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

        Raises:
            UserError: The run or model does not exist, or it has no theta.
        """
        try:
            run_id = uri.removeprefix("runs:/") if uri.startswith("runs:/") else self._run_of_model(uri)
            with tempfile.TemporaryDirectory() as folder:
                path = self.client.download_artifacts(run_id, THETA_FILE, folder)
                return Path(path).read_text(encoding="utf-8"), run_id
        except (MlflowException, OSError) as error:
            raise UserError(f"no theta at {uri} in MLflow at {shown(self.uri)}: {error}") from error

    def _run_of_model(self, uri: str) -> str:
        name, at, alias = uri.removeprefix("models:/").partition("@")
        if at:
            version = self.client.get_model_version_by_alias(name, alias)
        else:
            name, slash, number = name.rpartition("/")
            if not slash or not number.isdecimal():
                raise UserError(
                    f"{uri!r} does not name a model version; write models:/NAME@ALIAS or models:/NAME/VERSION"
                )
            version = self.client.get_model_version(name, number)
        if not version.run_id:
            raise UserError(f"{uri} was not made by `bespoke register`: its version does not name a run")
        return version.run_id

    def register(self, name: str, run_id: str, alias: str | None) -> str:
        """Register the theta of a run as a new version of a model, and return the version's number.

        Args:
            name: Name of the registered model, which is created if it does not exist.
            run_id: The run that holds theta.
            alias: Alias that is moved to this version; None: no alias.

        Raises:
            UserError: MLflow rejects the name or the alias.
        """
        version = None
        try:
            with suppress(RestException, MlflowException):  # it may exist; any other error recurs below
                self.client.create_registered_model(name)
            run = self.client.get_run(run_id)
            source = f"{run.info.artifact_uri}/{THETA_FILE}"
            version = self.client.create_model_version(name, source, run_id).version
            if alias is not None:
                self.client.set_registered_model_alias(name, alias, version)
        except MlflowException as error:
            if version is not None:  # nothing remains of what was refused
                self.client.delete_model_version(name, version)
            as_alias = "" if version is None else f" with alias {alias!r}"
            raise UserError(f"theta cannot be registered as {name!r}{as_alias}: {error}") from error
        return str(version)

    def delete(self, run: Run) -> None:
        """Move a run to MLflow's trash."""
        _retrying(self.client.delete_run, run.info.run_id)

    def newest_sweep_experiment(self) -> str | None:
        """The id of the experiment whose sweep was updated last; None if the store holds no sweep."""
        with self._reachable():
            sweep = self._newest_sweep([experiment.experiment_id for experiment in self.client.search_experiments()])
        return None if sweep is None else sweep.info.experiment_id

    def _newest_sweep(self, experiment_ids: list[str]) -> Run | None:
        sweeps = self.client.search_runs(experiment_ids, f"tags.`{ROLE}` = 'sweep'")
        # A repeated sweep continues in its existing run, so the newest sweep is the one updated last.
        return max(sweeps, key=lambda run: (run.data.tags.get(UPDATED, ""), run.info.start_time), default=None)

    def latest_trials(self, experiment_name: str) -> list[Run]:
        """The finished trial runs of the newest sweep of an experiment.

        Raises:
            UserError: The tracking store cannot be reached, the experiment does not exist, or it has no sweep.
        """
        with self._reachable():
            experiment = self.client.get_experiment_by_name(experiment_name)
        if experiment is None:
            known = ", ".join(e.name for e in self.client.search_experiments() if e.name != "Default") or "none"
            raise UserError(
                f"no experiment {experiment_name!r} in MLflow at {shown(self.uri)}; existing experiments: {known}"
            )
        latest = self._newest_sweep([experiment.experiment_id])
        if latest is None:
            raise UserError(f"experiment {experiment_name!r} has no sweep yet; run `bespoke sweep`")
        return list(self.runs_of(experiment.experiment_id, latest.info.run_id, "trial").values())


def open_experiment(uri: str, name: str, storage: Storage) -> tuple[Tracker, str]:
    """The tracker and the id of an experiment; the store and the experiment are created if they do not exist.

    A server decides itself where artifacts are kept. Those of a local store are kept beside the data.

    Args:
        uri: Tracking URI.
        name: Name of the experiment.
        storage: Storage of the data.
    """
    tracker = Tracker.open(uri, create=True)
    artifacts = None
    if uri.startswith("sqlite:"):
        folder = storage.location("mlartifacts")
        artifacts = Path(folder).as_uri() if storage.is_local else folder  # MLflow decodes a path as if it were a URI
    return tracker, tracker.experiment(name, artifacts)


def wants_system_metrics() -> bool:
    """Whether MLflow's own environment variable enables system metrics."""
    return bool(MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get())


def monitor_system(uri: str, run_id: str, node: str) -> Any:
    """Start MLflow's monitor of this machine, which appends ``system/NODE/…`` metrics to those of the run."""
    # Imported here, since trials import this module without needing the monitor.
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    decode_folders(uri)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, node_id=node, tracking_uri=uri)
    monitor.start()
    return monitor
