"""Makes or repairs pair stores with a pool of hosts. Resumable; one writer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from orchestrator.errors import CodeError, ConfigError, DamagedManifestError, PoolError
from orchestrator.lock import exclusive
from orchestrator.pairs.spec import PairSpec
from orchestrator.pairs.store import PairStore, ShardRecord
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import Note, bar
from orchestrator.storage import Storage


class PairMaker(Protocol):
    """What making pairs requires of a host."""

    def make_shard(self, *, spec: PairSpec, shard: int) -> ShardRecord:
        """Solve for the pairs of one shard, write them, and return the shard's record for the manifest.

        Raises:
            StoreError: The spec is for a different model or device class, or the storage is full.
        """


def ensure_pairs(
    storage: Storage, specs: Sequence[PairSpec], pool: Pool, *, wait: bool, announce: Note
) -> dict[str, list[ShardRecord]]:
    """Make all missing or damaged shards of these stores and commit their manifests.

    Args:
        storage: Storage root of the stores.
        specs: Specs of the pair sets.
        pool: Hosts of the model.
        wait: Whether to wait if another process is making the same store.
        announce: Receives progress notes about damaged shards, damaged manifests, and waiting for another process.

    Returns:
        The manifest's records of each store, by digest.

    Raises:
        PoolError: Some shards could not be made; the others are kept.
        CodeError, ConfigError: No shard can be made, because the network or the conditioning cannot be used.
        BusyStoreError: Another process is making the same store and ``wait`` is false.
    """
    records: dict[str, list[ShardRecord]] = {}
    failures: list[str] = []
    with bar(sum(spec.count for spec in specs), "pair", "ground-truth pairs") as progress:
        for spec in specs:
            store = PairStore(storage, spec)
            with exclusive(storage, f"{store.folder}/.lock", wait=wait, announce=announce):
                storage.delete_leftovers(store.folder)
                try:
                    records[spec.digest] = _ensure(store, pool, announce, progress.update)
                except _ShardsSetAsideError as error:  # the other stores can still be made
                    failures.append(str(error))
    if failures:
        raise PoolError(f"{'; '.join(failures)}; the other shards are kept; run the same command again")
    return records


class _ShardsSetAsideError(PoolError):
    """Some shards of one store could not be made by any host."""


def _ensure(store: PairStore, pool: Pool, announce: Note, update: Callable[[int], object]) -> list[ShardRecord]:
    if store.is_complete():
        try:
            damaged = store.damaged()
            if not damaged:
                update(store.spec.count)
                return store.records()
            announce(f"{store.storage.location(store.folder)}: remaking {len(damaged)} damaged or missing shard(s)")
        except DamagedManifestError:
            damaged = []  # every shard is inspected below
            announce(f"{store.storage.location(store.manifest_key)} is damaged: rebuilding it from the shards")
        store.storage.delete(store.manifest_key)
        for shard in damaged:
            store.storage.delete(store.shard_key(shard))
    records = {shard: record for shard in range(store.spec.shards) if (record := store.inspect_shard(shard))}
    update(sum(record.rows for record in records.values()))
    missing = [shard for shard in range(store.spec.shards) if shard not in records]
    failures: dict[int, Exception] = {}
    requests = [Request.of(PairMaker.make_shard, spec=store.spec, shard=shard) for shard in missing]
    for outcome in pool.map(requests):
        shard = missing[outcome.index]
        if outcome.error is not None:
            if isinstance(outcome.error, CodeError | ConfigError):  # every shard would fail for the same reason
                raise outcome.error
            failures[shard] = outcome.error
            continue
        records[shard] = outcome.value
        update(outcome.value.rows)
    if failures:
        raise _ShardsSetAsideError(
            f"{len(failures)} of {store.spec.shards} shards of {store.storage.location(store.folder)} could not be "
            f"made (shards {', '.join(map(str, sorted(failures)))}): {next(iter(failures.values()))}"
        )
    store.commit(list(records.values()))
    return store.records()
