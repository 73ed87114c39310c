"""What a storage holds and who needs it; pruning deletes that alone which no experiment needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli.main import main
from orchestrator.errors import BusyStoreError
from orchestrator.lock import exclusive
from orchestrator.pairs import PairSpec
from orchestrator.results.inventory import Entry, inventory, note_older, prune, record_needs
from orchestrator.storage import Storage

PAIRS, OTHER, OLD = "pairs/v2-0123456789abcdef", "pairs/v2-aaaaaaaaaaaaaaaa", "pairs/36a6993a6639b8e4"
POINT, STATE, OLD_POINT = "points/v2-0000000000000000", "points/v2-1111111111111111", "points/6939542411601e71"
OF_PAIRS, OF_OTHER = f"measurements/{PAIRS[6:]}", f"measurements/{OTHER[6:]}"
REAL, OLD_MEASURED = "measurements/7507181395c50293", "measurements/36a6993a6639b8e4"
DISTILLED = "distillations/v1-4444444444444444"
PATHS, STUDENT = f"trajectories/{PAIRS[6:]}-48-uniform2.safetensors", "students/3333333333333333"


@pytest.fixture(params=["directory", "s3"])
def filled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage of either kind, with something of every kind; the experiment 'digits' needs a part of it."""
    monkeypatch.setattr("orchestrator.lock.POLL_SECONDS", 0.001)
    storage = Storage.at(tmp_path / "store") if request.param == "directory" else request.getfixturevalue("s3_storage")
    spec = {"guidance_scale": 3.0, "conditioning": {"name": "labels"}, "model_digest": "abcdef0123456789"}
    for key in (PAIRS, OTHER):
        storage.write_json(f"{key}/manifest.json", {"spec": spec, "shards": [{"rows": 32}, {"rows": 16}]})
        storage.write(f"{key}/shard-00000.parquet", b"x" * 1000)
    for key in (OLD, OLD_POINT, STATE):
        storage.write(f"{key}/state.json", b"x" * 10)
    storage.write(f"{POINT}/result.json", b"{}")
    for key in (OF_PAIRS, OF_OTHER, OLD_MEASURED):
        storage.write(f"{key}/2877b5ed55d1297a/finite/shard-00000.safetensors", b"x")
    storage.write(f"{REAL}/real/db94a8308b8aca4d/shard-00000.safetensors", b"x")
    storage.write(PATHS, b"x")
    storage.write(f"{STUDENT}/nfe4.json", b"x")
    storage.write(f"{DISTILLED}/theta-nfe8.json", b"x")
    storage.write("experiments/digits/report.html", b"report")
    storage.write("measurements/media/v2-x/shard-00000.safetensors", b"x")
    record_needs(storage, "digits", "sweep", [PAIRS, POINT], add=True, announce=print)
    record_needs(storage, "digits", "distil", [DISTILLED], add=True, announce=print)
    return storage


def _entries(storage: Storage) -> dict[str, Entry]:
    return {entry.key: entry for entry in inventory(storage, 2)}


def test_every_folder_is_listed_with_its_kind_its_format_and_who_needs_it(filled: Storage) -> None:
    """Measurements and trajectories belong to whoever needs their pairs."""
    entries = _entries(filled)
    kinds = {key: (entry.kind, entry.older, entry.needed_by) for key, entry in entries.items()}
    assert kinds == {
        PAIRS: ("pairs", False, ("digits",)),
        OTHER: ("pairs", False, ()),
        OLD: ("pairs", True, ()),
        POINT: ("result", False, ("digits",)),
        STATE: ("state", False, ()),
        OLD_POINT: ("state", True, ()),
        OF_PAIRS: ("measurements", False, ("digits",)),
        OF_OTHER: ("measurements", False, ()),
        OLD_MEASURED: ("measurements", True, ()),
        REAL: ("reference", False, ()),
        PATHS: ("trajectories", False, ("digits",)),
        STUDENT: ("student", False, ()),
        DISTILLED: ("distillation", False, ("digits",)),
    }
    assert entries[PAIRS].detail == "48 pairs, guidance 3, labels, model abcdef01"
    assert entries[OLD].detail == "not complete"
    assert entries[PAIRS].size > 1000
    assert entries[PAIRS].modified is not None


def test_the_last_record_of_a_command_replaces_its_earlier_ones(filled: Storage) -> None:
    """A changed configuration leaves behind what it no longer needs, unless the command is still running."""
    record_needs(filled, "digits", "sweep", [OTHER], add=True, announce=print)
    assert [_entries(filled)[key].needed_by for key in (PAIRS, OTHER)] == [("digits",), ("digits",)]
    record_needs(filled, "digits", "sweep", [OTHER], add=False, announce=print)
    record_needs(filled, "more", "evaluate", [OTHER, REAL], add=False, announce=print)
    entries = _entries(filled)
    assert [entries[key].needed_by for key in (PAIRS, OTHER, REAL)] == [(), ("digits", "more"), ("more",)]


