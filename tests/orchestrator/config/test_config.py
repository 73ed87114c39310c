"""Configurations are checked completely before any work starts; errors name the key, the value and a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from orchestrator.config.experiment import ExperimentConfig
from orchestrator.config.reading import load_config, read_yaml, validated
from orchestrator.config.solvers import LearnedConfig
from orchestrator.errors import ConfigError
from orchestrator.models.zoo.adapter import zoo_names
from orchestrator.models.zoo.nets import build_net
from orchestrator.tracking.uri import resolve_tracking_uri
from orchestrator.training.zoo import PretrainConfig
from solvers.distil.methods.levenberg_marquardt import LevenbergMarquardt
from solvers.grids import Grid

CONFIGS = Path(__file__).resolve().parents[3] / "sweeps" / "configs"


@pytest.fixture
def load(tmp_path: Path, experiment: dict[str, Any]) -> Callable[..., ExperimentConfig]:
    """A function that loads the small experiment from a file, with overrides."""

    def load(*overrides: str) -> ExperimentConfig:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
        return load_config(path, overrides)

    return load


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid(path: Path) -> None:
    """Its name is that of its file."""
    assert load_config(path).name == path.stem


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_training_recipe_loads(path: Path) -> None:
    """Its name is that of its file, and its network's weights are small enough to ship with the package."""
    recipe = validated(PretrainConfig, read_yaml(path), str(path))
    assert recipe.name == path.stem
    bytes_per_weight = {"float32": 4, "float16": 2}[recipe.weights_dtype]
    weights = sum(parameter.numel() for parameter in build_net(recipe.architecture).parameters())
    assert bytes_per_weight * weights < 12_000_000


def test_every_shipped_model_has_its_training_recipe() -> None:
    """The recipe has the name of the model."""
    assert {path.stem for path in (CONFIGS / "pretrain").glob("*.yaml")} >= set(zoo_names())


def test_a_variant_is_a_set_of_overrides_applied_before_the_others(tmp_path: Path) -> None:
    """A variant may use dotted keys. Without a ``variant`` override, the file is read as it is."""
    path = tmp_path / "with.yaml"
    path.write_text("name: small\npairs: {train: 8, test: 9}\nvariants: {full: {name: large, pairs.train: 99}}\n")
    assert read_yaml(path) == {"name": "small", "pairs": {"train": 8, "test": 9}}
    assert read_yaml(path, ["pairs.test=7", "variant=full"]) == {"name": "large", "pairs": {"train": 99, "test": 7}}
    with pytest.raises(ConfigError, match=r"has no variant 'ful' .did you mean 'full'\?.; it has: full"):
        read_yaml(path, ["variant=ful"])


