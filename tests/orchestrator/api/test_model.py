"""Models as a notebook makes them: functions, modules, files; with labels and with arrays."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
import yaml
from torch import Tensor, nn

from orchestrator import Model
from orchestrator.config.reading import load_config
from orchestrator.datasets.labels import Labels
from orchestrator.errors import UserError
from orchestrator.models.diffusers import DiffusersModel
from orchestrator.models.in_process import Live
from orchestrator.storage import canonical_json
from solvers.schedulers import VP


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of the flow from N(0, I) to N(0, I / 4)."""
    t = t[:, None]
    return x * (0.25 * t - (1 - t)) / ((1 - t) ** 2 + 0.25 * t**2)


class Net(nn.Module):
    """A small network with labels; the last is the dropped one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.label = nn.Embedding(4, 2)
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None], self.label(y)], dim=1))


def prediction(model: Model, condition: Any = None, scale: float = 1.0) -> Tensor:
    x = torch.linspace(-1, 1, 6).view(3, 2)
    condition = torch.zeros(3, dtype=torch.int64) if condition is None else condition
    with model.at_rest(), torch.no_grad():
        return model.loaded.field(condition, scale)(x, torch.tensor(0.5, dtype=torch.float64))


def test_a_function_is_a_model() -> None:
    """Its velocity is what the function returns for a time per sample."""
    model = Model(gaussian, (2,))
    x = torch.linspace(-1, 1, 6).view(3, 2)
    torch.testing.assert_close(prediction(model), gaussian(x, torch.full((3,), 0.5)))
    assert (model.name, model.shape, model.loaded.parameters) == ("gaussian", (2,), 0)
    assert "no weights found" in repr(model)


def test_a_module_is_a_model_and_is_left_as_it_was() -> None:
    """In evaluation mode and without gradients while a command runs; its modes and its gradients come back."""
    net = Net()
    net.layers[0].weight.requires_grad_(False)
    net.layers[1].eval()
    before = [(part.training) for part in net.modules()], [weight.requires_grad for weight in net.parameters()]
    model = Model(net, (2,), classes=4, null_label=3)
    first, second = prediction(model), prediction(model)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # no dropout
    assert not first.requires_grad
    after = [(part.training) for part in net.modules()], [weight.requires_grad for weight in net.parameters()]
    assert after == before
    assert model.loaded.parameters == sum(weight.numel() for weight in net.parameters())


def test_guidance_drops_the_label() -> None:
    """f_null + scale (f_y - f_null), as for every adapter; without a null label it is refused."""
    net = Net().eval()
    model = Model(net, (2,), classes=4, null_label=3)
    label, dropped = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    plain, null = prediction(model, label), prediction(model, dropped)
    torch.testing.assert_close(prediction(model, label, 2.5), null + 2.5 * (plain - null))
    with pytest.raises(UserError, match=r"guidance scale 2\.5 needs a label for the dropped condition"):
        Model(net, (2,), classes=4).config(guidance_scale=[2.5])


def test_labels_are_drawn_by_default_from_those_that_are_not_the_dropped_one() -> None:
    """The dropped label is the last, the first, or beyond them."""
    net = Net()
    options = [Model(net, (2,), classes=4, null_label=null).config().conditioning.options for null in (3, 0, 4, None)]
    assert options == [{"classes": 3}, {"classes": 3, "first": 1}, {"classes": 4}, {"classes": 4}]
    chosen = Model(net, (2,), classes=4, conditions=Labels(classes=2)).config()
    assert chosen.conditioning.options == {"classes": 2, "first": 0}


def test_the_digest_follows_the_weights_and_the_code() -> None:
    """Equal networks have one digest; training goes on, or the code changes, and the model is another."""
    net = Net()
    model = Model(net, (2,), classes=4, null_label=3)
    digest = model.digest
    assert Model(copy.deepcopy(net), (2,), classes=4, null_label=3).digest == digest
    assert Model(net, (2,), classes=4).digest != digest
    torch.optim.SGD(net.parameters(), lr=0.1).zero_grad()
    net(torch.ones(1, 2), torch.ones(1), torch.zeros(1, dtype=torch.int64)).sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert model.digest != digest
    assert Model(lambda x, t: -x, (2,)).digest != Model(lambda x, t: -2 * x, (2,)).digest


def test_a_model_with_a_part_that_has_no_digest_is_never_taken_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    """It says which part, and two models of it have two digests."""
    lock = threading.Lock()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with lock:
            return -x

    first, second = Model(velocity, (2,)), Model(velocity, (2,))
    assert first.digest != second.digest
    assert first.digest == first.digest
    assert "velocity refers to what has no digest: .lock (_thread.lock)" in capsys.readouterr().err


def test_caches_and_counters_of_a_network_do_not_make_it_another_model() -> None:
    """What it changes by running stays as it was in its identity; a later change of its weights does not."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.calls = nn.Linear(2, 2), 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            self.table = torch.arange(float(len(x)))
            return self.layer(x)

    net = Caching()
    model = Model(net, (2,))
    digest = model.digest
    for _ in range(2):
        prediction(model)
        assert model.digest == digest
    assert net.calls == 2
    assert Model(Caching(), (2,)).digest == digest
    with torch.no_grad():
        net.layer.weight.add_(1)
    assert model.digest != digest


