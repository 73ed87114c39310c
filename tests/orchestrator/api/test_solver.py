"""A solver samples as its numbers say, wherever it has been: in memory, in a file, as exported code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_model import Net, gaussian
from torch import Tensor

from orchestrator import Model, Solver, distil, load_theta
from orchestrator.errors import UserError
from orchestrator.models.zoo import ZooModel
from solvers.families import GridSolver
from solvers.families.euler import Euler
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid
from solvers.ns import InvalidThetaError
from solvers.schedulers import CondOT
from solvers.theta import ThetaArtifact


def fixed(model: Model, family: Any = None, nfe: int = 8, **provenance: Any) -> Solver:
    """A fixed solver as a theta of the model."""
    solver = GridSolver(family or Midpoint(), nfe, Grid()).to_ns(CondOT())
    return Solver(ThetaArtifact(solver, family="midpoint", model_digest=model.digest, **provenance), model)


def exported(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Solver:
    """A theta for a function, by the whole of :func:`distil`."""
    storage = tmp_path_factory.mktemp("distilled")
    return distil(Model(mixture, (2,), data_range=3), 4, budget=60_000, storage=storage)


MEANS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])


def mixture(x: Tensor, t: Tensor) -> Tensor:
    """The flow from noise to three clusters in the plane."""
    t = t[:, None]
    variance = (1 - t) ** 2 + 0.04 * t**2
    distance = x[:, None] - t[:, :, None] * MEANS
    weight = torch.softmax(-(distance**2).sum(-1) / (2 * variance), dim=1)
    each = MEANS + ((0.04 * t - (1 - t)) / variance)[:, :, None] * distance
    return (weight[:, :, None] * each).sum(1)


def test_a_distilled_solver_samples_the_same_from_memory_a_file_and_exported_code(
    distilled: Solver, tmp_path: Path
) -> None:
    """From JSON and from safetensors to the bit; as a Python file of its own to 1e-6."""
    x0 = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    samples = distilled.sample(n=6, x0=x0)
    for name in ("theta.json", "theta.safetensors"):
        loaded = load_theta(distilled.save(tmp_path / name), distilled.model)
        torch.testing.assert_close(loaded.sample(n=6, x0=x0), samples, rtol=0, atol=0)
        assert loaded.psnr_db == distilled.psnr_db
    (file,) = distilled.export("python", tmp_path / "sampler.py")
    outside = exported(file).sample(lambda x, t: mixture(x, torch.full((len(x),), t)), x0)
    torch.testing.assert_close(outside, samples, rtol=0, atol=1e-6)


def test_a_distilled_solver_says_how_good_it_is_and_what_it_cost(distilled: Solver) -> None:
    """Its PSNR and that of the best fixed solver, the bill within the budget, and pictures."""
    assert distilled.distilled is not None
    assert distilled.bill is not None
    cost = distilled.bill.total().cost
    assert cost is not None
    assert 0 < cost.evaluations <= 1.05 * 60_000
    assert distilled.gain_db is not None
    rows = distilled.comparison.psnr_db
    assert rows["theta"] == distilled.psnr_db
    assert distilled.gain_db == pytest.approx(rows["theta"] - min(v for k, v in rows.items() if "best fixed" in k))
    assert "NFE 4" in repr(distilled)
    assert f"{cost.evaluations:,} velocity evaluations" in repr(distilled)
    assert distilled._repr_html_().count("<img") == 1
    with pytest.raises(ValueError, match=r"numbers only; solver\.compare"):
        distilled.comparison.plot()


def test_a_call_that_was_made_before_returns_what_it_made(
    distilled: Solver, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal settings on an equal model: theta is the same, from what the storage has."""
    again = distil(Model(mixture, (2,), data_range=3), 4, budget=60_000, storage=distilled.storage)
    assert again.theta.digest == distilled.theta.digest
    assert "ground-truth pairs" not in capsys.readouterr().err


def test_a_comparison_ranks_solvers_on_unseen_pairs() -> None:
    """Midpoint beats Euler on a smooth flow; the pictures show both."""
    model = Model(gaussian, (2,), data_range=3)
    solver = fixed(model)
    comparison = solver.compare(against=["euler", fixed(model, Euler())], n=16)
    assert next(iter(comparison.psnr_db)) == "theta"
    assert comparison.psnr_db["Euler"] == pytest.approx(comparison.psnr_db["theta 3"])
    assert all(row.stderr_db is not None for row in comparison.rows)
    assert comparison.plot()._repr_png_().startswith(b"\x89PNG")
    assert "<img" in comparison._repr_html_()
    assert "gaussian, PSNR on 16 unseen pairs" in repr(comparison)
    with pytest.raises(UserError, match="midpoint does not exist at NFE 3"):
        fixed(model, Euler(), 3).compare(against=["midpoint"])
    assert "Midpoint" not in fixed(model, Euler(), 3).compare(n=4).psnr_db