@pytest.mark.parametrize("name", ["cifar10", "spoken_digits"])
def test_the_full_variant_enlarges_a_reduced_experiment(name: str) -> None:
    """By default these experiments are small enough for a laptop."""
    reduced, full = (load_config(CONFIGS / f"{name}.yaml", overrides) for overrides in ([], ["variant=full"]))
    assert set(full.nfe) > set(reduced.nfe)
    assert full.pairs.test > reduced.pairs.test
    assert {learned.method.name for learned in full.learned} == {"adam", "levenberg_marquardt"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "guidence_scale=[1]",
            "guidence_scale: unknown key (did you mean 'guidance_scale'?); known here: conditioning,",
        ),
        ("pairs.trian=64", "pairs.trian: unknown key (did you mean 'train'?); known here: atol, batch_size,"),
        ("learned.0.learning_rat=1", "learned.0.learning_rat: unknown key (did you mean 'learning_rate'?); known here"),
        ("resources.host_gpu=1", "resources.host_gpu: unknown key (did you mean 'host_gpus'?)"),
        ("model.option={}", "model.option: unknown key (did you mean 'options'?); known here: name, options"),
        ("zzz=1", "zzz: unknown key; known here: "),
        ("pairs.train=many", "pairs.train: Input should be a valid integer"),
        ("pairs=520", "pairs: Input should be a valid dictionary or instance of PairsConfig (got 520)"),
        ("nfe=[4.5]", "nfe.0: Input should be a valid integer"),
        ("nfe=[0]", "nfe.0: Input should be greater than or equal to 1 (got 0)"),
        ("fixed_sigma0=-1", "fixed_sigma0.0: Input should be greater than 0 (got -1)"),
        ("learned.0.sigma0=[1, -2]", "learned.0.sigma0.1: Input should be greater than 0 (got -2)"),
        ("learned.0.learning_rate=[]", "learned.0.learning_rate: Tuple should have at least 1 item"),
        ("fixed_sigma0=[]", "fixed_sigma0: Tuple should have at least 1 item"),
        ("guidance_scale=.inf", "guidance_scale.0: Input should be a finite number (got inf)"),
        ("learned.0.learning_rate=.nan", "learned.0.learning_rate.0: Input should be a finite number (got nan)"),
        ("search.scheduler=hyperband", "search.scheduler: Input should be 'fifo' or 'asha' (got 'hyperband')"),
        ("name=a/b", "name: String should match pattern"),
        ("model=null", "model: Input should be a valid dictionary"),
        (
            "pairs.shard_size=100",
            "pairs: shard_size 100 is not a multiple of batch_size 8: a batch must not span shards; use 96",
        ),
        ("resources.device=cuda", "device 'cuda' needs resources.host_gpus above 0, e.g. 1 or 0.5"),
        ("resources.host_gpus=0.5", "host_gpus is 0.5 but device is 'cpu'; set resources.device to cuda"),
    ],
)
def test_the_error_for_a_wrong_key_or_value_names_the_file_and_the_key(
    load: Callable[..., ExperimentConfig], override: str, message: str
) -> None:
    """For an unknown key it adds the nearest valid one, for a wrong value the value."""
    with pytest.raises(ConfigError, match=r"small\.yaml is not a valid configuration:") as caught:
        load(override)
    assert message in str(caught.value)


def test_all_mistakes_are_reported_at_once(load: Callable[..., ExperimentConfig]) -> None:
    """A user with three mistakes needs one run to see them, not three."""
    with pytest.raises(ConfigError) as caught:
        load("guidence_scale=[1]", "pairs.trian=64", "pairs.rtol=2")
    message = str(caught.value)
    assert all(key in message for key in ("guidence_scale:", "pairs.trian:", "pairs.rtol:"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nfe=[4, 5]"], r"fixed family 'midpoint' at nfe 5: Midpoint .* multiple of 2, got 5; use 4 or 6, or give"),
        (["nfe=[4, 5]"], r"or give midpoint its own 'nfe: \[4\]'$"),
        (["nfe=[5]"], r"fixed family 'midpoint' at nfe 5: .* or leave midpoint out$"),
        (["fixed=[]"], r"learned family 'bns' starts from the best fixed solver, but 'fixed' has none; list families"),
        (["fixed=[]", "learned=[]"], r"the sweep is empty: list families under 'fixed', 'learned', or both"),
        (["fixed=[bns]"], r"family 'bns' is learned; list it under 'learned', not under 'fixed'"),
        (["learned=[midpoint]"], r"family 'midpoint' has nothing to learn; list it under 'fixed', not under 'learned'"),
        (
            ["learned=[{family: bns_guided, method: levenberg_marquardt}]"],
            r"'bns_guided' learns on several guidance scales at once, .*bespoke distil",
        ),
        (["fixed.0.family=midpiont"], r"unknown solver family 'midpiont' \(did you mean 'midpoint'\?\); there are: "),
        (["learned.0.start=rk4", "nfe=[6]"], r"start 'rk4' of 'bns' at nfe 6: RK4 .* got 6; use 4 or 8"),
        (["learned.0.start=bns"], r"family 'bns' is learned"),
        (
            ["learned=[{family: bns, method: levenberg_marquardt, learning_rate: 1.0e-3}]"],
            r"'learning_rate' has no meaning for method 'levenberg_marquardt'; leave it out",
        ),
        (
            ["learned=[{family: bns, method: levenberg_marquardt}]", "resources.checkpoint=true"],
            r"resources.checkpoint only affects gradients, and no learned family has a method with a backward pass",
        ),
        (["learned.0.jacobian=jvp"], r"'jacobian' has no meaning for method 'adam'; leave it out"),
        (
            ["learned=[{family: bns, method: levenberg_marquardt, objective: rmse}]"],
            r"method 'levenberg_marquardt' minimises the PSNR loss, not 'rmse'; use method 'adam'",
        ),
        (
            ["fixed=[{family: rk4, nfe: 4}]", "nfe=[4, 6]"],
            r"no fixed family that 'bns' can start from runs at nfe 6, so 'start: best' has nothing to choose from",
        ),
        (["metrics=[psnr, sssim]"], r"unknown metric 'sssim'.*there are: .*psnr"),
        (["metrics=[snr]"], r"metrics must include 'psnr'"),
        (["model.name=zooo"], r"unknown model adapter 'zooo' \(did you mean 'zoo'\?\); there are: diffusers, edm,"),
        (["model.options={}"], r"model adapter 'zoo' takes one option, 'weights', a name or a path; got \{\}"),
        (["model.options.weights=digits_fm_to"], r"no zoo model 'digits_fm_to' \(did you mean 'digits_fm_ot'\?\)"),
        (["conditioning.name=label"], r"unknown dataset 'label' \(did you mean 'labels'\?\)"),
        (["seeds=[1, 1]"], r"seeds must list at least one value and no value twice; got \[1, 1\]"),
        (["nfe=[]"], r"nfe must list at least one value and no value twice; got \[\]"),
        (["guidance_scale=[1, 3, 1]"], r"guidance_scale must list at least one value and no value twice"),
    ],
)
def test_an_impossible_combination_is_refused_before_any_work(
    load: Callable[..., ExperimentConfig], experiment: dict[str, Any], overrides: list[str], message: str
) -> None:
    """It is detected without loading a model, and the error names a remedy."""
    experiment["fixed"] = [{"family": family} for family in experiment["fixed"]]
    experiment["conditioning"] = {"name": "labels"}
    with pytest.raises(ConfigError, match=message):
        load(*overrides)


