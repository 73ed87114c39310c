"""The search space: which pair sets and points an experiment has, and when two points are the same."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import plugins
from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.pair_plan import PairKey, pair_specs
from orchestrator.config.reading import load_config, parse_config
from orchestrator.config.solvers import GITSConfig
from orchestrator.errors import ConfigError
from orchestrator.hosts.runs import LearnedRun
from orchestrator.models.facts import ModelFacts
from orchestrator.pairs import PairSpec
from solvers.distil.methods.adam import Adam
from solvers.distil.methods.base import Method
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.distil.sizes import sizes
from solvers.families import GridSolver
from solvers.grids import Grid
from solvers.schedulers import CondOT
from sweeps.point import AnyPoint, FixedPoint, LearnedPoint, SolverChoice, point_from_dict
from sweeps.space import check_pairs, fixed_points, learned_points

START = SolverChoice(family="heun", options={}, label="Heun", grid=Grid("warped", 1.4, 1.2))

RUN = LearnedRun(family="bns", options={}, sigma0=1.0, train="p", method=Adam())

COMMON: dict[str, Any] = {
    "nfe": 8,
    "guidance_scale": 1.0,
    "seed": 0,
    "validation": "v",
    "test": "t",
    "metrics": ("psnr", "rmse"),
}

LEARNED = LearnedPoint(run=RUN, start=START, objective_content="o", validate_every=100, label="BNS", **COMMON)

FIXED = FixedPoint(
    family="euler",
    options={},
    sigma0=1.0,
    label="Euler",
    grids=(Grid(), Grid("warped", 1.4, 1.0)),
    search_pairs=256,
    **COMMON,
)


def _with_run(point: LearnedPoint, **changes: Any) -> LearnedPoint:
    return dataclasses.replace(point, run=dataclasses.replace(point.run, **changes))


OTHER: dict[str, Any] = {
    "family": "other",
    "options": {"x": 1},
    "label": "other",
    "nfe": 9,
    "guidance_scale": 3.0,
    "sigma0": 2.0,
    "seed": 1,
    "validation": "w",
    "test": "u",
    "metrics": ("psnr",),
    "grids": (Grid(),),
    "gits": ({"gamma": 1.0},),
    "search_pairs": 128,
    "race": True,
    "start": dataclasses.replace(START, grid=Grid()),
    "train": "q",
    "method": Adam(learning_rate=1e-3),
    "objective": "rmse",
    "objective_options": {"x": 1},
    "objective_content": "p",
    "precision": "bfloat16",
    "compile": True,
    "data_parallel": True,
    "validate_every": 50,
    "start_format": 2,
    "early_stopping": {"grace_validations": 3},
    "format": 99,
}


FIELDS = [
    *((FIXED, field.name) for field in dataclasses.fields(FixedPoint)),
    *((LEARNED, field.name) for field in dataclasses.fields(LearnedPoint) if field.name != "run"),
]


@pytest.mark.parametrize(("point", "field"), FIELDS, ids=lambda value: value if isinstance(value, str) else value.kind)
def test_points_that_differ_in_any_field_but_their_label_have_different_keys(point: AnyPoint, field: str) -> None:
    """Results are stored by key, so the key must cover everything that a result depends on, and no display name."""
    other = dataclasses.replace(point, **{field: OTHER[field]})
    assert other != point
    assert (other.key == point.key) == (field == "label")


OTHER_START = {"family": "midpoint", "options": {"x": 1}, "label": "other", "grid": Grid()}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SolverChoice)])
def test_every_field_of_the_start_but_its_label_is_part_of_the_key(field: str) -> None:
    """Another start leads to another theta; another name of it does not."""
    start = dataclasses.replace(START, **{field: OTHER_START[field]})
    other = dataclasses.replace(LEARNED, start=start)
    assert (other.key == LEARNED.key) == (field == "label")


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Grid)])
def test_every_field_of_a_grid_is_part_of_the_key(field: str) -> None:
    """Both of a candidate grid and of the start's grid. The value need not be valid, only another one."""
    other = copy.copy(START.grid)
    object.__setattr__(other, field, "changed")
    assert dataclasses.replace(FIXED, grids=(other,)).key != dataclasses.replace(FIXED, grids=(START.grid,)).key
    assert dataclasses.replace(LEARNED, start=dataclasses.replace(START, grid=other)).key != LEARNED.key


