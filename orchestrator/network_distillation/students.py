"""Students: copies of a zoo model whose weights are trained, with their checkpoints and results."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from orchestrator.errors import ConfigError
from orchestrator.models.zoo import ZooModel
from orchestrator.models.zoo.adapter import METADATA_KEY, weights_path
from orchestrator.storage import Storage, digest_of
from solvers.distil.methods.adam import Adam
from solvers.families import GridSolver
from solvers.families.ddim import DDIM
from solvers.families.midpoint import Midpoint
from solvers.grids import Grid

STUDENT_FORMAT = 1
"""Increment whenever the same recipe would give different weights."""

GRADIENT_NORM = 1.0
"""Gradients are clipped to this norm, as in the training of the zoo and of Progressive Distillation."""

Solver = Literal["midpoint", "ddim"]
Progress = Callable[[int], object]
"""``progress(iterations)``: called when this many more iterations are complete."""


@dataclass(frozen=True, kw_only=True)
class StudentResult:
    """Result of a trained student. Its weights are stored beside it, as a zoo model.

    Attributes:
        key: Folder under ``students/``.
        nfe: Evaluations per sample that it was trained for.
        solver: Solver it is sampled with, on the uniform grid.
        forwards: Network forwards spent on training, counted per sample, including teachers and validation.
        backwards: Network backwards, counted per sample.
        data_forwards: Forwards spent on making its training set (ground truth); 0 for real data.
        training_set: Number of ground-truth trajectories or real samples it learns from.
        parameters: Number of trainable parameters.
        bytes: Size of the weights file.
        status: 'finished', or 'diverged' if the best iterate before the divergence was kept.
        history: [iteration, validation PSNR in dB] of every validation; empty if there were none.
    """

    key: str
    nfe: int
    solver: Solver
    forwards: int
    backwards: int
    data_forwards: int
    training_set: int
    parameters: int
    bytes: int
    status: str = "finished"
    history: list[list[float]] = field(default_factory=list)

    def build_solver(self) -> GridSolver:
        """The solver that the student was trained for."""
        return student_solver(self.solver, self.nfe)


def student_solver(name: Solver, nfe: int) -> GridSolver:
    """Midpoint or DDIM with ``nfe`` evaluations on the uniform grid.

    Raises:
        ValueError: Midpoint with an odd ``nfe``.
    """
    return GridSolver({"midpoint": Midpoint, "ddim": DDIM}[name](), nfe, Grid())


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the students of a training task depend on; a base class.

    Attributes:
        teacher: Name or path of the zoo model.
        teacher_digest: The model's sha256.
        settings: Settings of Adam.
    """

    places: ClassVar[tuple[str, ...]] = ("teacher",)
    """Fields that only say where content is found, which other fields are digests of."""

    teacher: str
    teacher_digest: str
    settings: Adam

    @property
    def key(self) -> str:
        """Name of the students' folder: a digest of the fields, without :attr:`places`."""
        content = asdict(self) | {"recipe": type(self).__name__, "format": STUDENT_FORMAT}
        return digest_of({name: value for name, value in content.items() if name not in self.places})

    def load_teacher(self) -> ZooModel:
        """Load the zoo model and check that it is the one the recipe was written for.

        Raises:
            ConfigError: The name or path now refers to a different model.
        """
        model = ZooModel(self.teacher)
        if model.digest != self.teacher_digest:
            raise ConfigError(
                f"model {self.teacher!r} has digest {model.digest[:12]}, but the recipe of its student names "
                f"{self.teacher_digest[:12]}; run the same command again to start from the current model"
            )
        return model


class Student:
    """A trainable copy of a model, with its optimiser and the passes spent so far.

    Dropout stays off, so targets are deterministic and the same recipe gives the same result.
    """

    def __init__(self, model: ZooModel):
        self.model = copy.deepcopy(model)
        self.model.net.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.model.net.parameters())
        self.iteration = 0
        self.forwards = 0
        self.backwards = 0

    def descend(self, loss: Tensor, rate: float) -> None:
        """Take one step of Adam on a 0-d loss with learning rate ``rate``."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.net.parameters(), GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.iteration += 1

    def weights(self) -> dict[str, Tensor]:
        """A copy of the current weights."""
        return {name: tensor.detach().clone() for name, tensor in self.model.net.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """State from which training can resume."""
        return {
            "net": self.model.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "forwards": self.forwards,
            "backwards": self.backwards,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.forwards, self.backwards = (state[k] for k in ("iteration", "forwards", "backwards"))


class StudentStore:
    """Folder of one recipe: a checkpoint during training, then weights and result per NFE, the result last."""

    def __init__(self, storage: Storage, key: str):
        self.storage = storage
        self.key = key
        self._checkpoint = f"students/{key}/checkpoint.pt"

    def weights_key(self, nfe: int) -> str:
        return f"students/{self.key}/nfe{nfe}.safetensors"

    def _result_key(self, nfe: int) -> str:
        return f"students/{self.key}/nfe{nfe}.json"

    def is_complete(self, nfe: int) -> bool:
        return all(self.storage.exists(key) for key in (self._result_key(nfe), self.weights_key(nfe)))

    def result(self, nfe: int) -> StudentResult:
        return StudentResult(**self.storage.read_json(self._result_key(nfe)))

    def load_checkpoint(self) -> dict[str, Any] | None:
        """State left by an interrupted training, or None."""
        if not self.storage.exists(self._checkpoint):
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(self.storage.read(self._checkpoint)), weights_only=True)
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.storage.write(self._checkpoint, buffer.getvalue())

    def publish(self, teacher: str, weights: dict[str, Tensor], **facts: Any) -> StudentResult:
        """Write a finished student: its weights as a zoo model, then its result.

        Args:
            teacher: Name or path of the zoo model it copies, which supplies the network's description.
            weights: Weights of the student.
            facts: Fields of :class:`StudentResult` that do not follow from the weights.
        """
        with safe_open(weights_path(teacher), framework="pt") as file:
            description = file.metadata()[METADATA_KEY]
        data = save({name: tensor.contiguous() for name, tensor in weights.items()}, {METADATA_KEY: description})
        parameters = sum(tensor.numel() for tensor in weights.values())
        result = StudentResult(key=self.key, parameters=parameters, bytes=len(data), **facts)
        self.storage.write(self.weights_key(result.nfe), data)
        self.storage.write(self._result_key(result.nfe), (json.dumps(asdict(result), indent=1) + "\n").encode())
        self.storage.delete(self._checkpoint)
        return result

    def load_student(self, teacher: ZooModel, nfe: int) -> ZooModel:
        """A frozen copy of the teacher with the weights of its student at this NFE."""
        student = copy.deepcopy(teacher)
        student.net.load_state_dict(load(self.storage.read(self.weights_key(nfe))))
        return student