def test_an_override_changes_only_its_key(load: Callable[..., ExperimentConfig]) -> None:
    """Dotted keys reach into mappings and lists, and create mappings that the file does not have. Values are YAML."""
    plain = load()
    changed = load(
        "pairs.train=64", "nfe=[4, 8]", "learned.0.learning_rate=1.0e-3", "search.scheduler=asha", "fixed.1=heun"
    )
    assert changed.pairs.train == 64
    assert changed.nfe == (4, 8)
    assert changed.learned[0].learning_rate == (1e-3,)
    assert changed.search.scheduler == "asha"
    assert [solver.family for solver in changed.fixed] == ["euler", "heun"]
    assert changed.pairs.model_copy(update={"train": plain.pairs.train}) == plain.pairs
    assert changed.learned[0].iterations == plain.learned[0].iterations


def test_the_last_override_of_a_key_wins(load: Callable[..., ExperimentConfig]) -> None:
    """This is what users expect of a command line."""
    assert load("pairs.train=64", "pairs.train=56").pairs.train == 56


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.train", r"override 'pairs\.train' is not key=value, e\.g\. pairs\.train=64"),
        ("=64", r"override '=64' is not key=value"),
        ("nfe=[4", r"the value of override 'nfe=\[4' is not YAML: "),
        ("learned.1.iterations=5", r"override 'learned\.1\.iterations=5': '1' is not an index of a list of 1"),
        ("learned.first=5", r"override 'learned\.first=5': 'first' is not an index of a list of 1"),
        ("fixed.0.nfe=4", r"override 'fixed\.0\.nfe=4': fixed\.0 is not a mapping"),
        ("fixed.0.options.x=4", r"override 'fixed\.0\.options\.x=4': 'options' is inside a plain value"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused(
    load: Callable[..., ExperimentConfig], override: str, message: str
) -> None:
    """A mistyped override must never be ignored silently."""
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_a_single_value_may_stand_for_a_list_and_a_name_for_a_mapping(load: Callable[..., ExperimentConfig]) -> None:
    """`nfe: 8` is `nfe: [8]`, and `fixed: [euler]` is `fixed: [{family: euler}]`."""
    short = load("nfe=8", "guidance_scale=3", "learned.0.sigma0=2", "fixed=[euler, {family: heun, nfe: 8}]")
    assert (short.nfe, short.guidance_scale, short.learned[0].sigma0) == ((8,), (3.0,), (2.0,))
    assert [(solver.family, solver.nfe) for solver in short.fixed] == [("euler", None), ("heun", (8,))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: [1, 2\n", r"bad\.yaml is not YAML: "),
        (b"\xff\xfe\x00", r"bad\.yaml is not YAML: "),
        (b"- name\n", r"bad\.yaml must be a mapping of keys to values, got list"),
        (b"", r"bad\.yaml must be a mapping of keys to values, got NoneType"),
        (b"name: x\n", r"model: missing; it has no default\n  nfe: missing"),
    ],
)
def test_a_file_that_is_not_an_experiment_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """The error names the file, whatever it contains."""
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_the_error_for_a_missing_file_names_the_folder_of_the_shipped_ones(tmp_path: Path) -> None:
    """This is a likely first mistake of a new user."""
    missing = tmp_path / "digit.yaml"
    with pytest.raises(ConfigError, match=f"no configuration at {re.escape(str(missing))}; .* sweeps/configs"):
        load_config(missing)
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path)


