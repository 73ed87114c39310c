"""``edm``: a network with EDM's interface gives EDM's own samples; pickles are opened only with permission."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import own_networks
import pytest
import torch
from adapter_examples import HERE, KWARGS, write_pickle
from proofs import GUIDANCE, LABELS, noise
from safetensors.torch import load_file, save_file

from orchestrator import plugins
from orchestrator.errors import ConfigError
from orchestrator.models.edm import EDMNetwork, export_safetensors

FACTORY = {"factory": "own_networks:Denoiser", "path": str(HERE)}


def build(file: Path, **options: Any) -> EDMNetwork:
    """Build the adapter after its configuration check."""
    all_options = {"file": str(file)} | options
    EDMNetwork.check(all_options)
    model: EDMNetwork = plugins.build("models", "edm", all_options)
    return model


@pytest.fixture
def model(tmp_path: Path) -> EDMNetwork:
    return build(write_pickle(tmp_path), trust_pickle=True)


# ---- agreement with the published sampler ---------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.4, 0.99])
def test_the_velocity_is_the_papers_slope(model: EDMNetwork, t: float) -> None:
    """dx/dsigma = (x - D) / sigma (eq. 3 and 4 at s = 1), times dsigma/dt = -80; the input is not rescaled."""
    sigma, x = 80 * (1 - t), 3 * noise(model.shape)
    one_hot = torch.eye(own_networks.CLASSES)[LABELS]
    with torch.no_grad():
        denoised = own_networks.Denoiser(**KWARGS)(x.float(), torch.full((4,), sigma), one_hot).double()
    velocity = model.field(LABELS, 1.0)(x, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(velocity, -80 * (x - denoised) / sigma, rtol=1e-5, atol=1e-4)


def test_a_dropped_label_is_all_zeros(model: EDMNetwork) -> None:
    """The published networks were trained with this null label."""
    x, t = noise(model.shape), torch.tensor(0.9, dtype=torch.float64)
    with torch.no_grad():
        expected = own_networks.Denoiser(**KWARGS)(x.float(), torch.full((4,), 8.0), torch.zeros(4, 3)).double()
    torch.testing.assert_close(model.predict(x, t, model.null_condition(LABELS)), expected, rtol=1e-5, atol=1e-6)


def test_a_network_without_labels_ignores_conditioning_and_rejects_guidance(tmp_path: Path) -> None:
    """With label_dim 0 the conditioning has no effect, and guidance is rejected because it would have none either."""
    network = own_networks.Denoiser(2, 3)
    model = build(write_pickle(tmp_path, network), trust_pickle=True)
    x, t = noise(model.shape), torch.tensor(0.9, dtype=torch.float64)
    with torch.no_grad():
        expected = network(x.float(), torch.full((4,), 8.0)).double()
    torch.testing.assert_close(model.predict(x, t, LABELS + 100), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ConfigError, match=r"guidance scale 2\.5 needs a label for the dropped condition, but network-s"
    ):
        model.field(LABELS, GUIDANCE)


# ---- facts of the model -------------------------------------------------------------------------------------------


def test_the_facts_are_read_from_the_network(model: EDMNetwork) -> None:
    """Shape and classes; the noise levels are the published sampler's if the network supports them all."""
    assert (model.shape, model.classes, model.prediction, model.scheduler.name) == ((3, 2, 2), 3, "sample", "edm")
    assert (model.native.sigma(0.0), model.native.sigma(model.native.t_max)) == (80, pytest.approx(0.002))


def test_default_noise_levels_are_limited_to_the_networks_range(tmp_path: Path) -> None:
    """The published sampler limits them in the same way."""
    network = own_networks.Denoiser(**KWARGS)
    network.sigma_min, network.sigma_max = 0.02, 50.0
    native = build(write_pickle(tmp_path, network), trust_pickle=True).native
    assert (native.sigma(0.0), native.sigma(native.t_max)) == (50, pytest.approx(0.02))


