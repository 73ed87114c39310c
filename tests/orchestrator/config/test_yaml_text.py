"""YAML as people write it: keys twice, numbers in other notations, empty sections, overrides in other styles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.reading import load_config, read_yaml
from orchestrator.config.yaml_text import parse_yaml
from orchestrator.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 0.002),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0", 0),
        ("1:30", "1:30"),
        ("2026-11-28", "2026-11-28"),
        ("e3", "e3"),
        ("1.2.3", "1.2.3"),
        ("<<: {a: 1, b: 1}\na: 2", {"a": 2, "b": 1}),
    ],
)
def test_numbers_are_numbers_and_texts_are_texts(text: str, value: Any) -> None:
    """Dates and times of day are text; a merged key may be overridden."""
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"^line 3: the key 'a' is also in line 1; keep one of them$"),
        ("s:\n  a: 1\n  b: 2\n  a: 3", r"^line 4: the key 'a' is also in line 2; keep one of them$"),
        ("{a: 1, a: 1}", r"^the key 'a' is also in line 1"),
        ("010", r"^010 may be decimal or octal; write 10 or 8, or put it in quotes as text$"),
        ("a:\n\tb: 1", r"^line 2: .*; indent with spaces, not with tabs$"),
        ("a: a cat: sitting", r"put a text that contains ': ' in quotes$"),
        ("[a, b", r"close the bracket"),
        ("@home", r"put a text that begins with a special character in quotes"),
        ("*anchor", r"found undefined alias"),
        ("!!python/object/apply:os.getcwd []", r"could not determine a constructor"),
        ("[" * 5000, r"recursion|expected"),
    ],
)
def test_yaml_with_two_meanings_or_none_is_refused(text: str, message: str) -> None:
    """With the line and the remedy."""
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def written(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    """Read a file with this text and overrides."""
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    return read_yaml(folder / "c.yaml", overrides)


@pytest.mark.parametrize("variants", ["variants:", "variants: {}", ""])
def test_a_file_without_variants_has_none(tmp_path: Path, variants: str) -> None:
    """An empty key is what is left after the last variant is deleted."""
    assert written(tmp_path, f"\ufeffname: a\n{variants}") == {"name": "a"}
    with pytest.raises(ConfigError, match=r"has no variant 'full'; it has: none"):
        written(tmp_path, f"name: a\n{variants}", "variant=full")


@pytest.mark.parametrize("variants", ["[full]", "full", "{full: }", "{full: [nfe]}"])
def test_variants_that_are_not_sets_of_overrides_are_refused(tmp_path: Path, variants: str) -> None:
    """With the form that they have."""
    with pytest.raises(ConfigError, match=r"variants of .*c\.yaml must map names to overrides"):
        written(tmp_path, f"name: a\nvariants: {variants}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("PAIRS_TRAIN=64", "PAIRS_TRAIN: unknown key (did you mean 'pairs.train'?)"),
        ("pairs__train=64", "pairs__train: unknown key (did you mean 'pairs.train'?)"),
        ("train=64", "train: unknown key (did you mean 'pairs.train'?)"),
        ("--pairs.train=64", "--pairs: unknown key (did you mean 'pairs'?)"),
        ("pairs.train =64", "override 'pairs.train =64' is not key=value, e.g. pairs.train=64, without spaces"),
        ("=64", "override '=64' is not key=value"),
        ("pairs..train=64", "override 'pairs..train=64' is not key=value"),
        ("pairs.train=010", "the value of override 'pairs.train=010' is not YAML: 010 may be decimal or octal"),
        ("fixed=", "fixed: Input should be a valid tuple (got None); give it a value, or remove the key"),
        ("pairs=", "(got None); give it a value, or remove the key"),
        ("pairs.rtol=yes", "pairs.rtol: must be a number; YAML reads yes, no, on and off as true and false (got True)"),
        ("fixed_sigma0=[1, true]", "fixed_sigma0: must be a number; YAML reads yes"),
        ("fixed.0.search=1", "fixed.0.search: Input should be a valid boolean (got 1)"),
        ("fixed.0.nfe=[2.5]", "fixed.0.nfe.0: Input should be a valid integer (got 2.5)"),
        ("storage=''", "storage: String should have at least 1 character (got '')"),
        ("name=2026", "(got 2026); put a text that YAML reads as a number or as true or false in quotes"),
        ("conditioning.options.classes=2.5", "conditioning: dataset 'labels': classes must be a whole number, got 2.5"),
        ("conditioning.options.classes=true", "classes must be a whole number, got True"),
        ("conditioning.options.classes=", "classes must be a whole number, got None"),
        ("conditioning.options.clases=3", "conditioning: dataset 'labels' has no option 'clases' (did you mean 'class"),
        ("conditioning={name: prompts, options: {prompts: [yes]}}", "must be a list of texts, got [True]; put a text"),
        ("conditioning={name: prompts, options: {prompts: [a: b]}}", "must be a list of texts, got [{'a': 'b'}]"),
        ("conditioning={name: cifar10, options: {split: tset}}", "split must be one of train, test, got 'tset'"),
        ("fixed.0.grid={kind: edm, sigma_min: '2e-3'}", "sigma_min must be a finite number, got '2e-3'"),
        ("fixed.1={family: ipndm, options: {order: .nan}}", "fixed.1: solver family 'ipndm' has no option 'order'"),
        (
            "fixed.1={family: adams_bashforth, options: {steps_back: 2.5}}",
            "steps_back must be a whole",
        ),
        ("learned.0.options={x: 1}", "learned.0: solver family 'bns' has no option 'x'"),
        ("metrics=[psnr, psrn]", "metrics: unknown metric 'psrn' (did you mean 'psnr'?)"),
        ("model.options.weight=x", "model: model adapter 'zoo' takes one option, 'weights', a name or a path"),
    ],
)
def test_the_error_names_the_whole_key_the_value_and_what_is_allowed(
    tmp_path: Path, experiment: dict[str, Any], override: str, message: str
) -> None:
    """For overrides in the style of an environment variable, null for a list, numbers as text, options."""
    path = tmp_path / "c.yaml"
    fixed = [{"family": "euler"}, {"family": "midpoint"}]
    path.write_text(yaml.safe_dump(experiment | {"fixed": fixed, "conditioning": {"name": "labels"}}), encoding="utf-8")
    load_config(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert message in str(caught.value)


def test_a_number_without_a_point_is_a_number_in_every_option(tmp_path: Path, experiment: dict[str, Any]) -> None:
    """As YAML 1.2 and most programs read it: also within the options of plugins, which keep what YAML gave."""
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    config = load_config(path, ["pairs.rtol=1e-5", "fixed=[{family: euler, grid: {kind: edm, sigma_min: 2e-3}}]"])
    assert config.pairs.rtol == 1e-5
    assert config.fixed[0].grid.sigma_min == 0.002  # type: ignore[union-attr]
