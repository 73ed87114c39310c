"""Errors that a user can cause and mend. The command line prints them without a traceback."""


class UserError(Exception):
    """Something the user gave cannot work; the message names the value and the remedy."""


class ConfigError(UserError):
    """A configuration that is refused before any work starts."""


class StoreError(UserError):
    """A pair store that cannot be used: damaged, mixed, busy, or on a full disk."""


class DamagedShardError(StoreError):
    """A shard whose bytes are not those that were written."""


class DamagedManifestError(StoreError):
    """A manifest that is not the one that was written; its shards may be whole."""


class UnreachableStorageError(StoreError):
    """Remote storage that did not answer, or refused, also when it was asked again."""


class BusyStoreError(StoreError):
    """Somebody else works on the store, and waiting was not asked for."""


class PoolError(UserError):
    """Requests that no host could answer."""
