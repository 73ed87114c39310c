"""Contract tests, run for every plugin that is discovered by its file name: a new plugin is covered automatically."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from dataset_examples import example
from metric_examples import built

import orchestrator.metrics
from orchestrator import plugins
from orchestrator.audio.recognisers.base import Recogniser
from orchestrator.audio.speaker_encoders.base import SpeakerEncoder
from orchestrator.cli.listing import describe, first_sentence
from orchestrator.datasets.base import Dataset
from orchestrator.errors import ConfigError
from orchestrator.export.base import Exporter
from orchestrator.metrics.base import Metric, PairMetric
from orchestrator.models.base import ModelAdapter
from orchestrator.models.decoders.base import Decoder
from orchestrator.objectives.base import Objective
from solvers.distil.methods.base import Method
from solvers.families import Family, LearnableFamily
from solvers.schedulers.base import Scheduler

BASES = {
    "families": (Family, LearnableFamily),
    "schedulers": Scheduler,
    "methods": Method,
    "models": ModelAdapter,
    "datasets": Dataset,
    "metrics": Metric,
    "objectives": Objective,
    "decoders": Decoder,
    "exporters": Exporter,
    "recognisers": Recogniser,
    "speaker_encoders": SpeakerEncoder,
    "features": object,  # a protocol, checked by the tests of feature extractors
}

EVERY = [(kind, name, plugin) for kind in plugins.KINDS for name, plugin in plugins.every(kind)]


def each_plugin(kind: str, base: type = object) -> Any:
    """Parametrise a test over the plugins of one kind, or over those that subclass ``base``."""
    matching = [(name, plugin) for name, plugin in plugins.every(kind) if issubclass(plugin, base)]
    return pytest.mark.parametrize("plugin", [plugin for _, plugin in matching], ids=[name for name, _ in matching])


@pytest.mark.parametrize(("kind", "name", "plugin"), EVERY, ids=[f"{kind}-{name}" for kind, name, _ in EVERY])
def test_every_plugin_subclasses_its_base_and_has_a_one_sentence_description(kind: str, name: str, plugin: Any) -> None:
    """Adding a file to the folder is enough: `bespoke list` shows the plugin and its description."""
    assert issubclass(plugin, BASES[kind])
    assert plugin.__module__.startswith(plugins.KINDS[kind].package)
    sentence = first_sentence(plugin)
    # The docstring of a dataclass defaults to its signature.
    assert len(sentence.split()) >= 3
    assert not sentence.startswith(f"{plugin.__name__}(")
    assert any(line.startswith(f"{name} ") and sentence in line for line in describe(kind))


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_the_error_for_an_unknown_name_suggests_the_nearest_and_lists_all(kind: str) -> None:
    """The message is enough to correct a misspelt plugin."""
    name = plugins.names(kind)[0]
    with pytest.raises(ConfigError) as caught:
        plugins.load(kind, f"{name}x")
    message = str(caught.value)
    assert f"unknown {plugins.KINDS[kind].noun} '{name}x' (did you mean {name!r}?)" in message
    assert message.endswith(f"there are: {', '.join(plugins.names(kind))}")


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_the_error_for_a_name_unlike_any_other_makes_no_suggestion(kind: str) -> None:
    """A bad guess would be more misleading than none."""
    with pytest.raises(ConfigError, match=r"unknown .* 'qqqqqq'; there are: "):
        plugins.load(kind, "qqqqqq")


def test_the_error_for_an_unknown_option_suggests_the_nearest_and_lists_all() -> None:
    """Unknown options are never ignored: a misspelt option would silently keep its default."""
    with pytest.raises(
        ConfigError,
        match=r"dataset 'labels' has no option 'clases' \(did you mean 'classes'\?\); its options are: classes",
    ):
        plugins.build("datasets", "labels", {"clases": 3})
    with pytest.raises(ConfigError, match=r"solver family 'euler' has no option 'order'; its options are: none"):
        plugins.build("families", "euler", {"order": 2})


def test_the_error_for_a_value_that_a_plugin_refuses_names_the_plugin() -> None:
    """The error raised by the plugin reaches the user as a ConfigError."""
    with pytest.raises(ConfigError, match=r"solver family 'adams_bashforth': .*steps_back 2, 3 or 4, got 9"):
        plugins.build("families", "adams_bashforth", {"steps_back": 9})
    with pytest.raises(ConfigError, match=r"dataset 'labels': classes must be at least 1, got 0"):
        plugins.build("datasets", "labels", {"classes": 0})


def test_a_new_file_in_the_folder_is_a_new_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new metric is one file; there is no registry."""
    (tmp_path / "largest_error.py").write_text(
        "from dataclasses import dataclass\n\n"
        "from orchestrator.metrics.base import PairMetric\n\n\n"
        "@dataclass(frozen=True)\n"
        "class LargestError(PairMetric):\n"
        '    """The largest error of any value."""\n\n'
        '    column = "largest_error"\n'
        "    higher_is_better = False\n\n"
        "    def per_sample(self, samples, reference, data_range):\n"
        "        return (samples - reference).double().abs().flatten(1).amax(1)\n\n\n"
        "METRIC = LargestError\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(orchestrator.metrics, "__path__", [*orchestrator.metrics.__path__, str(tmp_path)])
    assert "largest_error" in plugins.names("metrics")
    metric = plugins.build("metrics", "largest_error")
    assert metric.per_sample(torch.zeros(2, 3), torch.ones(2, 3), 2.0).tolist() == [1.0, 1.0]
    assert any("The largest error of any value." in line for line in describe("metrics"))


def test_base_modules_are_not_plugins() -> None:
    """Modules of shared code are in the same folders, but are not offered to users."""
    assert all("base" not in plugins.names(kind) for kind in plugins.KINDS)


@dataclasses.dataclass
class Options:
    """One field of each type that options have, and two that YAML lacks."""

    whole: int = 1
    number: float = 1.0
    text: str | None = None
    flag: bool = False
    choice: Literal["a", "b"] = "a"
    numbers: tuple[float, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    table: dict[str, Any] = dataclasses.field(default_factory=dict)
    pair: tuple[str, int] = ("a", 1)
    anything: Any = None


@pytest.mark.parametrize(
    ("option", "fits", "refused", "allowed"),
    [
        ("whole", [3, -1, np.int64(2)], [2.5, 2.0, True, "3", None, [3]], "a whole number"),
        ("number", [3, 2.5, np.float32(1)], [True, "2e-3", float("nan"), float("inf"), None], "a finite number"),
        ("text", ["a", "", None, Path("a")], [3, True, ["a"]], "a text or null"),
        ("flag", [True, False], [1, 0, "yes", None], "true or false"),
        ("choice", ["a", "b"], ["c", None, True], "one of a, b"),
        ("numbers", [[], [1, 2.5], (1,)], [1, [True], ["1"], None, "12"], "a list of finite numbers"),
        ("rows", [[], [[1], [2, 3]]], [[1], [[1.5]]], "a list of lists of whole numbers"),
        ("table", [{}, {"a": 1}], [None, [], "a"], "a mapping"),
        ("pair", [("b", 2)], [], ""),
        ("anything", [None, 1, "a", [{}]], [], ""),
    ],
)
def test_an_option_is_of_the_type_of_its_field(option: str, fits: list[Any], refused: list[Any], allowed: str) -> None:
    """A boolean is not a number, a number is not a text, and lists stand for tuples, as in YAML."""
    assert [plugins.type_problem(Options, option, value) for value in fits] == [None] * len(fits)
    for value in refused:
        problem = plugins.type_problem(Options, option, value)
        assert problem is not None
        assert problem.startswith(f"{option} must be {allowed}, got {value!r}")


@each_plugin("datasets")
def test_conditioning_of_a_pair_is_a_function_of_seed_and_index_alone(plugin: type[Dataset], tmp_path: Path) -> None:
    """Pair i has the same conditioning in any order and in any batch."""
    dataset = example(plugin, tmp_path)
    indices = [0, 5, 17, 1000, 3]
    conditions = dataset.conditions(7, indices)
    assert conditions.dtype == np.int64
    assert len(conditions) == len(indices)
    alone = np.concatenate([dataset.conditions(7, [index]) for index in indices])
    np.testing.assert_array_equal(conditions, alone)
    np.testing.assert_array_equal(dataset.conditions(7, indices[::-1]), conditions[::-1])
    assert not np.array_equal(dataset.conditions(8, range(100)), dataset.conditions(7, range(100)))


@each_plugin("datasets")
def test_conditions_are_texts_or_labels_below_the_number_of_classes(plugin: type[Dataset], tmp_path: Path) -> None:
    """A sound dataset passes its own checks, fits a model with as many classes, and no model with fewer."""
    dataset = example(plugin, tmp_path)
    dataset.check()
    count = dataset.label_count()
    if count is None:
        with pytest.raises(ValueError, match=r"the model is conditioned on class labels, which .* does not provide"):
            dataset.check_labels(1000, "the model")
        return
    conditions = dataset.labels_of(dataset.conditions(0, range(100)))
    assert 0 <= conditions.min() <= conditions.max() < count
    dataset.check_labels(count, "the model")
    with pytest.raises(ValueError, match=rf"the model has (only )?{count - 1}"):
        dataset.check_labels(count - 1, "the model")


@each_plugin("datasets")
def test_real_samples_match_the_requested_indices(plugin: type[Dataset], tmp_path: Path) -> None:
    """Float32 images or waves in [-1, 1], in any order and any batch. Datasets without real samples are skipped."""
    dataset = example(plugin, tmp_path)
    count = dataset.real_count()
    if not count:
        return
    last, first = dataset.real_samples([count - 1, 0])
    np.testing.assert_array_equal(dataset.real_samples([0])[0], first)
    np.testing.assert_array_equal(dataset.real_samples(range(count))[-1], last)
    assert first.dtype == np.float32
    assert first.ndim in (1, 3)
    assert np.abs(first).max() <= 1


@each_plugin("datasets")
def test_a_reference_set_is_finite_and_labelled(plugin: type[Dataset], tmp_path: Path) -> None:
    """It has finite float32 samples, one label per sample, and conditioning drawn from its labels."""
    dataset = example(plugin, tmp_path)
    if "folder" in vars(dataset) and dataset.reference.__func__ is not Dataset.reference:
        with pytest.raises(ValueError, match="set the dataset's option 'folder'"):
            dataset.reference()  # these samples are not part of the package
        return
    reference = dataset.reference()
    if reference is None:
        return
    assert reference.samples.dtype == np.float32
    assert len(reference.samples) == len(reference.labels)
    assert np.isfinite(reference.samples).all()
    assert set(dataset.labels_of(dataset.conditions(0, range(50))).tolist()) <= set(reference.labels.tolist())


PAIR_METRICS = [name for name, plugin in plugins.every("metrics") if issubclass(plugin, PairMetric)]


def pair_metric(name: str) -> PairMetric:
    metric = built(name)
    assert isinstance(metric, PairMetric)
    return metric


@pytest.mark.parametrize("name", PAIR_METRICS)
def test_a_metric_returns_one_finite_value_per_sample(name: str) -> None:
    """Values are float64, for samples and ground truth of any float type."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, 1, 32, 32, generator=generator)
    values = pair_metric(name).per_sample(reference + 0.1, reference, 2.0)
    assert values.shape == (5,)
    assert values.dtype == torch.float64
    assert torch.isfinite(values).all()


@pytest.mark.parametrize("name", PAIR_METRICS)
def test_the_direction_of_a_metric_is_right(name: str) -> None:
    """A larger error gives a worse value according to ``higher_is_better``."""
    generator = torch.Generator().manual_seed(2)
    reference = torch.rand(2, 1, 32, 32, generator=generator) - 0.5
    error = torch.randn(2, 1, 32, 32, generator=generator)
    metric = pair_metric(name)
    near, far = (metric.per_sample(reference + scale * error, reference, 2.0).mean() for scale in (0.01, 0.5))
    assert (near > far) == metric.higher_is_better


@pytest.mark.parametrize("name", PAIR_METRICS)
def test_a_metric_does_not_depend_on_the_batch_size(name: str) -> None:
    """The value of a sample is the same in a batch and alone, up to the rounding of a network in float32."""
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(7, 1, 32, 32, generator=generator)
    samples = reference + 0.05 * torch.randn(7, 1, 32, 32, generator=generator)
    metric = pair_metric(name)
    batched = metric.per_sample(samples, reference, 2.0)
    alone = torch.cat([metric.per_sample(samples[i : i + 1], reference[i : i + 1], 2.0) for i in range(7)])
    torch.testing.assert_close(batched, alone, rtol=1e-3 if hasattr(metric, "extractor") else 1e-12, atol=0)


@pytest.mark.parametrize("name", PAIR_METRICS)
def test_a_metric_refuses_samples_of_another_shape(name: str) -> None:
    """Broadcasting would compare samples with the wrong ground truth."""
    with pytest.raises(ValueError, match=r"have shape \(2, 1, 4, 4\), but ground truth has shape \(2, 1, 8, 8\)"):
        pair_metric(name).per_sample(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 8, 8), 2.0)


def test_no_two_metrics_share_a_column() -> None:
    """Each column of a table and of MLflow belongs to one metric."""
    columns = [plugin().column for _, plugin in plugins.every("metrics")]
    assert len(set(columns)) == len(columns)


@each_plugin("models")
def test_a_model_adapter_refuses_options_it_does_not_have(plugin: type[ModelAdapter]) -> None:
    """The error comes from ``check`` or the constructor, before any actor starts."""
    name = next(name for name, candidate in plugins.every("models") if candidate is plugin)

    def prepare() -> None:
        plugin.check({"no_such_option": 1})
        plugins.build("models", name, {"no_such_option": 1})

    with pytest.raises(ConfigError, match="no_such_option"):
        prepare()


@each_plugin("models")
def test_a_model_adapter_documents_its_options(plugin: type[ModelAdapter]) -> None:
    """Options are dataclass fields, each described in the docstring of the class or of the base that defines it."""
    documentation = " ".join(base.__doc__ or "" for base in plugin.__mro__)
    options = [field for field in dataclasses.fields(plugin) if field.init]  # type: ignore[arg-type]
    assert not [o.name for o in options if not re.search(rf"\b{o.name}\b[\w, ]*:", documentation)]


def test_all_unknown_and_all_missing_options_are_named_at_once() -> None:
    """The missing ones with what they are for, so that a user need not try again and again."""
    with pytest.raises(ConfigError) as refused:
        plugins.build("models", "torch_module", {"factory": "a:b", "predction": "velocity", "weigths": "w.pt"})
    message = str(refused.value)
    assert "has no options 'predction' (did you mean 'prediction'?), 'weigths' (did you mean 'weights'?)" in message
    assert "; it needs shape, prediction, native_scheduler. shape: Shape of one sample; prediction: Quantity" in message
    assert "positional" not in message


def test_every_option_of_every_plugin_is_described() -> None:
    """`bespoke list` shows the docstrings, inherited ones too."""
    nameless = [
        f"{kind} {name}: {option.name}"
        for kind in plugins.KINDS
        for name, plugin in plugins.every(kind)
        for option in plugins.options_of_plugin(plugin)
        if not option.description
    ]
    assert nameless == []
