"""Checkpoints as people have them: the part that fits is proposed as YAML, and is loaded without running their code."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import adapter_examples
import averaged_networks
import numpy as np
import pytest
import torch
import yaml
from averaged_networks import EMA, Net, Plain, Settings, ShadowEMA, Wrapped
from safetensors.torch import save_file
from torch import Tensor, nn

from orchestrator.errors import ConfigError
from orchestrator.models._checkpoints import Part, read
from orchestrator.models._weights import build_loaded
from orchestrator.models.torch_module import TorchModule

OPTIONS: dict[str, Any] = {
    "path": str(Path(averaged_networks.__file__).parent),
    "shape": list(averaged_networks.SHAPE),
    "prediction": "velocity",
    "native_scheduler": "cond_ot",
}
NET = OPTIONS | {"factory": "averaged_networks:Net"}
PLAIN = OPTIONS | {"factory": "averaged_networks:Plain"}


def build(options: dict[str, Any], **changes: Any) -> Any:
    """Build the adapter after its configuration check."""
    return adapter_examples.build("torch_module", options | changes)


def trained(seed: int, kind: Callable[[], nn.Module] = Net) -> nn.Module:
    """A network of random weights and running statistics."""
    torch.manual_seed(seed)
    net = kind()
    for value in net.buffers():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    return net


def without_dots(net: nn.Module) -> nn.Module:
    """The average of latent diffusion (LitEma): buffers named like the parameters, without dots."""
    average = nn.Module()
    for name, value in net.named_parameters():
        average.register_buffer(name.replace(".", ""), value.detach().clone())
    return average


def parallel(net: nn.Module) -> dict[str, Tensor]:
    """As networks of parallel training name their weights."""
    return {f"module.{name}": value for name, value in net.state_dict().items()}


class File(NamedTuple):
    """What a library saves.

    Attributes:
        content: What is given to ``torch.save``, of the network in training and of its average.
        proposed: The options that the error proposes first.
        averaged: Which entries the proposed part takes from the average: all, parameters, or none.
        kind: The network.
    """

    content: Callable[[Any, Any], Any]
    proposed: dict[str, Any]
    averaged: str = "none"
    kind: Callable[[], nn.Module] = Net


def lightning(net: Any, average: Any) -> Any:
    """A checkpoint of Lightning: the module's parts, settings of classes of their own, callbacks, loops."""
    module = nn.ModuleDict({"net": net, "loss": nn.Linear(2, 2)})
    optimizer = torch.optim.Adam(module.parameters())
    sum(p.sum() for p in module.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    counts: Any = collections.defaultdict(list)
    counts["epoch"].append(3)
    return {
        "epoch": 4,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": module.state_dict(),
        "callbacks": {"ModelCheckpoint": {"best_model_path": Path("x.ckpt"), "best_model_score": np.float64(0.3)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"counts": counts, "mode": Mode.least}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": Settings(width=8), "args": argparse.Namespace(lr=1e-3, table=np.arange(3))},
    }


class Mode(enum.Enum):
    """A setting of a class that torch does not know."""

    least = "min"


FILES: dict[str, File] = {
    "a nested state dictionary": File(
        lambda net, average: {"model": net.state_dict(), "step": 3}, {"weights_key": "model"}
    ),
    "parallel training": File(lambda net, average: parallel(net), {"weights_prefix": "module."}),
    "a compiled network in parallel training": File(
        lambda net, average: {
            "net": {f"module._orig_mod.{k}": v for k, v in net.state_dict().items()},
            "args": Settings(),
        },
        {"weights_key": "net", "weights_prefix": "module._orig_mod."},
    ),
    "Lightning": File(lightning, {"weights_key": "state_dict", "weights_prefix": "net."}),
    "ema-pytorch": File(
        lambda net, average: {
            "step": 3,
            "model": Wrapped(net).state_dict(),
            "ema": EMA(Wrapped(net), Wrapped(average)).state_dict(),
            "version": "1.0",
        },
        {"weights_key": "ema", "weights_prefix": "ema_model.model."},
        "all",
    ),
    "score_sde": File(
        lambda net, average: {
            "optimizer": torch.optim.Adam(net.parameters()).state_dict(),
            "model": parallel(net),
            "ema": ShadowEMA(average.parameters(), trained_only=True).state_dict(),
            "step": 3,
        },
        {"weights_key": ["model", "ema.shadow_params"], "weights_prefix": ["module.", ""]},
        "trained",
    ),
    "torch_ema": File(
        lambda net, average: {"net": net.state_dict(), "ema": ShadowEMA(average.parameters()).state_dict()},
        {"weights_key": ["net", "ema.shadow_params"]},
        "parameters",
    ),
    "diffusers' EMAModel alone": File(
        lambda net, average: ShadowEMA(average.parameters()).state_dict(),
        {"weights_key": "shadow_params"},
        "all",
        Plain,
    ),
    "latent diffusion": File(
        lambda net, average: {
            "state_dict": nn.ModuleDict({"model": net, "model_ema": without_dots(average)}).state_dict(),
            "global_step": 3,
        },
        {"weights_key": "state_dict", "weights_prefix": ["model.", "model_ema."]},
        "parameters",
    ),
    "torch's AveragedModel": File(
        lambda net, average: {"swa": torch.optim.swa_utils.AveragedModel(average).state_dict()},
        {"weights_key": "swa", "weights_prefix": "module."},
        "all",
    ),
    "k-diffusion": File(
        lambda net, average: {"config": {"sizes": [8]}, "model": net.state_dict(), "model_ema": average.state_dict()},
        {"weights_key": "model_ema"},
        "all",
    ),
    "names with dots in the keys": File(
        lambda net, average: {"runs/a.b": {"last.ema": average.state_dict()}},
        {"weights_key": "runs/a.b.last.ema"},
        "all",
    ),
}


def expected(file: File, net: nn.Module, average: nn.Module) -> dict[str, Tensor]:
    """The weights that a file's proposed part holds."""
    weights = net.state_dict()
    if file.averaged == "all":
        return average.state_dict()
    for name, value in average.named_parameters():
        if file.averaged == "parameters" or (file.averaged == "trained" and value.requires_grad):
            weights[name] = value.detach()
    return weights


def proposal(error: str) -> dict[str, Any]:
    """The first YAML in an error message."""
    lines = error.partition("add beside weights")[2].partition("\nor,")[0]
    options: dict[str, Any] = yaml.safe_load(lines)
    return options


def refusal(options: dict[str, Any], **changes: Any) -> str:
    """The error of the configuration check."""
    with pytest.raises(ConfigError) as caught:
        TorchModule.check(options | changes)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_the_part_that_fits_is_proposed_and_loaded(name: str, form: str, tmp_path: Path) -> None:
    """The file is refused with the very YAML to add, and with it the network has the file's weights."""
    file = FILES[name]
    net, average = trained(1, file.kind), trained(2, file.kind)
    path = tmp_path / "last.ckpt"
    torch.save(file.content(net, average), path, _use_new_zipfile_serialization=form == "zip")
    options = NET if file.kind is Net else PLAIN
    assert proposal(refusal(options, weights=str(path))) == file.proposed
    loaded = build(options, weights=str(path), **file.proposed).net.state_dict()
    wanted = expected(file, net, average)
    assert wanted.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], value) for key, value in wanted.items())


