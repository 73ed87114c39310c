"""Characters of paths mean themselves: in the storage, in MLflow's store, and in what either reports."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli.main import main
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import ConfigError
from orchestrator.files import absolute
from orchestrator.storage import Storage
from orchestrator.tracking.mlflow import Tracker, open_experiment
from orchestrator.tracking.uri import resolve_tracking_uri, sqlite_path

NAMES = [
    "a b",
    "50%",
    "a%20b",
    "a%",
    "a?b",
    "a#b",
    "ü",
    "e'f",
    '"g"',
    "h;i",
    "j&k=l",
    "[m]{n}",
    "$o",
    "p:q",
    "r\ns",
    "s3:x",
]
FOLDER = "50% a%20b?c#d ü \"e' :f ;g&h=1[i]{j}$k"
"""Names of folders with characters that mean something in URIs, SQL, shells, globs and formats."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_a_storage_root_is_the_folder_of_this_name(
    name: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not decoded, split or taken for a URI; keys may have such names, too."""
    monkeypatch.chdir(tmp_path)
    storage = Storage.at(name if relative else tmp_path / name)
    storage.write(f"folder/{name}", b"content")
    assert (tmp_path / name / "folder" / name).read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert storage.names("folder") == [name]
    assert storage.location("x") == str(tmp_path / name / "x")
    assert Storage.at(storage.root) == storage, "workers build it from the root"


def test_a_file_uri_is_decoded_once(tmp_path: Path) -> None:
    """Unlike a path, it is encoded."""
    assert Storage.at((tmp_path / FOLDER).as_uri()) == Storage.at(tmp_path / FOLDER)


@pytest.mark.parametrize("name", NAMES)
def test_the_store_of_mlflow_lies_in_the_storage(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its URI leads back to the path, and is stable when it is resolved again."""
    monkeypatch.chdir(tmp_path)
    uri = resolve_tracking_uri(None, name)
    assert sqlite_path(uri) == tmp_path / name / "mlflow.db"
    assert resolve_tracking_uri(uri, "elsewhere") == uri


def test_runs_and_artifacts_are_written_where_the_path_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing appears beside the folder, although MLflow decodes paths, and puts the current folder into SQL."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    monkeypatch.chdir(folder)
    storage = Storage.at("data")
    uri = resolve_tracking_uri(None, "data")
    tracker, experiment = open_experiment(uri, "tiny", storage)
    tracker.run(experiment, "key", "name").finish({"psnr_db": 30.0}, texts={"note.txt": "text"})
    (note,) = (folder / "data" / "mlartifacts").rglob("note.txt")
    assert note.read_text() == "text"
    assert len(Tracker(uri).client.search_runs([experiment])) == 1
    assert list(tmp_path.iterdir()) == [folder]
    assert [path.name for path in folder.iterdir()] == ["data"]


@pytest.mark.parametrize("given", ["", " ", "a\0b", "\udcff"])
def test_a_root_that_no_folder_can_have_is_refused(given: str) -> None:
    """Empty is what an unset variable gives; it would be the current folder."""
    with pytest.raises(ConfigError, match=r"storage root is (empty.*give a path|not a path)"):
        Storage.at(given)
    with pytest.raises(ConfigError, match=r"storage root is (empty.*give a path|not a path)"):
        resolve_tracking_uri(None, given)
    with pytest.raises(ConfigError, match=r"tracking URI is (empty.*give a path|not a path)"):
        resolve_tracking_uri(given, "data")


def test_a_relative_path_in_a_deleted_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence; Python's error would not name the path."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert absolute("/data") == "/data"
    with pytest.raises(ConfigError, match="'data', in a current folder that does not exist"):
        Storage.at("data")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "a b", "ü", "50%", "..", "", "a?b"])
def test_names_of_experiments_are_plain(name: str) -> None:
    """They become names of folders, runs and files."""
    with pytest.raises(ValueError, match="name"):
        ExperimentConfig.model_validate({"name": name, "model": {"name": "zoo"}, "nfe": [2]})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep", "c.yaml", "--storage", ""], "--storage"),
        (["pairs", "c.yaml", "--address="], "--address"),
        (["ui", "--tracking-uri", ""], "--tracking-uri"),
        (["evaluate", "--config", "", "t.json"], "--config"),
        (["reference", "digits", "--to", ""], "--to"),
        (["pretrain", "c.yaml", "--output", ""], "--output"),
        (["export", "t.json", "--to", "python", ""], "an argument"),
        (["sweep", ""], "an argument"),
    ],
)
def test_an_empty_option_is_refused_by_name(arguments: list[str], named: str) -> None:
    """By every command, before it does anything."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert f"{named} is empty, as a variable is that is not set" in result.output
