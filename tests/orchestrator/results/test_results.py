"""Results of points, and table rows: points are chosen on validation pairs and reported on test pairs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.results.store import Result, ResultStore, Row, rows
from orchestrator.storage import Storage


def _summary(psnr: float, stderr: float = 0.1) -> dict[str, dict[str, float]]:
    return {"psnr_db": {"mean": psnr, "stderr": stderr, "count": 40, "not_finite": 0}}


def _result(**changes: Any) -> Result:
    """A result of a learned point. ``changes`` are fields of the result or keys of its point."""
    point = {"family": "bns", "nfe": 8, "guidance_scale": 1.0, "sigma0": 1.0, "seed": 0}
    for name in list(changes):
        if name in point:
            point[name] = changes.pop(name)
    values: dict[str, Any] = {
        "key": "k",
        "point": point,
        "name": "BNS nfe8",
        "kind": "learned",
        "label": "BNS",
        "grid": "from Euler, uniform",
        "status": "finished",
        "validation_psnr_db": 40.0,
        "metrics": _summary(39.0),
        "start_metrics": _summary(30.0),
        "start_validation_psnr_db": 31.0,
        "forwards": 100,
        "backwards": 50,
        "history": [[0, 31.0], [10, 40.0]],
    }
    return Result(**(values | changes))


def _fixed(**changes: Any) -> Result:
    return _result(
        **{
            "kind": "best grid",
            "label": "Euler",
            "family": "euler",
            "start_metrics": None,
            "start_validation_psnr_db": None,
            "chosen_grid": {"kind": "uniform", "p": 1.0, "q": 1.0},
            **changes,
        }
    )


def _by_kind(results: list[Result]) -> dict[str, Row]:
    table = rows(results)
    assert len({row.kind for row in table}) == len(table)
    return {row.kind: row for row in table}


def test_points_are_chosen_on_validation_pairs_but_reported_on_test_pairs() -> None:
    """If the reported score decided the choice, larger searches would look better than they are."""
    lucky = _result(key="lucky", validation_psnr_db=40.0, metrics=_summary(45.0))
    chosen = _result(
        key="chosen", validation_psnr_db=41.0, metrics=_summary(39.5), grid="from Heun, uniform", sigma0=2.0
    )
    row = _by_kind([lucky, chosen])["learned"]
    assert (row.metrics["psnr_db"], row.keys, row.detail, row.sigma0) == (39.5, ("chosen",), "from Heun, uniform", 2.0)


def test_a_point_whose_validation_is_not_finite_is_never_chosen() -> None:
    """Comparisons with NaN are always false, which must not let it win."""
    broken = _result(key="broken", validation_psnr_db=math.nan)
    for order in ([broken, _result(key="finite")], [_result(key="finite"), broken]):
        assert _by_kind(order)["learned"].keys == ("finite",)


def test_points_are_compared_only_within_their_cell() -> None:
    """Each NFE, guidance scale, kind and family has its own row."""
    results = [
        _fixed(),
        _fixed(nfe=4),
        _fixed(guidance_scale=3.0),
        _fixed(kind="common grid"),
        _fixed(label="Heun", family="heun"),
    ]
    assert len(rows(results)) == 5


def test_the_start_of_a_distillation_has_its_own_row() -> None:
    """The table shows the gain of the distillation; the start itself takes no forward or backward passes."""
    row_by_kind = _by_kind([_result()])
    assert set(row_by_kind) == {"learned", "start"}
    assert row_by_kind["start"].metrics["psnr_db"] == 30.0
    assert (row_by_kind["start"].forwards, row_by_kind["start"].backwards) == (0, 0)
    assert (row_by_kind["learned"].forwards, row_by_kind["learned"].backwards) == (100, 50)
    assert row_by_kind["start"].name == "start of BNS"


def test_seeds_are_averaged_with_the_standard_error_over_seeds() -> None:
    """The best point on validation pairs is chosen per seed; their test scores give mean and standard error."""
    results = [
        _result(key=f"{seed}-{rate}", seed=seed, validation_psnr_db=40 + rate, metrics=_summary(36.0 + 2 * seed + rate))
        for seed in (0, 1, 2)
        for rate in (0, 1)
    ]
    row = _by_kind(results)["learned"]
    assert row.seeds == 3
    assert row.keys == ("0-1", "1-1", "2-1")
    assert row.metrics["psnr_db"] == pytest.approx(39.0)  # of 37, 39 and 41
    assert row.stderr["psnr_db"] == pytest.approx(2 / math.sqrt(3))


def test_the_seed_that_is_best_on_validation_pairs_comes_first() -> None:
    """Neither the order of the results nor its score on test pairs matters."""
    seeds = [
        _result(
            key=f"seed{seed}",
            seed=seed,
            sigma0=1.0 + seed,
            validation_psnr_db=40.0 + better,
            metrics=_summary(39.0 - better),
        )
        for seed, better in enumerate((1, 3, 2))
    ]
    for order in (seeds, seeds[::-1]):
        row = _by_kind(order)["learned"]
        assert row.keys == ("seed1", "seed2", "seed0")
        assert row.sigma0 == 2.0


def test_scores_that_are_equal_for_all_seeds_have_the_standard_error_over_samples() -> None:
    """A start is the same for every seed; zero spread over seeds would suggest an exact score."""
    results = [_result(key=str(seed), seed=seed, start_metrics=_summary(30.0, stderr=0.25)) for seed in range(3)]
    assert _by_kind(results)["start"].stderr["psnr_db"] == 0.25


def test_a_single_seed_has_the_standard_error_over_samples() -> None:
    """There is no spread over seeds to report."""
    assert _by_kind([_fixed(metrics=_summary(30.0, stderr=0.25))])["best grid"].stderr["psnr_db"] == 0.25


def test_rows_are_ordered_by_guidance_nfe_and_psnr() -> None:
    """The order does not depend on that of the results."""
    results = [_fixed(nfe=nfe, guidance_scale=scale) for scale in (1.0, 3.0) for nfe in (4, 8)]
    results.append(_fixed(label="Heun", nfe=4, metrics=_summary(20.0)))
    expected = [(1.0, 4, "Heun"), (1.0, 4, "Euler"), (1.0, 8, "Euler"), (3.0, 4, "Euler"), (3.0, 8, "Euler")]
    for order in (results, results[::-1]):
        assert [(row.guidance_scale, row.nfe, row.label) for row in rows(order)] == expected


def test_names_distinguish_the_kinds_of_a_family() -> None:
    """A table may show a family on its best grid beside the same family on the common one."""
    names = {row.name for row in rows([_fixed(), _fixed(kind="common grid"), _result()])}
    assert names == {"Euler, best grid", "Euler", "BNS", "start of BNS"}


def test_without_results_there_are_no_rows() -> None:
    """If no point of a sweep finished, its table is empty; this is not an error."""
    assert rows([]) == []


def test_a_result_is_loaded_as_it_was_saved(storage: Storage) -> None:
    """A second run reads all results and computes none."""
    store = ResultStore(storage, "key")
    store.save(_result(), "theta", [{"iteration": 0, "psnr_db": 31.0, "parameters": [0.5]}])
    assert store.load() == _result()
    assert store.read_theta() == "theta"
    assert store.theta_location == f"{storage.root}/points/key/theta.json"


def test_the_result_is_written_last_and_the_state_is_deleted_after_it(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the run is killed at any moment, the point is complete or has a state from which to resume."""
    store = ResultStore(storage, "key")
    store.save_state({"iteration": 10})
    events: list[tuple[str, bool, bool]] = []
    for name in ("write", "delete"):
        real = getattr(Storage, name)

        def watched(self: Storage, key: str, *rest: Any, real: Any = real) -> None:
            events.append((key.rpartition("/")[2], store.is_complete(), store.load_state() is not None))
            real(self, key, *rest)

        monkeypatch.setattr(Storage, name, watched)
    store.save(_result(), "theta", [{"iteration": 0}])
    assert events == [
        ("theta.json", False, True),
        ("iterates.json", False, True),
        ("result.json", False, True),
        ("state.json", True, True),
    ]
    assert store.is_complete()
    assert store.load_state() is None


def test_a_point_that_the_search_stopped_stays_stopped(storage: Storage) -> None:
    """Other processes see it too, for instance after a restart."""
    assert not ResultStore(storage, "key").is_stopped()
    ResultStore(storage, "key").mark_stopped()
    assert ResultStore(storage, "key").is_stopped()
    assert not ResultStore(storage, "other").is_stopped()


def test_every_field_of_a_result_survives_json(storage: Storage) -> None:
    """The comparison covers fields that are added later."""
    store = ResultStore(storage, "key")
    store.save(_fixed(), "theta", [])
    assert dataclasses.asdict(store.load()) == dataclasses.asdict(_fixed())


def test_a_point_without_its_theta_is_not_complete(tmp_path: Path) -> None:
    """It is computed again; otherwise, reading its theta would fail."""
    store = ResultStore(Storage.at(tmp_path), "key")
    store.storage.write_json(f"{store.folder}/result.json", {})
    assert not store.is_complete()
    store.storage.write(store.theta_key, b"{}")
    assert store.is_complete()