def test_all_parts_that_fit_are_proposed_averages_first(tmp_path: Path) -> None:
    """The user may want the weights without averaging."""
    path = tmp_path / "net.pt"
    torch.save({"model": parallel(trained(1)), "model_ema": trained(2).state_dict()}, path)
    assert refusal(NET, weights=str(path)).endswith(
        "add beside weights\n  weights_key: model_ema\nor, which fits as well:\n  weights_key: model\n"
        "  weights_prefix: module."
    )


def test_nothing_that_fits_names_the_nearest_part_and_what_it_lacks(tmp_path: Path) -> None:
    """All names as missing would say nothing."""
    path = tmp_path / "net.pt"
    weights = {name: value for name, value in parallel(trained(1)).items() if name != "module.outward.bias"}
    torch.save({"model": weights}, path)
    assert refusal(NET, weights=str(path)).endswith(
        "nothing in it fits completely; nearest comes\n  weights_key: model\n  weights_prefix: module.\n"
        "with missing: outward.bias"
    )


def test_another_part_changes_the_digest_and_the_default_does_not(tmp_path: Path) -> None:
    """The digest covers the bytes of the file and the options that choose the part."""
    path = tmp_path / "net.pt"
    torch.save({"a": trained(1).state_dict(), "b": trained(2).state_dict()}, path)
    first, second = (build(NET, weights=str(path), weights_key=key).digest for key in "ab")
    assert first != second
    torch.save(trained(1).state_dict(), path)
    plain = TorchModule(**NET, weights=str(path))
    options = next(iter(plain.identity()))
    assert not {"weights_key", "weights_prefix", "trust_pickle", "path"} & set(options)


# ---- objects that are not tensors ---------------------------------------------------------------------------------


def test_settings_beside_the_weights_are_not_run(tmp_path: Path) -> None:
    """The class of the settings would raise if it were loaded; their place is held by an object without content."""
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": trained(1).state_dict(), "config": Settings(width=8)}, path)
    content = read(path)
    assert content["config"].origin == "averaged_networks.Settings"
    assert not vars(content["config"])
    assert build(NET, weights=str(path), weights_key="state_dict").net.training is False