def test_a_checked_configuration_cannot_change(load: Callable[..., ExperimentConfig]) -> None:
    """The sweep runs with the configuration that was checked."""
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.nfe = (8,)  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.pairs.train = 1  # type: ignore[misc]


def test_the_grids_are_the_solvers_own_and_each_grid_of_the_search_once(load: Callable[..., ExperimentConfig]) -> None:
    """The search has p times q grids and those listed; the solver's own comes first. p = q = 1 is the uniform grid."""
    also = "grid_search.also=[log_snr, {kind: polynomial, rho: 5}, edm]"
    config = load(
        "grid_search.p=[1, 1.4, 2]", "grid_search.q=[1, 1.2]", also, "fixed=[euler, {family: ddim, grid: edm}]"
    )
    grids = config.grids(config.fixed[0])
    assert grids[0] == Grid()
    assert [grid.kind for grid in grids].count("warped") == 5
    assert grids[6:] == [Grid("log_snr"), Grid("polynomial", rho=5), Grid("edm")]
    own = config.grids(config.fixed[1])
    assert own[0] == Grid("edm")
    assert sorted(grid.label for grid in own) == sorted(grid.label for grid in grids)
    alone = load("grid_search=null", "fixed=[{family: euler, grid: {kind: shifted, shift: 5}}]")
    assert alone.grids(alone.fixed[0]) == [Grid("shifted", shift=5)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("logsnr", r"unknown time grid 'logsnr' \(did you mean 'log_snr'\?\); choose one of uniform, .*, ays, gits"),
        ("{kind: edm, roh: 5}", r"a time grid has no 'roh' \(did you mean 'rho'\?\); it has: kind, p, q, rho"),
        ("{kind: uniform, rho: 5}", r"rho belongs to the 'polynomial' and 'edm' grid, not to 'uniform'"),
        ("{kind: gits, gama: 1}", r"gama: unknown key"),
        ("{kind: gits, gamma: 0}", r"gamma: "),
    ],
)
def test_a_grid_that_does_not_exist_is_refused(load: Callable[..., ExperimentConfig], grid: str, message: str) -> None:
    """The error is that of the grid itself."""
    with pytest.raises(ConfigError, match=message):
        load(f"fixed=[{{family: euler, grid: {grid}}}]")


def test_listed_times_must_match_the_steps_of_every_nfe(load: Callable[..., ExperimentConfig]) -> None:
    """Listed times fix the number of steps, but a sweep may have several NFEs: checked before any pair is made."""
    grid = "{kind: given, listed: [0.2, 0.5, 0.8]}"
    load(f"fixed=[{{family: euler, grid: {grid}, nfe: [4]}}, midpoint]", "nfe=[4, 8]")
    with pytest.raises(ConfigError, match=r"grid of fixed family 'euler' at nfe 8: 3 listed times .* make 4 steps"):
        load(f"fixed=[{{family: euler, grid: {grid}}}]", "nfe=[4, 8]")