def test_conditions_are_labels_arrays_or_drawn() -> None:
    """A label for all, one per sample, rows of arrays; too few are refused."""
    net = Net().eval()
    solver = fixed(Model(net, (2,), classes=4, null_label=3))
    one, each = solver.sample(n=3, conditions=2), solver.sample(n=3, conditions=[2, 2, 2])
    torch.testing.assert_close(one, each)
    assert not torch.equal(solver.sample(n=3, conditions=torch.tensor([0, 1, 2])), one)
    assert not torch.equal(solver.sample(n=3, seed=1), solver.sample(n=3))
    with pytest.raises(UserError, match="there are 2 conditions for 3 samples"):
        solver.sample(n=3, conditions=[0, 1])
    with pytest.raises(UserError, match="label 7 is not one of"):
        solver.sample(n=3, conditions=7)
    with pytest.raises(UserError, match=r"x0 must have shape \(3, 2\), got \(2, 2\)"):
        solver.sample(n=3, x0=torch.zeros(2, 2))

    def towards(x: Tensor, t: Tensor, target: Tensor) -> Tensor:
        return target - x

    targets = torch.arange(1.0, 9.0).view(4, 2)
    chasing = fixed(Model(towards, (2,), conditions={"target": targets}), nfe=8)
    shares = chasing.sample(n=4, x0=torch.zeros(4, 2), conditions={"target": targets}) / targets
    torch.testing.assert_close(shares, shares[:1, :1].expand(4, 2))
    assert 0.5 < float(shares.mean()) < 0.8  # 1 - 1/e in the limit
    many = {"target": torch.randn(40, 2)}
    assert fixed(Model(towards, (2,), conditions=many)).sample(n=3).shape == (3, 2)


def test_the_modules_of_a_sampled_model_stay_in_training() -> None:
    """Sampling freezes them only while it lasts; dropout is off then."""
    net = Net()
    solver = fixed(Model(net, (2,), classes=4, null_label=3))
    torch.testing.assert_close(solver.sample(n=3), solver.sample(n=3), rtol=0, atol=0)
    assert net.training
    assert all(weight.requires_grad for weight in net.parameters())


def test_a_theta_of_another_model_is_refused() -> None:
    """Also if the model was trained on since; ``allow_transfer`` accepts it."""
    net = Net()
    model = Model(net, (2,), classes=4, null_label=3)
    solver = fixed(model)
    solver.save("theta.json")
    with torch.no_grad():
        net.layers[0].weight.add_(0.1)
    with pytest.raises(InvalidThetaError, match="was made for model"):
        solver.sample(n=2)
    with pytest.raises(InvalidThetaError, match="was made for model"):
        load_theta("theta.json", model)
    assert solver.sample(n=2, allow_transfer=True).shape == (2, 2)


def test_a_theta_from_a_file_needs_its_model_to_sample() -> None:
    """The error says how to give it; numbers that a file does not hold are missing, too."""
    solver = fixed(Model(gaussian, (2,)), guidance_scale=1.0)
    loaded = load_theta(solver.save("theta.json"))
    assert (loaded.psnr_db, loaded.gain_db, loaded.bill) == (None, None, None)
    with pytest.raises(UserError, match=r"give the model, as in solver\.sample"):
        loaded.sample(n=2)
    torch.testing.assert_close(loaded.sample(solver.model, n=2), solver.sample(n=2))
    with pytest.raises(UserError, match=r"holds no comparison; measure one with compare\(model\)"):
        _ = loaded.comparison
    assert repr(loaded) == "Solver(a file: NFE 8, family midpoint)"
    assert "<img" in loaded._repr_html_()
    with pytest.raises(UserError, match=r"no theta artifact at missing\.json"):
        load_theta("missing.json")
    with pytest.raises(UserError, match=r"a theta is a \.json or a \.safetensors file, got 'theta\.txt'"):
        solver.save("theta.txt")


def test_a_zoo_model_samples_as_its_field_does() -> None:
    """The API adds nothing to theta's own sampling."""
    model, adapter = Model.zoo("digits_fm_ot"), ZooModel("digits_fm_ot")
    solver = fixed(model)
    x0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = solver.theta.solver.sample(adapter.field(torch.full((4,), 3), 1.0), x0)
    torch.testing.assert_close(solver.sample(n=4, x0=x0, conditions=3, batch_size=3), expected, rtol=0, atol=1e-5)


def test_a_yaml_of_a_solver_names_the_command(tmp_path: Path) -> None:
    """The model, NFE and guidance of a distillation, for the command line."""
    model = Model.zoo("digits_fm_ot")
    solver = fixed(model, guidance_scale=2.0)
    solver.to_yaml("solver.yaml")
    again = Model.from_yaml("solver.yaml")
    assert again.digest == model.digest
    assert again.chosen_scale(None) == 2.0
    assert again.config().nfe == (8,)
    with pytest.raises(UserError, match="lives only in this process"):
        fixed(Model(gaussian, (2,))).to_yaml()