def test_an_object_within_the_weights_is_refused_by_name(tmp_path: Path) -> None:
    """Only the addressed part must be tensors."""
    path = tmp_path / "net.pt"
    torch.save(trained(1).state_dict() | {"config": Settings()}, path)
    assert "beside tensors it holds config (a pickled averaged_networks.Settings)" in refusal(NET, weights=str(path))


class System:
    """A pickle that starts a program."""

    def __reduce__(self) -> Any:
        import os

        return os.system, ("touch ran",)


def test_functions_of_the_system_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not even replaced, since only an attack refers to them."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pt"
    torch.save({"state_dict": trained(1).state_dict(), "x": System()}, path)
    message = refusal(NET, weights=str(path), weights_key="state_dict")
    assert "is not loaded, because unpickling it could run code; it refers to posix.system" in message
    assert not (tmp_path / "ran").exists()


# ---- whole pickled modules ----------------------------------------------------------------------------------------


def test_a_whole_pickled_module_is_loaded_only_if_it_is_trusted(tmp_path: Path) -> None:
    """The refusal names its class and the option; with a factory its weights are taken, and else the module itself."""
    net = trained(1)
    path = tmp_path / "net.pt"
    torch.save(net, path)
    message = refusal(NET, weights=str(path))
    assert "is not a state dictionary but a pickled averaged_networks.Net" in message
    assert "whole pickled modules are loaded with trust_pickle: true" in message
    x, t = torch.rand(4, 1, 2, 3), torch.tensor(0.5, dtype=torch.float64)
    wanted = net.eval()(x, torch.full((4,), 0.5))
    labels = torch.zeros(4, dtype=torch.int64)
    digests = set()
    for options in (NET, OPTIONS):
        model = build(options, weights=str(path), trust_pickle=True)
        torch.testing.assert_close(model.predict(x, t, labels), wanted, rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in model.net.parameters())
        digests.add(model.digest)
    assert len(digests) == 2


