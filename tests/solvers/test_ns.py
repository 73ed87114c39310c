"""NS solvers: Algorithm 1 and its gradients, theta as a flat vector, and the theta artifact."""

from __future__ import annotations

import copy
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import noise, nonlinear_field, relative_error
from torch import Tensor

from solvers.families.adams_bashforth import AdamsBashforth
from solvers.families.base import GridSolver
from solvers.field import CountingField
from solvers.grids import UNIFORM
from solvers.ns import CheckpointedField, InvalidThetaError, NSSolver, lower_triangle, nfe_of_flat
from solvers.schedulers import CondOT
from solvers.theta import MAX_NFE, ThetaArtifact, load_theta


def random_solver(nfe: int = 4, seed: int = 0) -> NSSolver:
    """A generic solver: unordered times, and every weight non-zero."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.rand(nfe * (nfe + 5) // 2 + 1, generator=generator, dtype=torch.float64)
    return NSSolver.from_flat(flat)


# --- Algorithm 1 -------------------------------------------------------------------------------------------------


def test_sampling_implements_algorithm_1() -> None:
    """x_k = a_k x0 + sum_{j<k} b_kj u_j with u_j = u_{t_j}(x_j), written out in full for n = 2."""
    solver, field, x0 = random_solver(2), nonlinear_field(CondOT()), noise(3, 2)
    a, b, t = solver.a, solver.b, solver.times
    first = a[0] * x0
    u0 = field(first, t[0])
    second = a[1] * x0 + b[1, 0] * u0
    u1 = field(second, t[1])
    expected = a[2] * x0 + b[2, 0] * u0 + b[2, 1] * u1
    assert relative_error(solver.sample(field, x0), expected) < 1e-14


def test_sampling_makes_n_evaluations_at_scalar_float64_times() -> None:
    """Each evaluation gets a 0-d float64 time and a batch in the precision of the noise."""
    calls: list[tuple[int, torch.dtype, torch.dtype]] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append((t.ndim, t.dtype, x.dtype))
        return torch.sin(x)

    velocity.scheduler = CondOT()  # type: ignore[attr-defined]
    counted = CountingField(velocity)  # type: ignore[arg-type]
    x0 = noise(2, 3, 4, 4).float()
    sample = random_solver(5).sample(counted, x0)
    assert counted.nfe == 5
    assert set(calls) == {(0, torch.float64, torch.float32)}
    assert (sample.shape, sample.dtype) == (x0.shape, torch.float32)


def test_sampling_with_and_without_a_graph_gives_the_same_sample() -> None:
    """Distillation samples with a graph and everything else samples in place, but the result is the same."""
    solver, field, x0 = random_solver(6), nonlinear_field(CondOT()), noise(3, 2)
    learning = NSSolver.from_flat(solver.flat().requires_grad_())
    with_graph = learning.sample(field, x0)
    assert with_graph.requires_grad
    without_graph = solver.sample(field, x0)
    assert not without_graph.requires_grad
    assert relative_error(with_graph.detach(), without_graph) < 1e-13
    with torch.no_grad():
        assert torch.equal(learning.sample(field, x0), without_graph)


def test_sampling_does_not_modify_the_noise_or_the_velocities() -> None:
    """In-place accumulation must not write to tensors that the caller or the field still holds."""
    kept: list[tuple[Tensor, Tensor]] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        kept.append((x, x.clone()))
        return x  # returning its own input is the worst case for in-place accumulation

    x0 = noise(3, 2)
    before = x0.clone()
    random_solver(4).sample(velocity, x0)  # type: ignore[arg-type]
    assert torch.equal(x0, before)
    assert all(torch.equal(held, copied) for held, copied in kept)


def test_the_gradient_in_theta_matches_finite_differences() -> None:
    """d sample / d theta for times, a and b (the backward pass of BNS Algorithm 2)."""
    field, x0 = nonlinear_field(CondOT()), noise(2, 2)
    flat = random_solver(3).flat().requires_grad_()
    assert torch.autograd.gradcheck(lambda theta: NSSolver.from_flat(theta).sample(field, x0), flat, atol=1e-6)


@pytest.mark.parametrize(
    ("times", "a", "b"), [((3,), (3,), (4, 3)), ((3,), (4,), (3, 3)), ((3, 1), (4,), (4, 3)), ((0,), (1,), (1, 0))]
)
def test_times_a_and_b_of_inconsistent_shape_are_rejected(
    times: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    match = r"an NS solver of n=\d evaluations has times \(n,\), a \(n\+1,\) and b \(n\+1, n\); got "
    with pytest.raises(InvalidThetaError, match=match):
        NSSolver(torch.zeros(times), torch.zeros(a), torch.zeros(b))


def test_numbers_in_less_than_float64_are_rejected() -> None:
    """Rounding theta to float32 costs more than distillation gains at high NFE."""
    solver = random_solver(3)
    with pytest.raises(InvalidThetaError, match=r"are float64, got torch\.float32, .* convert them with \.double\(\)"):
        NSSolver(solver.times.float(), solver.a, solver.b)


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (2, 2), (0, 2)])
def test_weights_of_velocities_that_are_not_yet_computed_are_rejected(place: tuple[int, int]) -> None:
    """They would be ignored, so that ``flat`` and ``sample`` would disagree with ``b``."""
    solver = random_solver(3)
    b = solver.b.clone()
    b[place] = 0.1
    with pytest.raises(InvalidThetaError, match="b of an NS solver must be strictly lower triangular"):
        NSSolver(solver.times, solver.a, b)


# --- Memory held for the gradient of a sample --------------------------------------------------------------------


class _Saved:
    """Bytes of the distinct storages that autograd saves or that stay alive as a velocity's inputs."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.inputs: list[weakref.ref[Tensor]] = []

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def bytes_of(self, nfe: int, velocity: Callable[[Tensor, Tensor], Tensor], *, checkpoint: bool) -> int:
        """Bytes held between the forward and the backward pass when sampling once from ``BIG``."""

        def watched(x: Tensor, t: Tensor) -> Tensor:
            self.inputs.append(weakref.ref(x))
            return velocity(x, t)

        solver = NSSolver.from_flat(random_solver(nfe).flat().requires_grad_())
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            sample = solver.sample(watched, BIG, checkpoint=checkpoint)  # type: ignore[arg-type]
        for held in (reference() for reference in self.inputs):
            if held is not None:
                self._pack(held)
        assert sample.requires_grad  # keeps the graph alive until here
        return sum(self.storages.values())