def test_pruning_deletes_what_was_chosen_and_nothing_else(filled: Storage) -> None:
    """Reports, records and needed folders stay."""
    before = _entries(filled)
    chosen = [entry for entry in before.values() if entry.is_unused]
    assert prune(filled, chosen, 2, wait=False, announce=print) == chosen
    assert set(_entries(filled)) == {PAIRS, POINT, OF_PAIRS, PATHS, DISTILLED}
    assert filled.exists("experiments/digits/report.html")
    assert filled.exists(f"{PAIRS}/shard-00000.parquet")


def test_what_an_experiment_has_come_to_need_since_is_kept(filled: Storage) -> None:
    """It began between the list and the answer to the question."""
    chosen = [_entries(filled)[OTHER], _entries(filled)[STATE]]
    record_needs(filled, "new", "sweep", [OTHER], add=True, announce=print)
    assert [entry.key for entry in prune(filled, chosen, 2, wait=False, announce=print)] == [STATE]
    assert filled.exists(f"{OTHER}/shard-00000.parquet")


@pytest.mark.parametrize("lock", ["experiments/digits/.lock", f"{OTHER}/.lock", f"{OF_OTHER}/.lock"])
def test_nothing_is_deleted_while_an_experiment_runs(filled: Storage, lock: str) -> None:
    """Neither during a sweep, nor while the set is made or measured."""
    chosen = [entry for entry in _entries(filled).values() if entry.is_unused]
    with (
        exclusive(filled, lock, wait=False, announce=print),
        pytest.raises(BusyStoreError, match="is in use by"),
    ):
        prune(filled, chosen, 2, wait=False, announce=print)
    assert {entry.key for entry in chosen} <= set(_entries(filled))


def test_a_store_of_an_older_release_is_named_with_what_to_do(filled: Storage) -> None:
    """Its folders have another form of name; nothing in them is read."""
    notes: list[str] = []
    note_older(filled, 2, notes.append)
    (sentence,) = notes
    assert sentence.startswith(
        f"1 pair set(s) and 1 result(s) under {filled.shown} are of an older release and are not"
    )
    assert "`bespoke store prune --older-format` deletes them" in sentence
    prune(filled, [_entries(filled)[key] for key in (OLD, OLD_POINT)], 2, wait=False, announce=print)
    note_older(filled, 2, notes.append)
    assert len(notes) == 1
    note_older(filled, 3, notes.append)
    assert "0 pair set(s) and 2 result(s)" in notes[1]


def test_names_of_pairs_and_points_show_their_format(specs: dict[object, PairSpec]) -> None:
    """The next format makes the present one older."""
    spec = next(iter(specs.values()))
    assert spec.digest.startswith("v2-")
    assert dataclasses.replace(spec, format=3).digest.startswith("v3-")


# ---- the command --------------------------------------------------------------------------------------------------


def _run(storage: Storage, *arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, ["store", *arguments, "--storage", storage.root], input=text)


def test_the_list_shows_pair_sets_and_sums_and_what_pruning_would_delete(filled: Storage) -> None:
    """One line per pair set, and one per kind and experiment of everything else."""
    output = _run(filled, "list").output
    assert f"{PAIRS}" in output
    assert "digits; 48 pairs, guidance 3, labels, model abcdef01" in output
    assert "older format; not complete" in output
    assert "no experiment; 1 of this kind" in output
    assert "`bespoke store prune --older-format` would delete 3 of them" in output
    assert "`bespoke store prune --unused` would delete 5 of them" in output


def test_pruning_shows_what_it_deletes_and_asks(filled: Storage) -> None:
    """Any answer but yes keeps everything."""
    before = set(_entries(filled))
    refused = _run(filled, "prune", "--unused", text="n\n")
    assert refused.exit_code != 0
    assert f"{OTHER}  " in refused.output
    assert "5 of 13 entries" in refused.output
    assert set(_entries(filled)) == before
    assert "deleted 5 entries" in _run(filled, "prune", "--unused", text="y\n").output
    assert "deleted 3 entries" in _run(filled, "prune", "--older-format", "--yes").output
    assert "0 of 5 entries" in _run(filled, "prune", "--unused", "--older-format").output


def test_a_forgotten_experiment_needs_nothing(filled: Storage) -> None:
    """Its pairs and results are then unused, unless another experiment needs them."""
    record_needs(filled, "other", "sweep", [POINT], add=True, announce=print)
    _run(filled, "prune", "--unused", "--forget", "digits", "--yes")
    assert set(_entries(filled)) == {POINT, OLD, OLD_POINT, OLD_MEASURED}
    unknown = _run(filled, "prune", "--unused", "--forget", "digitz")
    assert (unknown.exit_code, "no experiment 'digitz' has a record under" in unknown.output) == (2, True)


def test_pruning_needs_to_be_told_what(filled: Storage) -> None:
    """A bare prune deletes nothing."""
    result = _run(filled, "prune")
    assert (result.exit_code, "give --unused, --older-format, or both" in result.output) == (2, True)