def test_a_module_in_a_dictionary_is_named_by_its_key(tmp_path: Path) -> None:
    """Some trainers pickle the averaged module beside its settings; one for parallel training holds it as `module`."""
    net = trained(1)
    path = tmp_path / "net.pt"
    torch.save({"ema": nn.DataParallel(net), "epoch": 3}, path)
    assert "holds a mapping with ema, epoch instead of a module" in refusal(
        OPTIONS, weights=str(path), trust_pickle=True
    )
    trusted = {"weights": str(path), "trust_pickle": True}
    chosen = trusted | {"weights_key": "ema", "weights_prefix": "module."}
    for options in (OPTIONS, NET):
        loaded = build(options, **chosen).net
        assert type(loaded) is Net
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert proposal(refusal(NET, **trusted)) == {"weights_key": "ema", "weights_prefix": "module."}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": None}, r"factory is missing, the class or function that returns the module, as 'package\.module"),
        ({"trust_pickle": True}, r"trust_pickle has no effect without a pickle in weights; leave it out"),
        ({"trust_pickle": "yes"}, r"trust_pickle must be true or false, got 'yes'"),
        ({"weights_key": "a"}, r"weights_key has no effect without weights; set weights, or leave weights_key out"),
        ({"weights_prefix": 3}, r"weights_prefix must be a text or a list of texts, got 3"),
        ({"path": 3}, r"path must be a folder or a list of folders, got 3"),
    ],
)
def test_options_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    """Before a file is read."""
    with pytest.raises(ConfigError, match=message):
        TorchModule.check(NET | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights_key": "model.net"},
            r"weights_key='model\.net' is not in .*: its 'model' holds a mapping wi",
        ),
        ({"weights_key": "x"}, r"weights_key='x' is not in .*: it holds a mapping with model, ema; add beside"),
        (
            {"weights_key": "model", "weights_prefix": "net."},
            r"no name in 'model' of .* starts with 'net\.'; it holds fre",
        ),
        (
            {"weights_key": "ema", "weights_prefix": "net."},
            r"weights_prefix='net\.' has no effect on 'ema' of .*, a",
        ),
        (
            {"weights_key": "ema"},
            r"'ema' of .* is a list of 2 tensors, but Net has 13 parameters; add ",
        ),
        ({"weights_key": ["model", "ema"], "weights_prefix": ["", "", ""]}, r"weights_prefix needs an entry for each "),
    ],
)
def test_a_part_that_is_not_there_is_refused_with_what_is(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The message names what the last container holds."""
    path = tmp_path / "net.pt"
    torch.save({"model": trained(1).state_dict(), "ema": [torch.zeros(2), torch.zeros(3)]}, path)
    with pytest.raises(ConfigError, match=message):
        TorchModule.check(NET | {"weights": str(path)} | options)


def test_a_list_in_another_order_is_refused(tmp_path: Path) -> None:
    """Shapes are all that a list can be checked by."""
    path = tmp_path / "net.pt"
    torch.save({"ema": list(reversed(list(trained(1, Plain).state_dict().values())))}, path)
    message = refusal(PLAIN, weights=str(path), weights_key="ema")
    assert "not in the order of Plain.parameters(): instead of first.weight (5, 7) it holds (6,)" in message


# ---- files of other kinds -----------------------------------------------------------------------------------------


def _pickled(value: Any, protocol: int) -> bytes:
    stream = io.BytesIO()
    pickle.dump(value, stream, protocol=protocol)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_pickled(Settings(a=1), 2), "it refers to averaged_networks.Settings"),
        (_pickled(Settings(a=1), 4), "it refers to averaged_networks.Settings"),
        (_pickled(argparse.Namespace(a=1), 5), "it refers to argparse.Namespace"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS; fetch it with 'git lfs pull'",
        ),
        (b"<!DOCTYPE html><html>", "is damaged or not a file of torch.save"),
        (b"", "is damaged or not a file of torch.save"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    """Before hosts start."""
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    assert message in refusal(NET, weights=str(path))


def test_torchscript_among_weights_names_its_adapter(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.trace(trained(1).eval(), (torch.zeros(2, 1, 2, 3), torch.zeros(2))), path)
    assert "is TorchScript, code and weights in one; load it with the adapter 'torchscript'" in refusal(
        NET, weights=str(path)
    )


def test_a_prefix_chooses_among_the_names_of_safetensors(tmp_path: Path) -> None:
    """They have no containers, so a key is refused."""
    path = tmp_path / "net.safetensors"
    save_file({f"net.{name}": value for name, value in trained(1).state_dict().items()}, path)
    assert proposal(refusal(NET, weights=str(path))) == {"weights_prefix": "net."}
    assert proposal(refusal(NET, weights=str(path), weights_key="net")) == {"weights_prefix": "net."}
    loaded = build(NET, weights=str(path), weights_prefix="net.").net
    assert torch.equal(loaded.inward.weight, trained(1).state_dict()["inward.weight"])


# ---- memory -------------------------------------------------------------------------------------------------------


def test_a_table_that_the_file_lacks_keeps_the_constructors_values(tmp_path: Path) -> None:
    """A module without storage has no such values, so its constructor runs in full."""
    net: Any = trained(1, lambda: Net(table=True))
    net.table.copy_(Net(table=True).table)
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    loaded = build(NET, weights=str(path), kwargs={"table": True}).net
    assert torch.equal(loaded.table, net.table)
    assert torch.equal(loaded.inward.weight, net.inward.weight)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """They are one tensor in the file's module as well."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

    path = tmp_path / "net.pt"
    source = Twins()
    torch.save(source.state_dict(), path)
    loaded: Any = build_loaded(Twins, path, [Part()], "cpu")
    assert loaded.first.weight is loaded.second.weight
    assert torch.equal(loaded.first.weight, source.first.weight)


def test_weights_take_the_modules_dtype(tmp_path: Path) -> None:
    """A file in half precision does not make the network one."""
    path = tmp_path / "net.pt"
    weights = {name: v.half() if v.is_floating_point() else v for name, v in trained(1).state_dict().items()}
    torch.save(weights, path)
    loaded = build(NET, weights=str(path)).net
    assert loaded.inward.weight.dtype == torch.float32
    assert torch.equal(loaded.inward.weight, weights["inward.weight"].float())


def test_a_network_that_is_saved_completely_is_built_without_memory(tmp_path: Path) -> None:
    """Its memory is allocated once, on the device; a method `to` of its own moves it from the CPU."""

    class Light(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.built_on = torch.empty(0).device.type

    class Moved(Light):
        def to(self, device: Any) -> Moved:  # type: ignore[override]
            return super().to(device)

    class Remembered(Light):
        def __init__(self) -> None:
            super().__init__()
            self.tables = {"a": [torch.zeros(2)]}

    path = tmp_path / "net.pt"
    torch.save(Light().state_dict(), path)
    devices = {}
    for kind in (Light, Moved, Remembered):
        net: Any = build_loaded(kind, path, [Part()], "meta")
        devices[kind] = (net.built_on, net.layer.weight.device.type)
    assert devices == {Light: ("meta", "meta"), Moved: ("meta", "cpu"), Remembered: ("cpu", "cpu")}