BIG = noise(8, 512).float()
STATE_BYTES = BIG.numel() * BIG.element_size()


def _memory_heavy(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that saves ten tensors of the state's size for its backward pass."""
    for _ in range(10):
        x = torch.sin(x) + t.to(x.dtype)
    return x


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("nfe", [4, 8, 16])
def test_combining_does_not_copy_the_velocities(nfe: int, checkpoint: bool) -> None:
    """With a velocity that saves only its input, just x_i and u_i are held: linear in n instead of n^2 / 2."""
    held = _Saved().bytes_of(nfe, lambda x, t: torch.sin(x), checkpoint=checkpoint)
    assert held < (2 * nfe + 2) * STATE_BYTES


@pytest.mark.parametrize("nfe", [4, 8, 16])
def test_with_checkpointing_an_evaluation_holds_only_its_state_and_velocity(nfe: int) -> None:
    """The velocity's internal activations are not held; without checkpointing all of them are."""
    with_checkpointing = _Saved().bytes_of(nfe, _memory_heavy, checkpoint=True)
    without = _Saved().bytes_of(nfe, _memory_heavy, checkpoint=False)
    assert with_checkpointing < (2 * nfe + 2) * STATE_BYTES
    assert without > 10 * nfe * STATE_BYTES


@pytest.mark.parametrize("nfe", [1, 5])
def test_checkpointing_does_not_change_the_gradient(nfe: int) -> None:
    """The same operations run in the same order, some of them twice: equal to the last bit."""
    field, x0 = nonlinear_field(CondOT()), noise(3, 2)
    gradients = []
    for checkpoint in (False, True):
        flat = random_solver(nfe).flat().requires_grad_()
        sample = NSSolver.from_flat(flat).sample(field, x0, checkpoint=checkpoint)
        gradients.append(torch.autograd.grad(sample.square().sum(), flat)[0])
    assert torch.equal(*gradients)


def test_checkpointing_repeats_each_evaluation_only_in_the_backward_pass() -> None:
    """Its cost is n forwards in the backward pass, and nothing if no gradient is needed."""
    counted, x0 = CountingField(nonlinear_field(CondOT())), noise(3, 2)
    flat = random_solver(5).flat().requires_grad_()
    with torch.no_grad():
        NSSolver.from_flat(flat).sample(counted, x0, checkpoint=True)
    assert counted.nfe == 5
    sample = NSSolver.from_flat(flat).sample(counted, x0, checkpoint=True)
    assert counted.nfe == 10
    sample.sum().backward()
    assert counted.nfe == 15


def test_a_checkpointed_field_equals_the_field() -> None:
    """Same velocities and same scheduler, so it can replace a field anywhere."""
    field, x, t = nonlinear_field(CondOT()), noise(3, 2), torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(CheckpointedField(field)(x, t), field(x, t))
    assert CheckpointedField(field).scheduler == field.scheduler


def test_gradients_reach_the_noise_and_the_velocity_as_well_as_theta() -> None:
    """All inputs of a combination: a, b, x0, and every u_j (through a factor of the velocity)."""
    x0 = noise(2, 2).requires_grad_()
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    flat = random_solver(3).flat().requires_grad_()

    def sample(theta: Tensor, start: Tensor, scale: Tensor) -> Tensor:
        return NSSolver.from_flat(theta).sample(lambda x, t: scale * torch.sin(x + t), start)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(sample, (flat, x0, factor), atol=1e-6)


def test_a_weight_of_zero_still_has_a_gradient() -> None:
    """Zero weights are skipped in the sum but still get gradients: a start such as Midpoint's has many to learn."""
    flat = random_solver(3).flat()
    flat[7:10] = 0  # b_10, b_20, b_21
    field, x0 = nonlinear_field(CondOT()), noise(2, 2)
    sample = lambda theta: NSSolver.from_flat(theta).sample(field, x0)  # noqa: E731
    assert torch.autograd.gradcheck(sample, flat.requires_grad_(), atol=1e-6)


def test_the_gradient_of_a_large_batch_is_accurate_in_bfloat16() -> None:
    """Products over a batch are summed in float32, so theta's gradient is accurate to bfloat16's own rounding."""
    gradients = []
    for dtype in (torch.float64, torch.bfloat16):
        flat = random_solver(1).flat().requires_grad_()
        sample = NSSolver.from_flat(flat).sample(lambda x, t: x, torch.ones(4096, 1, dtype=dtype))  # type: ignore[arg-type]
        gradients.append(torch.autograd.grad(sample.sum(), flat, allow_unused=True)[0])
    assert relative_error(gradients[1], gradients[0]) < 0.01


def test_a_second_derivative_raises() -> None:
    """The combination is differentiable only once; a silent zero would be worse."""
    flat = random_solver(2).flat().requires_grad_()
    sample = NSSolver.from_flat(flat).sample(nonlinear_field(CondOT()), noise(2, 2))
    (gradient,) = torch.autograd.grad(sample.sum(), flat, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- theta as a flat vector --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 4, 8, 16, 20])