def test_explicit_noise_levels_beyond_the_networks_range_are_rejected(tmp_path: Path) -> None:
    """Only the default levels are limited; levels set explicitly raise an error."""
    network = own_networks.Denoiser(**KWARGS)
    network.sigma_max = 50.0
    model = build(write_pickle(tmp_path, network), trust_pickle=True, sigma_max=80)
    with pytest.raises(
        ConfigError, match=r"noise levels from 0\.002 to 80 are not within the range of .*, 0 to 50; cor"
    ):
        _ = model.native


def test_a_network_that_rounds_noise_levels_is_rejected(tmp_path: Path) -> None:
    """Its velocity is discontinuous in time."""
    model = build(write_pickle(tmp_path, own_networks.TableDenoiser(**KWARGS)), trust_pickle=True)
    with pytest.raises(ConfigError, match=r"TableDenoiser rounds noise levels to a table, so its velocity jumps in ti"):
        model.to("cpu")


def test_a_network_with_another_interface_is_rejected(tmp_path: Path) -> None:
    """The message names the adapter 'torch_module', whose options describe any network."""
    model = build(write_pickle(tmp_path, own_networks.Flow()), trust_pickle=True)
    with pytest.raises(
        ConfigError, match=r"Flow does not have the interface of EDM networks: img_resolution, .*'torch_"
    ):
        model.to("cpu")


# ---- pickles ------------------------------------------------------------------------------------------------------


class Bomb:
    """An object whose pickle runs code."""

    def __reduce__(self) -> Any:
        return print, ("boom",)


def test_a_pickle_is_not_opened_without_trust_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error gives the reason and the two alternatives."""
    path = write_pickle(tmp_path, Bomb())
    with pytest.raises(ConfigError, match=r"is a pickle, and opening it can run arbitrary code; set trust_pickle: tr"):
        build(path)
    assert "boom" not in capsys.readouterr().out


@pytest.mark.parametrize("trust", [1, "yes"])
def test_trust_pickle_must_be_true(tmp_path: Path, trust: Any) -> None:
    """Only True counts, not other truthy values."""
    with pytest.raises(ConfigError, match="can run arbitrary code; set trust_pickle: true"):
        build(write_pickle(tmp_path), trust_pickle=trust)


@pytest.mark.parametrize(
    ("network", "key", "message"),
    [
        (None, "model", r"must be a pickled dictionary with the network as 'ema', got the keys model, loss_fn, datase"),
        ([1], "ema", r"'ema' of .* is not a torch module but list"),
    ],
)
def test_a_pickle_with_other_content_is_rejected(tmp_path: Path, network: Any, key: str, message: str) -> None:
    """The message says what the file contains."""
    with pytest.raises(ConfigError, match=message):
        build(write_pickle(tmp_path, network, key=key), trust_pickle=True).to("cpu")


def test_a_pickle_that_needs_its_repository_asks_for_the_path(tmp_path: Path) -> None:
    """The published pickles import torch_utils and dnnlib."""
    path = tmp_path / "published.pkl"
    path.write_bytes(b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n.")
    with pytest.raises(ConfigError, match=r"No module named 'torch_utils'; set path to the folder of the repository"):
        build(path, trust_pickle=True).to("cpu")


def test_a_pickle_imports_its_repository_from_the_path_option(tmp_path: Path) -> None:
    """Its module can be imported only from the folder in the option."""
    (tmp_path / "edm_repository").mkdir()
    (tmp_path / "edm_repository" / "edm_networks.py").write_text(
        "from own_networks import Denoiser\n\n\ndef remade():\n    return Denoiser(2, 3, 3)\n", encoding="utf-8"
    )
    path = tmp_path / "published.pkl"
    path.write_bytes(b"(dS'ema'\ncedm_networks\nremade\n(tRs.")
    assert build(path, trust_pickle=True, path=str(tmp_path / "edm_repository")).shape == (3, 2, 2)


# ---- safetensors --------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The network exported once as safetensors."""
    network = own_networks.Denoiser(**KWARGS)
    return export_safetensors(network, tmp_path / "edm.safetensors", FACTORY["factory"], KWARGS, FACTORY["path"])