@pytest.mark.parametrize("field", sorted(GITSConfig.model_fields.keys() - {"kind"}))
def test_every_setting_of_gits_is_part_of_the_key(field: str, experiment: dict[str, Any], facts: ModelFacts) -> None:
    """The grid is computed from the settings, so another setting may give another grid."""
    other: dict[str, Any] = {"gamma": 0.5, "loss": "deviation", "trajectories": 8, "knots": 21}
    keys = set()
    for settings in ({}, {field: other[field]}):
        also = [{"kind": "gits", **settings}]
        config = parse_config({**experiment, "grid_search": {"p": [1.0], "q": [1.0], "also": also}}, "x")
        keys |= {point.key for point in fixed_points(config, pair_specs(config, facts)) if point.gits}
    assert len(keys) == 4, "two families, each with two settings"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LearnedRun)])
def test_learned_points_whose_runs_differ_in_any_field_have_different_keys(field: str) -> None:
    """The run is part of the point's content. Options of the objective count by its content, wherever files lie."""
    other = _with_run(LEARNED, **{field: OTHER[field]})
    assert (other.key == LEARNED.key) == (field == "objective_options")


SETTINGS = [(method, field.name) for _, method in plugins.every("methods") for field in dataclasses.fields(method)]


@pytest.mark.parametrize(("method", "field"), SETTINGS, ids=lambda value: str(getattr(value, "name", value)))
def test_every_setting_of_every_method_is_part_of_the_key(method: type[Method], field: str) -> None:
    """A different rate, length, batch size, decay or seed is a different run."""
    other = method()
    object.__setattr__(other, field, "changed")
    assert _with_run(LEARNED, method=other).key != _with_run(LEARNED, method=method()).key


BY_LM = _with_run(LEARNED, method=LevenbergMarquardt())


@pytest.mark.parametrize("point", [FIXED, LEARNED, BY_LM], ids=["fixed", "adam", "levenberg_marquardt"])
def test_a_point_survives_a_json_round_trip(point: AnyPoint) -> None:
    """Points are passed to trials and stored in results as plain dictionaries."""
    again = point_from_dict(json.loads(json.dumps(point.to_dict())))
    assert again == point
    assert again.key == point.key