def test_theta_has_n_times_n_plus_5_halves_plus_1_numbers(nfe: int) -> None:
    """BNS section 3: n times, n + 1 weights of x0, n(n+1)/2 weights of velocities."""
    flat = random_solver(nfe).flat()
    assert len(flat) == nfe * (nfe + 5) // 2 + 1
    assert nfe_of_flat(len(flat)) == nfe


@pytest.mark.parametrize("nfe", [1, 3, 8])
def test_flat_and_from_flat_are_inverses(nfe: int) -> None:
    solver = random_solver(nfe)
    restored = NSSolver.from_flat(solver.flat())
    for name in ("times", "a", "b"):
        assert torch.equal(getattr(restored, name), getattr(solver, name))
    # The vector omits the entries that a solver cannot use: weights of its own and of future velocities.
    assert float(restored.b.triu().abs().sum()) == 0


def test_the_vector_holds_times_then_a_then_b_by_rows() -> None:
    """Stored optimiser states depend on this order, so it must not change."""
    rows, columns = lower_triangle(3)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    solver = NSSolver.from_flat(torch.arange(13, dtype=torch.float64))
    assert (solver.times.tolist(), solver.a.tolist()) == ([0, 1, 2], [3, 4, 5, 6])
    assert solver.b.tolist() == [[0, 0, 0], [7, 0, 0], [8, 9, 0], [10, 11, 12]]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 50, 52])
def test_a_vector_of_invalid_length_is_rejected(length: int) -> None:
    with pytest.raises(
        InvalidThetaError, match=rf"a theta cannot have {length} numbers: n evaluations have n\(n\+5\)/2 \+ 1"
    ):
        NSSolver.from_flat(torch.zeros(length, dtype=torch.float64))