def test_arrays_condition_a_model_by_name() -> None:
    """One array is the third argument, several go by name; each lies in the storage, under its content."""
    observations = np.linspace(0, 1, 40, dtype=np.float32).reshape(20, 2)
    mask = torch.arange(20) % 2

    def one(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition - x

    def several(x: Tensor, t: Tensor, mask: Tensor, obs: Tensor) -> Tensor:
        return (obs - x) * mask[:, None]

    model = Model(one, (2,), conditions={"obs": observations}, null={"obs": 0})
    assert model.loaded.call == "x, t, c.obs"
    first, again = (model.config(storage="here").conditioning.options["file"] for _ in range(2))
    assert first == again
    np.testing.assert_array_equal(np.load(first)["obs"], observations)
    model = Model(several, (2,), conditions={"obs": observations, "mask": mask})
    assert model.loaded.call == "x, t, obs=c.obs, mask=c.mask"
    assert model.check(storage="here").examination.evidence.evaluations > 0
    with pytest.raises(UserError, match="a folder, but the storage is s3://bucket"):
        model.config(storage="s3://bucket/here")


def test_a_check_finds_nothing_wrong_with_an_exact_model_and_names_a_wrong_sign() -> None:
    """Its repr is a table and a figure in a notebook, and sentences elsewhere."""
    good = Model(gaussian, (2,), data_range=3).check()
    assert good.findings == []
    assert not good.is_refused
    assert repr(good).startswith("gaussian, conditions from labels: nothing wrong in ")
    bad = Model(lambda x, t: -gaussian(x, t), (2,), data_range=3, name="wrong").check()
    assert bad.is_refused
    assert "refused: " in repr(bad)
    assert "<img" in bad._repr_html_()
    assert bad.plot()._repr_png_().startswith(b"\x89PNG")


def test_threads_of_the_notebook_stay_as_they_are() -> None:
    """A host sets the number of its process; here that is the notebook's own."""
    before = torch.get_num_threads()
    Model(gaussian, (2,), data_range=3).check()
    assert torch.get_num_threads() == before


def test_schedulers_are_objects_names_or_descriptions() -> None:
    """All three are one model."""
    given = [VP(), "vp", {"name": "vp", "options": {}}]
    models = [Model(lambda x, t: -x, (2,), prediction="epsilon", native_scheduler=one) for one in given]
    assert {type(model.loaded.native) for model in models} == {VP}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model("digits_fm_ot", (2,)), "a model is a function of .* Model.zoo"),
        (lambda: Model(gaussian, ()), "shape must list the sizes of one sample"),
        (lambda: Model(gaussian, (2,), prediction="noise"), "unknown prediction 'noise'"),
        (lambda: Model(gaussian, (2,), native_scheduler="cosin"), "did you mean 'cosine'"),
        (lambda: Model(gaussian, (2,), null_label=3), "null_label has no effect"),
        (lambda: Model(gaussian, (2,), conditions=3), "conditions must be a mapping of arrays"),
        (lambda: Model(gaussian, (2,), conditions={"obs": ["a"]}), "'obs' must be an array of numbers"),
        (lambda: Model.zoo("digits_fm"), "no zoo model 'digits_fm'"),
        (lambda: Model.adapter("onyx", file="x.onnx"), "unknown model adapter 'onyx'"),
        (lambda: Model.adapter("in_process", shape=[2], prediction="velocity", native_scheduler="vp", network="a1"),
         "lives only in the process"),
        (lambda: Model.adapter("built", adapter="a1"), "lives only in the process"),
        (lambda: Model.zoo("digits_fm_ot", conditions=Labels(classes=11)), "has 10"),
        (lambda: Model.from_file("missing.py:Net", (2,)), "cannot be imported"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_when_the_model_is_made(make: Any, message: str) -> None:
    """With the value and the remedy."""
    with pytest.raises(UserError, match=message):
        make()


def test_a_network_in_a_file_is_a_model_of_the_cluster_too(tmp_path: Path) -> None:
    """It has the digest of its configuration's model, and the configuration is written from it."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/api_flow.py").write_text(
        "from torch import nn\nclass Flow(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = nn.Linear(2, 2)\n    def forward(self, x, t):\n        return self.layer(x)\n"
    )
    weights = {f"layer.{name}": value for name, value in nn.Linear(2, 2).state_dict().items()}
    torch.save(weights, tmp_path / "flow.pt")
    model = Model.from_file("nets/api_flow.py:Flow", (2,), weights="flow.pt")
    model.to_yaml("flow.yaml")
    config = load_config("flow.yaml")
    assert config.model.options["weights"] == str(tmp_path / "flow.pt")
    read = Model.from_yaml("flow.yaml")
    assert read.digest == model.digest
    assert read.to_yaml() == model.to_yaml()
    assert model.name == "flow"


def test_models_of_the_zoo_know_what_conditions_them() -> None:
    """Labels, and digits to be spoken."""
    assert Model.zoo("digits_fm_ot").config().conditioning.options == {"classes": 10}
    assert Model.zoo("spoken_digits_fm_ot").config().conditioning.name == "spoken_digits"


def test_a_pipeline_in_memory_is_a_model() -> None:
    """Around the pipeline itself; it has no configuration, and hosts get it as it is."""
    pipe = tiny_pipelines.ddpm()
    model = Model.diffusers(pipe)
    assert model.digest == DiffusersModel.of(pipe).digest
    assert model.config().conditioning.options == {"classes": 1}
    assert model.check().examination.evidence.evaluations > 0
    assert (model.device, model.shape) == ("cpu", DiffusersModel.of(pipe).shape)
    with pytest.raises(UserError, match="lives only in this process"):
        model.to_yaml()
    with pytest.raises(UserError, match="dtype: an adapter object has its options already"):
        Model.adapter(DiffusersModel.of(pipe), dtype="float16")
    classes = Model.adapter(DiffusersModel.of(tiny_pipelines.dit(classes=5))).config().conditioning.options
    assert classes == {"classes": 5}
    text_to_image = tiny_pipelines.stable_diffusion()
    with pytest.raises(UserError, match="is a text model; give prompts as conditions"):
        Model.diffusers(text_to_image).config()
    texts = Model.diffusers(text_to_image, conditions=["ab", "ba"])
    assert texts.config().conditioning.options == {"prompts": ["ab", "ba"]}


def test_a_yaml_keeps_what_else_a_configuration_says() -> None:
    """Pairs and resources of a file stay; a bare model is enough."""
    Path("bare.yaml").write_text("model: {name: zoo, options: {weights: digits_fm_ot}}\npairs: {train: 16}\n")
    model = Model.from_yaml("bare.yaml")
    assert model.name == "bare"
    assert model.config().pairs.train == 16
    assert yaml.safe_load(model.to_yaml())["pairs"] == {"train": 16}
    Path("none.yaml").write_text("nfe: [8]\n")
    with pytest.raises(UserError, match=r"none.yaml has no model"):
        Model.from_yaml("none.yaml")


def test_a_model_of_this_process_has_no_yaml() -> None:
    """The error names the way to a file."""
    with pytest.raises(UserError, match=r"lives only in this process.*Model\.from_file"):
        Model(gaussian, (2,)).to_yaml()


def test_the_identity_of_a_live_network_is_text_and_travels_with_it() -> None:
    """JSON sees the text; a pickle brings the network, with the code of modules that only this process has."""
    live = Live.of(Net(), "abc", "net")
    assert json.loads(canonical_json({"network": live})) == {"network": "abc"}
    back = pickle.loads(pickle.dumps(live))
    assert (str(back), back.shown) == ("abc", "net")
    torch.testing.assert_close(back.network.layers[0].weight, live.network.layers[0].weight)
    assert copy.deepcopy(live) is live
    with pytest.raises(UserError, match="net lives in this process only, and cannot be sent to hosts"):
        pickle.dumps(Live.of(lambda x, t: lock, "abc", "net"))


lock = threading.Lock()