def test_equal_points_of_two_experiments_have_equal_keys(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """The name of the experiment is not part of the key, so experiments share results."""
    keys = []
    for name in ("one", "two"):
        config = parse_config({**experiment, "name": name}, name)
        keys.append([point.key for point in fixed_points(config, pair_specs(config, facts))])
    assert keys[0] == keys[1]


def test_a_cell_is_a_family_nfe_guidance_scale_and_seed() -> None:
    """Points that differ in a searched setting share a cell; points whose PSNR cannot be compared do not."""
    same = [
        _with_run(LEARNED, sigma0=2.0),
        _with_run(LEARNED, method=Adam(learning_rate=1.0)),
        dataclasses.replace(LEARNED, start=dataclasses.replace(START, family="euler")),
    ]
    assert {point.cell for point in same} == {LEARNED.cell}
    different = [
        dataclasses.replace(LEARNED, nfe=4),
        dataclasses.replace(LEARNED, guidance_scale=3.0),
        dataclasses.replace(LEARNED, seed=1),
        dataclasses.replace(LEARNED, label="BST"),
        FIXED,
        dataclasses.replace(FIXED, grids=(Grid(),)),
    ]
    assert len({point.cell for point in [LEARNED, *different]}) == 7


def test_the_kind_of_a_point_follows_from_its_grids_and_start() -> None:
    """One grid: common grid. Several: best grid. A start: learned."""
    assert LEARNED.kind == "learned"
    assert FIXED.kind == "best grid"
    assert dataclasses.replace(FIXED, grids=(Grid(),)).kind == "common grid"


def test_names_of_points_are_unique(config: ExperimentConfig, specs: dict[PairKey, PairSpec]) -> None:
    """Users find runs in MLflow by these names."""
    best = {(4, 1.0, 1.0): [START]}
    points = [*fixed_points(config, specs), *learned_points(config, specs, best, CondOT())]
    assert len({point.name for point in points}) == len(points)
    guided = dataclasses.replace(_with_run(LEARNED, sigma0=2.0), guidance_scale=3.0)
    assert guided.name == "BNS nfe8 g3 sigma0=2 lr0.0005 from Heun seed0"


def test_no_two_pair_sets_share_noise(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """Training, validation and test pairs of every seed and every base seed have seeds of their own."""
    used: dict[int, tuple[int, str, int]] = {}
    seeds = [*range(20), *range(90, 110), 500, 998, 999]
    bases = (0, 1, 2, 10, 100, 2**31 - 1)
    for base in bases:
        content = {**experiment, "seeds": seeds, "pairs": {**experiment["pairs"], "seed": base}}
        for key, spec in pair_specs(parse_config(content, "seeds"), facts).items():
            assert used.setdefault(spec.seed, (base, key.split, key.seed)) == (base, key.split, key.seed)
            assert 0 <= spec.seed < 2**64
    assert len(used) == len(bases) * (2 + len(seeds))


def test_guidance_scales_have_their_own_pairs_from_the_same_noise(
    experiment: dict[str, Any], facts: ModelFacts
) -> None:
    """Ground truth depends on guidance; with the same noise, samples remain comparable."""
    config = parse_config({**experiment, "guidance_scale": [1, 3], "seeds": [0, 1]}, "guided")
    specs = pair_specs(config, facts)
    assert len({spec.digest for spec in specs.values()}) == len(specs) == 2 * (2 + 2)
    assert specs[PairKey("test", 1.0, 0)].seed == specs[PairKey("test", 3.0, 0)].seed


def test_without_learned_families_there_are_no_training_pairs(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """Fixed solvers do not use them."""
    specs = pair_specs(parse_config({**experiment, "learned": []}, "fixed only"), facts)
    assert {key.split for key in specs} == {"validation", "test"}


@pytest.mark.parametrize("name", ["digits", "digits_full"])
def test_the_shipped_experiments_have_each_point_of_their_axes_once(
    repository: Path, facts: ModelFacts, name: str
) -> None:
    """Families x NFE x guidance scale x sigma0 on two grids, plus the learned axes, without duplicates."""
    config = load_config(repository / f"sweeps/configs/{name}.yaml")
    specs = pair_specs(config, facts)
    fixed = fixed_points(config, specs)
    runs = sum(len([n for n in config.nfe if solver.nfe is None or n in solver.nfe]) for solver in config.fixed)
    assert len(fixed) == 2 * runs * len(config.guidance_scale) * len(config.fixed_sigma0)
    cells = list(itertools.product(config.nfe, config.guidance_scale, config.fixed_sigma0))
    learned = learned_points(config, specs, {cell: [START] for cell in cells}, CondOT())
    per_cell = sum(
        len(f.sigma0) * len(f.start) * len(f.methods(0, 1, "float32", nfe=4, dimensions=2)) for f in config.learned
    )
    assert len(learned) == per_cell * len(config.nfe) * len(config.guidance_scale) * len(config.seeds)
    assert len({point.key for point in [*fixed, *learned]}) == len(fixed) + len(learned)
    searched = [point for point in fixed if point.kind == "best grid"]
    assert len(searched) == len(fixed) // 2
    assert all(point.grids[0] == Grid() and len(point.grids) == 59 for point in searched)


def test_a_distillation_starts_from_the_best_fixed_solver_of_its_nfe_and_guidance_scale(
    experiment: dict[str, Any], facts: ModelFacts
) -> None:
    """At its own sigma0 if fixed solvers were swept there, otherwise at the sigma0 that is nearest in ratio."""
    experiment["learned"][0]["sigma0"] = [1.0, 1.6, 5.0]
    config = parse_config({**experiment, "nfe": [4, 8], "guidance_scale": [1, 3]}, "starts")

    def choice(nfe: int, scale: float, sigma0: float) -> list[SolverChoice]:
        return [dataclasses.replace(START, label=f"{nfe} {scale:g} {sigma0:g}")]

    best = {cell: choice(*cell) for cell in itertools.product((4, 8), (1.0, 3.0), (1.0, 2.0))}
    points = learned_points(config, pair_specs(config, facts), best, CondOT())
    starts = {(point.nfe, point.guidance_scale, point.sigma0): point.start.label for point in points}
    nearest = {1.0: 1, 1.6: 2, 5.0: 2}
    assert starts == {
        (nfe, scale, sigma0): f"{nfe} {scale:g} {near}"
        for nfe, scale, (sigma0, near) in itertools.product((4, 8), (1.0, 3.0), nearest.items())
    }


def test_a_named_start_is_the_family_on_the_uniform_grid(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """As in the papers, whichever fixed solver is best."""
    experiment["learned"][0]["start"] = ["midpoint"]
    config = parse_config({**experiment, "fixed": []}, "named")
    (point,) = learned_points(config, pair_specs(config, facts), {}, CondOT())
    assert point.start == SolverChoice(family="midpoint", options={}, label="Midpoint", grid=Grid())


def test_seeds_have_their_own_training_pairs_and_share_validation_and_test_pairs(
    experiment: dict[str, Any], facts: ModelFacts
) -> None:
    """The standard error over seeds covers pairs and batch order; all seeds are scored on the same pairs."""
    config = parse_config({**experiment, "seeds": [0, 1, 2]}, "seeds")
    points = learned_points(config, pair_specs(config, facts), {(4, 1.0, 1.0): [START]}, CondOT())
    assert len({point.run.train for point in points}) == 3
    assert [point.run.method.seed for point in points] == [0, 1, 2]
    assert len({(point.validation, point.test) for point in points}) == 1


def test_a_search_uses_at_most_all_validation_pairs(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """With fewer validation pairs than ``grid_search.pairs``, it uses all of them."""
    config = parse_config({**experiment, "grid_search": {"p": [1.4], "q": [1.0], "pairs": 256}}, "few")
    points = fixed_points(config, pair_specs(config, facts))
    assert {point.search_pairs for point in points} == {0, 32}


def test_the_best_start_is_the_best_solver_that_the_family_can_represent(
    experiment: dict[str, Any], facts: ModelFacts
) -> None:
    """BST starts only from its own base solver and skips a better one of another kind; BNS takes the better one."""
    midpoint = SolverChoice(family="midpoint", options={}, label="Midpoint", grid=Grid("warped", 1.4, 1.0))
    experiment["learned"] = [{"family": "bespoke_rk2"}, {"family": "bns"}]
    config = parse_config(experiment, "starts")
    points = learned_points(config, pair_specs(config, facts), {(4, 1.0, 1.0): [START, midpoint]}, CondOT())
    assert [(point.family, point.start) for point in points] == [("bespoke_rk2", midpoint), ("bns", START)]


def test_each_method_has_its_own_default_length(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """Forty iterations of Levenberg-Marquardt achieve what thousands of Adam do."""
    experiment["learned"] = [{"family": "bns"}, {"family": "bns", "method": "levenberg_marquardt", "iterations": 7}]
    config = parse_config(experiment, "methods")
    adam, lm = learned_points(config, pair_specs(config, facts), {(4, 1.0, 1.0): [START]}, CondOT())
    assert (adam.label, adam.run.method.iterations, adam.validate_every) == ("BNS", 1500, 100)
    assert (lm.run.method.iterations, lm.label, lm.validate_every) == (7, "BNS (LM)", 4)


def test_batches_of_levenberg_marquardt_grow_by_default(experiment: dict[str, Any], facts: ModelFacts) -> None:
    """From sizes that follow from theta and the sample. With a batch size, all are that large, as ever."""
    lm = {"family": "bns", "method": "levenberg_marquardt"}
    few = {"name": "levenberg_marquardt", "options": {"patience": 9}}
    experiment["learned"] = [lm, lm | {"batch_size": 64}, lm | {"method": few}]
    config = parse_config(experiment, "batches")
    points = learned_points(config, pair_specs(config, facts), {(4, 1.0, 1.0): [START]}, CondOT())
    growing, fixed, patient = (point.run.method for point in points)
    chosen = sizes(17, 64, 4)
    assert fixed == LevenbergMarquardt(iterations=40, batch_size=64, training_pairs=48)
    assert isinstance(growing, LevenbergMarquardt)
    assert (growing.first_batch_size, growing.batch_growth) == (chosen.first_batch, chosen.batch_growth)
    assert (growing.batch_size, growing.patience) == (min(48, chosen.largest_batch), chosen.patience)
    assert patient == dataclasses.replace(growing, patience=9)


# --- The ends of the range ---------------------------------------------------------------------------------------


def test_levenberg_marquardt_with_fewer_residuals_than_numbers_is_refused(experiment: dict[str, Any]) -> None:
    """Before any pair is made, with the number of pairs that is enough; Adam is not affected."""
    experiment["pairs"]["train"] = 8
    experiment["learned"] = [{"family": "bns", "method": "levenberg_marquardt"}]
    match = (
        r"BNS \(LM\) at nfe 4: .* 17 numbers from 8 pairs of 2 dim.* only 16 residuals; set pairs.train to at least 9"
    )
    with pytest.raises(ConfigError, match=match):
        check_pairs(parse_config(experiment, "few"), (2,))
    check_pairs(parse_config(experiment, "few"), (1, 8, 8))
    experiment["learned"] = [{"family": "bns", "method": "adam"}]
    check_pairs(parse_config(experiment, "few"), (2,))


@pytest.mark.parametrize(("train", "said"), [(12, True), (34, False)])
def test_levenberg_marquardt_with_few_residuals_per_number_is_announced(
    experiment: dict[str, Any], train: int, said: bool
) -> None:
    """Four residuals per number are enough; each family is named once for all its learning runs."""
    experiment["pairs"]["train"] = train
    experiment["learned"] = [{"family": "bns", "method": "levenberg_marquardt", "sigma0": [1, 2]}]
    sentences: list[str] = []
    check_pairs(parse_config(experiment, "few"), (2,), sentences.append)
    few = "BNS (LM) at nfe 4: 12 training pairs of 2 dimensions are few for 17 numbers; with pairs.train of at least 34"
    assert [sentence.split(", the solver")[0] for sentence in sentences] == [few] * said


@pytest.mark.parametrize("learned", [{"family": "ld3", "options": {"inner": "euler"}}, {"family": "neural_solver"}])
def test_a_family_with_nothing_to_learn_at_an_nfe_is_refused(
    experiment: dict[str, Any], learned: dict[str, Any]
) -> None:
    """One evaluation has one step over the whole domain and one weight: from the configuration, by name."""
    experiment |= {"nfe": [1, 4], "fixed": ["euler"], "learned": [learned]}
    with pytest.raises(ConfigError, match=rf"'{learned['family']}' has nothing to learn at nfe 1: .* or learn 'bns'"):
        parse_config(experiment, "one").check()
    experiment["nfe"] = [4]
    parse_config(experiment, "one").check()


REFUSED_AT_ONE = {
    *("bespoke_rk2", "dpm_solver_2", "exponential_rk", "heun", "midpoint", "rk4", "scale_time"),
    *("ld3", "neural_solver"),
}
"""Families that take more evaluations per step, or have nothing to learn from one."""


@pytest.mark.parametrize("family", [name for name in plugins.names("families") if name != "bns_guided"])
def test_every_family_works_at_one_evaluation_or_is_refused_by_name(experiment: dict[str, Any], family: str) -> None:
    """In the configuration's check; one that passes has a finite solver of one evaluation."""
    built = plugins.build("families", family)
    key = "learned" if built.learnable else "fixed"
    experiment |= {"nfe": [1], "fixed": ["euler"], "learned": []}
    experiment[key] = [*(["euler"] if key == "fixed" and family != "euler" else []), {"family": family}]
    config = parse_config(experiment, "one")
    if family in REFUSED_AT_ONE:
        with pytest.raises(ConfigError, match=rf"'{family}'.*(nfe 1|start)"):
            config.check()
        return
    config.check()
    start = GridSolver(plugins.build("families", "euler" if built.learnable else family), 1, Grid())
    theta = built.to_ns(built.start(start, CondOT()), CondOT(), 1.0) if built.learnable else start.to_ns(CondOT())
    assert theta.nfe == 1
    assert bool(theta.flat().isfinite().all())


def test_a_family_of_several_guidance_scales_is_refused_in_a_sweep(experiment: dict[str, Any]) -> None:
    """A sweep's point has one guidance scale; the error names the command that learns several."""
    with pytest.raises(ConfigError, match=r"'bns_guided' learns on several guidance scales.*bespoke distil"):
        parse_config(experiment | {"learned": [{"family": "bns_guided"}]}, "guided").check()


def test_results_of_a_learned_beginning_are_computed_again_where_its_start_has_changed(
    experiment: dict[str, Any], facts: ModelFacts
) -> None:
    """Both options existed before their starts changed, so that the option alone would find the old result."""
    begun = {}
    for beginning in ("held", "time", "free"):
        learned = {"family": "bns", "options": {"beginning": beginning}, "start": "euler"}
        config = parse_config(experiment | {"learned": [learned]}, "beginning")
        (point, *_) = learned_points(config, pair_specs(config, facts), {}, facts.scheduler)
        begun[beginning] = point.identity.get("start_format")
    assert begun == {"held": None, "time": 2, "free": 2}


@pytest.mark.parametrize(
    ("search", "pairs", "race"),
    [({}, 256, True), ({"search": "race", "pairs": 32}, 32, True), ({"search": "full"}, 256, False)],
)
def test_grids_race_unless_a_full_search_is_asked_for(
    experiment: dict[str, Any], search: dict[str, Any], pairs: int, race: bool, facts: ModelFacts
) -> None:
    """A race is named in the points; a full search leaves their keys as they were."""
    content = {**experiment, "grid_search": {"p": [1.4], "q": [1.0], **search}, "pairs": {"validation": 512}}
    config = parse_config(content, "race")
    searched = [p for p in fixed_points(config, pair_specs(config, facts)) if p.kind == "best grid"]
    assert {(point.search_pairs, point.race) for point in searched} == {(pairs, race)}
    assert {"race" in point.identity for point in searched} == {race}
