"""Errors that a user can cause and fix. The command line prints them without a traceback."""

from __future__ import annotations

from orchestrator.uris import without_secrets


class UserError(Exception):
    """An input from the user cannot work; the message names the value and the remedy. It shows no secrets of URIs."""

    def __init__(self, message: str = ""):
        super().__init__(without_secrets(message))


class ConfigError(UserError):
    """The configuration is invalid; raised before any work starts."""


class StoreError(UserError):
    """Stored data cannot be used: it is damaged, mixed, busy, or on a full disk."""


class DamagedShardError(StoreError):
    """The bytes of a shard are not those that were written."""


class DamagedManifestError(StoreError):
    """A manifest is not the one that was written; its shards may be intact."""


class UnreachableStorageError(StoreError):
    """Remote storage did not answer, or refused the operation, even after retries."""


class BusyStoreError(StoreError):
    """Another process is using the store, and the caller chose not to wait."""


class PoolError(UserError):
    """No host could answer a request."""
