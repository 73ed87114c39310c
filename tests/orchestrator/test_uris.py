"""URIs are shown without what gives access: the one function, its use in errors and in what objects print."""

from __future__ import annotations

import pickle

import pytest

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.errors import ConfigError, UserError
from orchestrator.hosts.settings import HostSettings, ScorerSettings
from orchestrator.storage import Storage
from orchestrator.uris import shown, values_without_secrets, without_secrets

SECRET = "hunter2"
URIS = [
    ("http://alice:hunter2@head:5000", "http://head:5000"),
    ("https://alice:hunter2@[::1]:5000/mlflow/", "https://[::1]:5000/mlflow/"),
    ("https://head/mlflow?token=hunter2", "https://head/mlflow"),
    ("https://head/mlflow#hunter2", "https://head/mlflow"),
    ("s3://AKIA:hunter2@bucket/root?endpoint_override=minio:9000&scheme=http", "s3://bucket/root"),
    ("s3://bucket/root?secret_key=hunter2", "s3://bucket/root"),
    ("s3://AKIA:hun%2Fter2@bucket/a@b", "s3://bucket/a@b"),
    ("s3://AKIA:a/hunter2@bucket/root", "s3://bucket/root"),
    ("http://alice:p#hunter2@head:5000/x", "http://head:5000/x"),
    ("http://a@b:hunter2@head", "http://head"),
    ("postgresql+psycopg2://bob:hunter2@db:5432/mlflow", "postgresql+psycopg2://db:5432/mlflow"),
]


@pytest.mark.parametrize(("uri", "expected"), URIS)
def test_a_uri_is_shown_without_user_password_keys_and_options(uri: str, expected: str) -> None:
    """By itself, within a sentence, within quotes, and twice in one line."""
    assert shown(uri) == expected
    for sentence in ("{0}", "no answer from {0}; try again", "({0}), '{0}'.", 'x="{0}"', "{0}: refused"):
        assert without_secrets(sentence.format(uri)) == sentence.format(expected)


@pytest.mark.parametrize(
    "text",
    [
        "/data/a?b#c@d",
        "file:///data/a%20b",
        "sqlite:////data/a?b/mlflow.db",
        "http://head:5000",
        "http://[::1]:5000/x",
        "s3://bucket/a@b",
        "give a path, s3://… or gs://…",
        "user@host: 3 // 4",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(text: str) -> None:
    assert shown(text) == text
    assert without_secrets(text) == text


def test_errors_hide_what_the_libraries_quote() -> None:
    """Also in another process: an error keeps its text when it is pickled."""
    error = UserError(f"API request to http://alice:{SECRET}@head:5000/api failed")
    assert str(error) == "API request to http://head:5000/api failed"
    assert str(pickle.loads(pickle.dumps(ConfigError(f"s3://k:{SECRET}@b")))) == "s3://b"


def test_configurations_hide_uris_and_values_that_are_named_as_secrets() -> None:
    """Options of plugins as well; names such as `tokenizer` are no secrets."""
    value = {
        "storage": f"s3://k:{SECRET}@bucket",
        "model": {"options": {"api_key": SECRET, "hf_token": SECRET, "tokenizer": "clip", "token": None}},
        "datasets": [{"path": f"https://x/y?sig={SECRET}"}, 3],
    }
    assert values_without_secrets(value) == {
        "storage": "s3://bucket",
        "model": {"options": {"api_key": "…", "hf_token": "…", "tokenizer": "clip", "token": None}},
        "datasets": [{"path": "https://x/y"}, 3],
    }


def test_objects_print_no_secrets() -> None:
    """They appear in tracebacks, debuggers and the messages of failed assertions."""
    root, uri = f"s3://AKIA:{SECRET}@bucket/root", f"http://alice:{SECRET}@head:5000"
    config = ExperimentConfig.model_construct(
        name="x", storage=root, tracking_uri=uri, model={"options": {"token": SECRET}}
    )
    objects = [
        Storage(root),
        HostSettings(adapter="zoo", options={"token": SECRET}, storage=root),
        ScorerSettings(storage=root),
        config,
    ]
    for value in objects:
        assert SECRET not in repr(value)
        assert SECRET not in str(value)
    assert "s3://bucket/root" in repr(Storage(root))