def test_a_detached_solver_shares_no_memory_with_the_learned_one() -> None:
    flat = random_solver(3).flat().requires_grad_()
    learning = NSSolver.from_flat(flat)
    frozen = learning.detach()
    assert not frozen.flat().requires_grad
    frozen.times.zero_()
    assert torch.equal(learning.flat(), flat)


# --- Theta artifact ----------------------------------------------------------------------------------------------

PROVENANCE: dict[str, Any] = {
    "family": "bns",
    "start": "AB2",
    "prediction": "epsilon",
    "scheduler": "cond_ot",
    "native_scheduler": "vp",
    "guidance_scale": 3.0,
    "sigma0": 2.0,
    "model_digest": "ab" * 32,
    "pairs_digest": "cd" * 32,
    "validation_psnr_db": 41.5,
    "packages": {"torch": "2"},
}


def valid_content(nfe: int = 3) -> dict[str, Any]:
    return json.loads(ThetaArtifact(random_solver(nfe), **PROVENANCE).to_json())


def test_a_saved_theta_loads_bit_for_bit(tmp_path: Path) -> None:
    """Every float64 of theta and its complete provenance survive the file."""
    artifact = ThetaArtifact(random_solver(8), **PROVENANCE)
    path = tmp_path / "new" / "folder" / "theta.json"
    artifact.save(path)
    loaded = load_theta(path)
    assert torch.equal(loaded.solver.flat(), artifact.solver.flat())
    assert loaded.digest == artifact.digest
    assert {name: getattr(loaded, name) for name in PROVENANCE} == PROVENANCE


def test_a_fixed_solver_can_be_saved_and_loaded(tmp_path: Path) -> None:
    solver = GridSolver(AdamsBashforth(2), 4, UNIFORM).to_ns(CondOT())
    ThetaArtifact(solver, family="adams_bashforth").save(tmp_path / "theta.json")
    assert torch.equal(load_theta(tmp_path / "theta.json").solver.flat(), solver.flat())
    assert load_theta(tmp_path / "theta.json").family == "adams_bashforth"


def test_the_file_is_readable_json(tmp_path: Path) -> None:
    """One key per line, and b as a triangle with one row per line (n + 1 rows)."""
    solver = random_solver(4)
    ThetaArtifact(solver, **PROVENANCE).save(tmp_path / "theta.json")
    text = (tmp_path / "theta.json").read_text()
    content = json.loads(text)
    assert (content["format"], content["version"], content["nfe"]) == ("bespoke-theta", 1, 4)
    assert [len(row) for row in content["b"]] == [0, 1, 2, 3, 4]
    assert content["times"] == solver.times.tolist()
    assert len(text.splitlines()) == len(content) + len(content["b"]) + 3
    assert (tmp_path / "theta.json").stat().st_mode & 0o777 == 0o644


