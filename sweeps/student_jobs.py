"""Training of students for ``bespoke distil-network``: jobs that run in this process or as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ray
import torch
from ray.exceptions import RayTaskError

from orchestrator.cluster.connect import connect
from orchestrator.cluster.preflight import check_nodes
from orchestrator.errors import UserError
from orchestrator.network_distillation.progressive import ProgressiveRecipe, distil_progressively
from orchestrator.network_distillation.students import StudentResult
from orchestrator.network_distillation.weights import WeightsRecipe, distil_weights
from orchestrator.progress import bar
from orchestrator.storage import Storage

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Job:
    """A training task: one student of K.4, or a chain of halvings.

    Attributes:
        method: Name of its rows in the table.
        recipe: Recipe of the student or chain.
        nfes: NFEs of the students that the comparison shows.
        iterations: Length of the task, for the progress bar.
    """

    method: str
    recipe: WeightsRecipe | ProgressiveRecipe
    nfes: tuple[int, ...]
    iterations: int

    def run(self, storage: Storage, progress: Progress) -> list[StudentResult]:
        """Train, resume, or read complete results; returns the students at :attr:`nfes`."""
        torch.set_num_threads(1)
        if isinstance(self.recipe, WeightsRecipe):
            return [distil_weights(self.recipe, storage, progress)]
        chain = distil_progressively(self.recipe, min(self.nfes), storage, progress)
        return [result for result in chain if result.nfe in self.nfes]


def train(
    jobs: Sequence[Job], storage: Storage, workers: int, address: str | None
) -> list[tuple[Job, list[StudentResult]]]:
    """Run all training tasks: one after the other in this process, or as Ray tasks of one CPU each.

    Args:
        jobs: The tasks.
        storage: Storage of pairs and students; on a cluster, every node must be able to reach it.
        workers: Number of parallel tasks on this machine. Ray runs them if this is above 1 or an address is set.
        address: Ray cluster; None for this machine.

    Raises:
        UserError: A task failed for a reason that the user can fix.
    """
    with bar(sum(job.iterations for job in jobs), "iteration", "network distillation") as progress:
        if workers == 1 and address is None:
            return [(job, job.run(storage, progress.update)) for job in jobs]
        connect(address, workers)
        check_nodes(storage, None)  # only this process uses MLflow
        results: dict[int, list[StudentResult]] = {}
        for index, students in _as_tasks(jobs, storage):
            results[index] = students
            progress.update(jobs[index].iterations)
        return [(job, results[index]) for index, job in enumerate(jobs)]


def _as_tasks(jobs: Sequence[Job], storage: Storage) -> Iterator[tuple[int, list[StudentResult]]]:
    """Run the jobs as Ray tasks; yields (index, results) in order of completion."""
    # A task whose node is lost is restarted and resumes from its checkpoint.
    task = ray.remote(num_cpus=1, max_retries=2)(_run_job)
    pending = {task.remote(job, storage): index for index, job in enumerate(jobs)}
    while pending:
        (done,), _ = ray.wait(list(pending), num_returns=1)
        index = pending.pop(done)
        try:
            yield index, ray.get(done)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise


def _run_job(job: Job, storage: Storage) -> list[StudentResult]:
    """Run a job in a Ray worker. Module-level, so that workers import it instead of unpickling a closure."""
    return job.run(storage, lambda iterations: None)