def test_a_family_may_be_listed_on_two_grids_but_not_twice_on_one(load: Callable[..., ExperimentConfig]) -> None:
    """The label contains the grid unless it is the uniform one."""
    config = load("fixed=[ddim, {family: ddim, grid: log_snr}]")
    assert [solver.label for solver in config.fixed] == ["DDIM", "DDIM (log_snr)"]
    with pytest.raises(ConfigError, match=r"'fixed' lists 'DDIM' twice; their results would share one row; leave one"):
        load("fixed=[ddim, {family: ddim, grid: uniform}]")


def test_a_relative_path_is_made_absolute_for_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in other directories, where a relative SQLite path would be another file."""
    monkeypatch.chdir(tmp_path)
    assert resolve_tracking_uri(None, "data") == f"sqlite:///{tmp_path}/data/mlflow.db"
    assert resolve_tracking_uri(None, "file:///srv/data") == "sqlite:////srv/data/mlflow.db"
    assert resolve_tracking_uri(None, "file:///srv/my%20data") == "sqlite:////srv/my data/mlflow.db"
    assert resolve_tracking_uri("sqlite:///mine.db", "data") == f"sqlite:///{tmp_path}/mine.db"
    assert resolve_tracking_uri("http://head:5000", "s3://bucket/root") == "http://head:5000"


def test_remote_storage_needs_a_tracking_server() -> None:
    """SQLite does not work on an object store, and other machines cannot reach a file on this one."""
    with pytest.raises(ConfigError, match=r"storage 's3://bucket/root' is remote, .* give --tracking-uri, e\.g\. http"):
        resolve_tracking_uri(None, "s3://bucket/root")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.train=true", r"pairs\.train: Input should be a valid integer \(got True\)"),
        ("pairs.train='64'", r"pairs\.train: Input should be a valid integer \(got '64'\)"),
        ("name=..", r"name: String should match pattern"),
        ("resources.device=tpu", r"resources\.device: String should match pattern"),
        ("metrics=[psnr,psnr]", r"metrics must list at least one value and no value twice"),
        ("guidance_scale=[1,1.0000001]", r"guidance_scale must list at least one value and no value twice"),
        ("grid_search.p=[40]", r"grid_search\.p\.0: Input should be less than or equal to 10"),
        ("learned=[{family: bns}, {family: bns, iterations: 3}]", r"lists 'BNS' twice; .* 'learning_rate: \["),
        ("learned.².iterations=3", r"'²' is not an index of a list"),
    ],
)
def test_values_that_only_look_valid_are_refused(
    load: Callable[..., ExperimentConfig], override: str, message: str
) -> None:
    """Python would accept true as 1, and two values that print alike as different."""
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_a_sweep_without_points_is_refused(load: Callable[..., ExperimentConfig]) -> None:
    """There are no points if the families' own NFE lists exclude every NFE of the sweep."""
    with pytest.raises(ConfigError, match=r"no fixed family runs at any nfe of \[4\]"):
        load("nfe=[4]", "fixed=[{family: euler, nfe: [99]}]", "learned=[]")


def test_a_local_ray_gets_the_configured_cores_or_by_default_all(
    load: Callable[..., ExperimentConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget must be known, since hosts and trials are configured in fractions of cores."""
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert load("resources.local_cpus=3").resources.cpu_budget == 3
    assert load("resources.local_cpus=null").resources.cpu_budget == 7


@pytest.mark.parametrize(("precision", "differences"), [("float32", "forward"), ("float16", "central")])
def test_differences_are_central_in_half_precision_unless_configured(precision: Any, differences: str) -> None:
    """Forward differences drown in the rounding of half precision. A configured ``jacobian`` is kept."""
    learned = {"family": "bns", "method": "levenberg_marquardt"}
    (settings,) = LearnedConfig(**learned).methods(0, 64, precision, nfe=8, dimensions=64)
    (configured,) = LearnedConfig(**learned, jacobian="forward").methods(0, 64, precision, nfe=8, dimensions=64)
    assert isinstance(settings, LevenbergMarquardt)
    assert isinstance(configured, LevenbergMarquardt)
    assert (settings.jacobian, configured.jacobian) == (differences, "forward")