def test_saving_replaces_an_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "theta.json"
    ThetaArtifact(random_solver(3)).save(path)
    ThetaArtifact(random_solver(5)).save(path)
    assert load_theta(path).solver.nfe == 5
    assert os.listdir(tmp_path) == ["theta.json"]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_save_leaves_only_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The file is either complete or unchanged, and no temporary file remains."""
    path = tmp_path / "theta.json"
    ThetaArtifact(random_solver(3)).save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        ThetaArtifact(random_solver(5)).save(path)
    monkeypatch.undo()
    assert load_theta(path).solver.nfe == 3
    assert os.listdir(tmp_path) == ["theta.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e7])
def test_a_theta_that_cannot_be_loaded_is_not_saved(tmp_path: Path, value: float) -> None:
    flat = random_solver(3).flat()
    flat[4] = value
    with pytest.raises(InvalidThetaError, match="theta to be saved is not a usable theta artifact: 'a' holds"):
        ThetaArtifact(NSSolver.from_flat(flat)).save(tmp_path / "theta.json")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no theta artifact at .*absent\.json"):
        load_theta(tmp_path / "absent.json")


@pytest.mark.parametrize("text", ["", "{", "not json", "{'a': 1}", "[" * 100_000, "1" * 5000, "\x00\x01"])
def test_text_that_is_not_json_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "theta.json"
    path.write_text(text)
    with pytest.raises(InvalidThetaError, match=r"theta\.json is not a usable theta artifact: it is not JSON"):
        load_theta(path)


def test_bytes_that_are_not_text_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "theta.json"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(InvalidThetaError, match="it is not JSON"):
        load_theta(path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"bespoke-theta"', "{}", '{"format": "safetensors"}'])
def test_json_that_is_not_an_artifact_is_rejected(text: str) -> None:
    with pytest.raises(InvalidThetaError, match="its 'format' is not 'bespoke-theta'"):
        ThetaArtifact.from_json(text)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_rejected(version: Any) -> None:
    with pytest.raises(InvalidThetaError, match=r"version .* is unknown; this release reads version 1"):
        ThetaArtifact.from_json(json.dumps({**valid_content(), "version": version}))


def test_a_newer_version_is_refused_by_its_version_whatever_else_it_holds() -> None:
    """An older copy of this package says that a newer one wrote the file, not that some field is malformed."""
    content = {**valid_content(), "version": 2, "times": {"guidance": [0.0]}, "slope": 1.0}
    with pytest.raises(InvalidThetaError, match=r"version 2 is unknown; .* a newer release wrote it: update this one"):
        ThetaArtifact.from_json(json.dumps(content))


def test_a_field_that_is_not_known_is_refused_by_name() -> None:
    """It may change what the numbers mean, and skipping it would be silent."""
    content = {**valid_content(), "slope": 1.0, "clip": True}
    with pytest.raises(InvalidThetaError, match=r"fields that this release does not know \('clip', 'slope'\) and that"):
        ThetaArtifact.from_json(json.dumps(content))


@pytest.mark.parametrize("nfe", [-1, 0, MAX_NFE + 1, 10**30, True, 3.0, "3", None, [3]])
def test_an_impossible_nfe_is_rejected_before_memory_is_allocated(nfe: Any) -> None:
    with pytest.raises(InvalidThetaError, match="'nfe' must be an integer from 1 to 1000, got "):
        ThetaArtifact.from_json(json.dumps({**valid_content(), "nfe": nfe}))


def _valid_with(path: tuple[str | int, ...], value: Any) -> str:
    """JSON of the valid artifact with one entry replaced."""
    content = valid_content()
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("times",), None, "'times' must be a list of 3 numbers, got NoneType"),
        (("times",), "0.5", "'times' must be a list of 3 numbers, got str"),
        (("times",), [0.0, 0.5], "'times' must be a list of 3 numbers, got 2"),
        (("times", 1), 1.5, r"'times' must lie in \[0, 1\], got 1.5"),
        (("times", 1), -1e-9, r"'times' must lie in \[0, 1\], got -1e-09"),
        (("times", 1), float("nan"), "'times' holds nan; every number must be finite and at most 1e6"),
        (("a",), [1.0] * 3, "'a' must be a list of 4 numbers, got 3"),
        (("a", 0), "1", "'a' holds '1', which is not a number"),
        (("a", 0), True, "'a' holds True, which is not a number"),
        (("a", 0), None, "'a' holds None, which is not a number"),
        (("a", 2), float("inf"), "'a' holds inf; every number must be finite"),
        (("a", 2), 10**400, "'a' holds 1000.*; every number must be finite"),
        (("b",), {}, "'b' must have 4 rows"),
        (("b",), [[], [1.0]], "'b' must have 4 rows"),
        (("b", 2), [1.0], r"'b\[2\]' must be a list of 2 numbers, got 1"),
        (("b", 0), [1.0], r"'b\[0\]' must be a list of 0 numbers, got 1"),
        (("b", 3, 1), float("-inf"), r"'b\[3\]' holds -inf; every number must be finite"),
        (("b", 3, 1), [2.0], r"'b\[3\]' holds \[2.0\], which is not a number"),
        (("family",), None, "'family' is None, expected str"),
        (("start",), 3, "'start' is 3, expected str or NoneType"),
        (("prediction",), ["epsilon"], r"'prediction' is \['epsilon'\], expected str or NoneType"),
        (("scheduler",), False, "'scheduler' is False, expected str or NoneType"),
        (("native_scheduler",), 1.0, "'native_scheduler' is 1.0, expected str or NoneType"),
        (("guidance_scale",), "3", "'guidance_scale' is '3', expected int or float"),
        (("guidance_scale",), True, "'guidance_scale' is True, expected int or float"),
        (("guidance_scale",), float("nan"), "'guidance_scale' must be finite, got nan"),
        (("sigma0",), None, "'sigma0' is None, expected int or float"),
        (("model_digest",), 7, "'model_digest' is 7, expected str or NoneType"),
        (("pairs_digest",), {}, "'pairs_digest' is {}, expected str or NoneType"),
        (("validation_psnr_db",), float("inf"), "'validation_psnr_db' must be finite, got inf"),
        (("packages",), [], r"'packages' is \[\], expected dict"),
    ],
)
def test_a_malformed_artifact_is_rejected_with_the_faulty_entry(
    path: tuple[str | int, ...], value: Any, problem: str
) -> None:
    with pytest.raises(InvalidThetaError, match=f"theta is not a usable theta artifact: {problem}"):
        ThetaArtifact.from_json(_valid_with(path, value))


def test_provenance_is_optional() -> None:
    """A theta written by hand needs only its coefficients."""
    content = {key: value for key, value in valid_content().items() if key not in PROVENANCE}
    artifact = ThetaArtifact.from_json(json.dumps(content))
    assert (artifact.family, artifact.guidance_scale, artifact.model_digest) == ("ns", 1.0, None)


def test_the_digest_covers_only_the_coefficients() -> None:
    """Changing the provenance keeps the digest; changing one bit of one coefficient does not."""
    solver = random_solver(3)
    flat = solver.flat()
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(2.0, dtype=torch.float64))
    assert ThetaArtifact(solver).digest == ThetaArtifact(solver, **PROVENANCE).digest
    assert ThetaArtifact(solver).digest != ThetaArtifact(NSSolver.from_flat(flat)).digest


def test_a_theta_of_another_model_is_rejected_unless_transfer_is_allowed(tmp_path: Path) -> None:
    path, model, other = tmp_path / "theta.json", "a" * 64, "b" * 64
    ThetaArtifact(random_solver(3), model_digest=model).save(path)
    match = r"made for model aaaaaaaaaaaa, not for bbbbbbbbbbbb: .*--allow-transfer \(allow_transfer=True\)"
    with pytest.raises(InvalidThetaError, match=match):
        load_theta(path, model_digest=other)
    assert load_theta(path, model_digest=model).solver.nfe == 3
    assert load_theta(path, model_digest=other, allow_transfer=True).solver.nfe == 3
    assert load_theta(path).solver.nfe == 3


def test_a_theta_without_a_model_digest_is_rejected_for_a_known_model(tmp_path: Path) -> None:
    path = tmp_path / "theta.json"
    ThetaArtifact(random_solver(3)).save(path)
    with pytest.raises(InvalidThetaError, match="made for model unknown, not for bbbbbbbbbbbb"):
        load_theta(path, model_digest="b" * 64)


# --- Any file either loads as a usable theta or is rejected ---------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.integers(10**300, 10**400),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _load_or_reject(text: str) -> None:
    try:
        artifact = ThetaArtifact.from_json(text)
    except InvalidThetaError:
        return
    solver = artifact.solver
    assert bool(torch.isfinite(solver.flat()).all())
    assert bool(((solver.times >= 0) & (solver.times <= 1)).all())
    assert float(solver.b.triu().abs().sum()) == 0
    solver.sample(lambda x, t: x, torch.zeros(1, 1))  # type: ignore[arg-type]
    assert ThetaArtifact.from_json(artifact.to_json()).digest == artifact.digest


def _replace_leaf(content: Any, choose: Callable[[int], int], value: Any) -> None:
    """Descend to some entry of a JSON value and replace it."""
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[choose(len(keys))]
    if isinstance(content[key], dict | list) and content[key] and choose(3):
        _replace_leaf(content[key], choose, value)
    else:
        content[key] = value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), value=JSON_VALUES)
def test_an_artifact_with_one_value_replaced_is_usable_or_rejected(data: st.DataObject, value: Any) -> None:
    content = copy.deepcopy(_VALID)
    _replace_leaf(content, lambda size: data.draw(st.integers(0, size - 1)), value)
    _load_or_reject(json.dumps(content))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_artifact_with_damaged_text_is_usable_or_rejected(data: st.DataObject) -> None:
    """Some text is cut out and other text inserted, as by torn writes, bad disks or careless editing."""
    text = json.dumps(_VALID)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    _load_or_reject(text[:start] + data.draw(st.text(max_size=8)) + text[end:])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=200) | JSON_VALUES.map(json.dumps))
def test_arbitrary_text_is_usable_or_rejected(text: str) -> None:
    _load_or_reject(text)


_VALID = valid_content()


def test_the_undamaged_artifact_is_usable() -> None:
    """The three tests above start from a valid artifact, so they do not merely test rejection."""
    assert torch.equal(ThetaArtifact.from_json(json.dumps(_VALID)).solver.flat(), random_solver(3).flat())