def test_an_exported_network_has_the_same_velocity(model: EDMNetwork, exported: Path) -> None:
    """Bit for bit, and without a pickle."""
    x, t = noise(model.shape), torch.tensor(0.7, dtype=torch.float64)
    copy = build(exported, **FACTORY)
    assert torch.equal(copy.field(LABELS, GUIDANCE)(x, t), model.field(LABELS, GUIDANCE)(x, t))


def test_recorded_init_kwargs_are_used_by_the_export(tmp_path: Path) -> None:
    """The published code records init_kwargs, so kwargs need not be passed."""
    network = own_networks.Denoiser(**KWARGS)
    network.init_kwargs = KWARGS
    path = export_safetensors(network, tmp_path / "edm.safetensors", FACTORY["factory"], path=FACTORY["path"])
    assert build(path, **FACTORY).shape == (3, 2, 2)


def test_the_factory_must_be_set_by_the_user(exported: Path) -> None:
    """A file from elsewhere could name any function, so the user must name the class."""
    with pytest.raises(ConfigError, match=r"names the factory 'own_networks:Denoiser'; set factory to the class that"):
        build(exported)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_pickle": True}, r"trust_pickle has no effect on safetensors, which run no code; leave it out"),
        (FACTORY | {"factory": "own_networks:Flow"}, r"own_networks:Flow with kwargs .* fails: TypeError"),
        (FACTORY | {"sigma_min": 0}, r"sigma_min must be a positive number, got 0"),
        (FACTORY | {"data_range": None}, r"data_range must be a positive number, got None"),
        (FACTORY | {"sigma": 1}, r"has no option 'sigma' \(did you mean 'sigma_min'\?\)"),
    ],
)
def test_invalid_options_are_rejected_by_the_check(exported: Path, options: dict[str, Any], message: str) -> None:
    """They are rejected before any actor starts."""
    with pytest.raises(ConfigError, match=message):
        build(exported, **options)


def test_a_factory_for_a_pickle_is_rejected(tmp_path: Path) -> None:
    """The factory would have no effect."""
    with pytest.raises(ConfigError, match="factory has no effect on a pickle, which names its own class; leave it out"):
        build(write_pickle(tmp_path), trust_pickle=True, **FACTORY)


def test_weights_that_do_not_fit_are_rejected_by_name(exported: Path) -> None:
    """The check reads only the file's header, before anything starts."""
    from safetensors import safe_open

    with safe_open(exported, framework="pt") as file:
        metadata = file.metadata()
    weights = {name: value for name, value in load_file(exported).items() if name != "core.label"}
    save_file(weights, exported, metadata=metadata)
    with pytest.raises(ConfigError, match=r"do not fit Denoiser: missing: core\.label; set kwargs to the factory"):
        build(exported, **FACTORY)


def test_safetensors_with_other_content_are_rejected(tmp_path: Path) -> None:
    """The message names the function that writes suitable files."""
    save_file({"weight": torch.zeros(2)}, tmp_path / "net.safetensors")
    with pytest.raises(ConfigError, match=r"does not describe how to build its network \('bespoke_edm'\); write it w"):
        build(tmp_path / "net.safetensors", **FACTORY)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (KWARGS | {"sigma_data": 0.6}, r"and the same weights gives other outputs than the network; pass the arg"),
        (KWARGS | {"img_resolution": 4}, r"do not fit own_networks:Denoiser .*: wrong shape: core\.inward"),
        (KWARGS | {"depth": 4}, r"own_networks:Denoiser with kwargs .* fails: TypeError"),
        (None, r"Denoiser does not record the arguments it was built with; pass them as kwargs"),
    ],
)
def test_an_export_that_differs_from_the_network_is_not_written(tmp_path: Path, kwargs: Any, message: str) -> None:
    """The copy is built and compared before the file is written."""
    network, path = own_networks.Denoiser(**KWARGS), tmp_path / "edm.safetensors"
    with pytest.raises(ConfigError, match=message):
        export_safetensors(network, path, FACTORY["factory"], kwargs, FACTORY["path"])
    assert not path.exists()
