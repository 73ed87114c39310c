"""Makes or repairs pair stores with a pool of hosts. Resumable; one writer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Protocol

from orchestrator.cost import Ledger, load_costs, save_costs
from orchestrator.errors import CodeError, ConfigError, DamagedManifestError, PoolError, UserError
from orchestrator.lock import exclusive
from orchestrator.pairs.spec import PairSpec
from orchestrator.pairs.store import PairStore, ShardRecord
from orchestrator.pool.requests import Pool, Request
from orchestrator.progress import Note, bar
from orchestrator.storage import Storage


class PairMaker(Protocol):
    """What making pairs requires of a host."""

    def make_shard(self, *, spec: PairSpec, first: int, stop: int) -> ShardRecord:
        """Solve for the pairs ``first`` to ``stop - 1`` of a shard, write them, and return their record.

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
        The manifest's records of the needed pairs of each store, by name of the pairs.

    Raises:
        PoolError: Some shards could not be made; the others are kept.
        CodeError, ConfigError: No shard can be made, because the network or the conditioning cannot be used.
        BusyStoreError: Another process is making the same store and ``wait`` is false.
    """
    records: dict[str, list[ShardRecord]] = {}
    failures: list[str] = []
    with bar(sum(spec.made for spec in specs), "pair", "ground-truth pairs") as progress:
        for spec in specs:
            store = PairStore(storage, spec)
            with exclusive(storage, f"{store.folder}/.lock", wait=wait, announce=announce):
                storage.delete_leftovers(store.folder)
                try:
                    records[spec.name] = _ensure(store, pool, announce, progress.update)
                except _ShardsSetAsideError as error:  # the other stores can still be made
                    failures.append(str(error))
    if failures:
        raise PoolError(f"{'; '.join(failures)}; the other shards are kept; run the same command again")
    return records


def complete(storage: Storage, specs: Iterable[PairSpec]) -> set[str]:
    """Names of the pairs that are complete, by their manifests; whether files are damaged is not checked."""
    names = set()
    for spec in specs:
        with suppress(DamagedManifestError):
            if PairStore(storage, spec).is_complete():
                names.add(spec.name)
    return names


class _ShardsSetAsideError(PoolError):
    """Some shards of one store could not be made by any host."""


def _ensure(store: PairStore, pool: Pool, announce: Note, update: Callable[[int], object]) -> list[ShardRecord]:
    spec = store.spec
    records = {record.indices: record for record in _kept(store, announce)}
    listed = set(records)
    if spec.gaps(records):
        records |= _strays(store, records)
    update(min(sum(record.rows for record in records.values()), spec.made))
    missing = spec.gaps(records)
    failures: dict[range, Exception] = {}
    requests = [
        Request.of(PairMaker.make_shard, spec=spec, first=indices.start, stop=indices.stop) for indices in missing
    ]
    ledger = Ledger(0)  # a pair set does not know the forwards of an evaluation
    try:
        for outcome in pool.map(requests):
            if outcome.error is not None:
                if isinstance(outcome.error, CodeError | ConfigError):  # every shard would fail for the same reason
                    raise outcome.error
                failures[missing[outcome.index]] = outcome.error
                continue
            records[outcome.value.indices] = outcome.value
            ledger.lap(cost_item(outcome.value.indices), outcome.value.nfe_sum)
            update(outcome.value.rows)
    finally:
        _record(store, ledger, announce)
    if failures:
        shards = sorted({indices.start // spec.shard_size for indices in failures})
        raise _ShardsSetAsideError(
            f"{len(failures)} of {spec.shards} shards of {store.storage.location(store.folder)} could not be "
            f"made (shards {', '.join(map(str, shards))}): {next(iter(failures.values()))}"
        )
    if set(records) != listed or not (store.storage.exists(store.manifest_key) and store.is_current()):
        store.commit(list(records.values()))
        for indices in store.present():
            if indices not in records:  # left by a run that was to make another number of pairs
                store.storage.delete(store.shard_key(indices))
    return store.records()


def cost_item(indices: range) -> str:
    """Name of a file's cost in the costs of its pair set: the indices of its first and last pair."""
    return f"{indices[0]}-{indices[-1]}"


def _record(store: PairStore, ledger: Ledger, announce: Note) -> None:
    """Add the costs of files that were made to those recorded earlier: a file may be made again."""
    if not ledger.costs:
        return
    try:
        earlier = load_costs(store.storage, store.folder) or {}
        for item, cost in earlier.items():
            ledger.add_cost(item, cost)
        save_costs(store.storage, store.folder, ledger.costs)
    except UserError as error:  # pairs are worth more than the record of their cost
        announce(f"the cost of these pairs is not recorded: {error}")


def _kept(store: PairStore, announce: Note) -> list[ShardRecord]:
    """The manifest's records without those of damaged files, which are deleted, and the manifest with them."""
    if not store.storage.exists(store.manifest_key):
        return []
    try:
        records = store.all_records()
    except DamagedManifestError:  # every file is inspected
        announce(f"{store.storage.location(store.manifest_key)} is damaged: rebuilding it from the shards")
        store.storage.delete(store.manifest_key)
        return []
    damaged = [record for record in records if record.first < store.spec.count and not store.is_whole(record)]
    if damaged:
        announce(f"{store.storage.location(store.folder)}: remaking {len(damaged)} damaged or missing shard(s)")
        store.storage.delete(store.manifest_key)
        for record in damaged:
            store.storage.delete(store.shard_key(record.indices))
    return [record for record in records if record not in damaged]


def _strays(store: PairStore, records: Collection[range]) -> dict[range, ShardRecord]:
    """Records of intact files that the manifest does not name, such as those of a run that was killed."""
    size = store.spec.batch_size
    taken = {first for indices in records for first in indices[::size]}
    strays: dict[range, ShardRecord] = {}
    for indices in sorted(store.present(), key=lambda indices: (indices.start, -indices.stop)):
        batches = set(indices[::size])
        if taken.isdisjoint(batches) and (record := store.inspect_shard(indices)) is not None:
            strays[indices] = record
            taken |= batches
    return strays
